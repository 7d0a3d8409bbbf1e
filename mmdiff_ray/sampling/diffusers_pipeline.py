"""A published model as a pipeline of diffusers: what a folder in the format `diffusers` imports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from PIL import Image

from mmdiff_ray.sampling.export import load_export
from mmdiff_ray.sampling.generator import Generator


class MMDiffDenoiser(ModelMixin):
    """The denoiser with its configuration. Its weights are float32, whatever `torch_dtype` asks for."""

    def __init__(self, model: Generator) -> None:
        super().__init__()
        self.model = model
        self.denoiser = model.denoiser

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> "MMDiffDenoiser":
        """Return the denoiser in the folder `denoiser` of a published model."""
        return cls(load_export(Path(folder).parent))

    def forward(self, *inputs: Any) -> Any:
        """Return the prediction of `Denoiser.forward`."""
        return self.denoiser(*inputs)


@dataclass
class MMDiffOutput(BaseOutput):
    """images: the anchor's samples as pictures. samples: modality -> one plain value per sample."""

    images: list[Image.Image]
    samples: dict[str, list[Any]]


class MMDiffPipeline(DiffusionPipeline):
    """Sample any modalities from any others."""

    denoiser: Any

    def __init__(self, denoiser: MMDiffDenoiser) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser)  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(
        self, given: Mapping[str, Sequence[Any]] | None = None, num: int = 1, **options: Any
    ) -> MMDiffOutput:
        """Return `num` samples.

        given: modality -> one value per sample. options: as of `Generator.sample`.
        """
        model = self.denoiser.model
        samples = model.sample(given or {}, num, **options)
        anchor = samples[model.denoiser.anchor]
        return MMDiffOutput([Image.fromarray(image.transpose(1, 2, 0)) for image in anchor], samples)
