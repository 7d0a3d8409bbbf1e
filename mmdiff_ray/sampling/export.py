"""Write a trained model for use, and load it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.models.denoiser import Denoiser, build_denoiser
from mmdiff_ray.sampling.generator import Generator
from mmdiff_ray.storage.filesystem import is_uri
from mmdiff_ray.storage.mirror import fetched


def save_export(folder: Path, config: Config, denoiser: Denoiser, facts: Mapping[str, Any]) -> None:
    """Write a model for use: `model.safetensors`, `config.yaml` and `facts.json`. The folder appears
    complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in denoiser.state_dict().items()}
    save_file(tensors, str(partial / "model.safetensors"))
    (partial / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf8")
    (partial / "facts.json").write_text(json.dumps(dict(facts), indent=1), encoding="utf8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_export(folder: str | Path, device: str = "cpu", config: Config | None = None) -> Generator:
    """Return the model in an export folder, or at the URI of one. Raises ConfigError if it is none.

    config: in place of its own, one that differs in nothing that the weights depend on.
    """
    folder = fetched(str(folder)) if is_uri(str(folder)) else Path(folder)
    if not (folder / "model.safetensors").is_file() or not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} holds no exported model (model.safetensors and config.yaml)")
    config = config or configuration.load_saved(folder / "config.yaml")
    denoiser = build_denoiser(config)
    denoiser.load_state_dict(load_file(str(folder / "model.safetensors")))
    return Generator(config, denoiser.to(device))
