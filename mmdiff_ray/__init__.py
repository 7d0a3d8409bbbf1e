"""Distributed training of multi-modal, multi-task diffusion models on Ray."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmdiff_ray.sampling.generator import Generator

__version__ = "0.1.0"


def load_pipeline(model: "str | Path", device: str = "cpu") -> "Generator":
    """Return a trained model for use, without Ray or MLflow.

    model: the folder that `mmdiff export` wrote, or `pretrained:NAME` for a shipped one. Raises ConfigError
    where there is none.
    """
    from mmdiff_ray.sampling.export import load_export

    return load_export(model, device)
