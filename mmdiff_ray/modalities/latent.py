"""Latents: images in the latent space of a frozen autoencoder, standardised values as code."""

import dataclasses
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.codecs.autoencoder import CONFIG, WEIGHTS, Codec, load_codec
from mmdiff_ray.config import ConfigError, ModalityConfig, named
from mmdiff_ray.modalities.base import DenseModality, Mean, RowContext, need_column
from mmdiff_ray.modalities.image import draw, open_image, resized, to_png
from mmdiff_ray.registry import register

LEAST_STD = 0.01
"""Smallest standard deviation of the likelihood, in deviations of the data: about an image's grey level."""


@dataclass(frozen=True)
class LatentOptions(ModalityConfig):
    """The keys of latents.

    column: Parquet column; null: the modality's name.
    codec: folder of the autoencoder; null: where it lay when the data set was built.
    digest: SHA-256 of the autoencoder's files; null: the data set's.
    cells: height and width of the latents; null: the data set's. The space has the same.
    mean: of each channel; null: the data set's.
    deviation: standard deviation of each channel; null: the data set's.
    sigma: standard deviation of the likelihood if the latents are not the anchor, in standard deviations of
        the channel.
    """

    folders: ClassVar = {"codec": (CONFIG, WEIGHTS)}

    column: str | None = None
    codec: str | None = None
    digest: str | None = None
    cells: list[int] | None = None
    mean: list[float] | None = None
    deviation: list[float] | None = None
    sigma: float = 1.0


@register("modality", "latent")
class LatentModality(DenseModality):
    """Latents. data: float32 (B, C, H, W), as the autoencoder gives them; code and prediction: (B, C, H, W),
    standardised per channel. Pictures and files are decoded. Likelihood: Gaussian.
    """

    Options = LatentOptions
    likelihood = "Gaussian"
    mean: Tensor
    scale: Tensor

    def __init__(self, name: str, options: LatentOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        mean, deviation = options.mean or [], options.deviation or []
        if not mean or len(mean) != len(deviation) or min(deviation) < 0:
            raise ConfigError(
                f"modalities.{name}: mean ({mean}) and deviation ({deviation}) must have a number per "
                "channel; leave them out to take the data set's"
            )
        if not options.sigma > 0:
            raise ConfigError(f"modalities.{name}.sigma ({options.sigma}) must be above 0")
        if options.cells is not None and list(size) != options.cells:
            height, width = options.cells
            raise ConfigError(
                f"space is {size[0]} x {size[1]}, the latents of {name} are {height} x {width}; set "
                f"space.height={height} space.width={width}"
            )
        self.code_channels = self.prediction_channels = len(mean)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("scale", torch.tensor(deviation)[:, None, None].clamp_min(1e-6))

    @classmethod
    def resolve(
        cls, name: str, options: LatentOptions, columns: Mapping[str, Mapping[str, Any]]
    ) -> LatentOptions:
        column = options.column or name
        entry = need_column(name, column, columns, ("latent",))
        for key, pinned, held in (
            ("digest", options.digest, entry["codec_digest"]),
            ("cells", options.cells, list(entry["size"])),
        ):
            if pinned not in (None, held):
                raise ConfigError(
                    f"modalities.{name}.{key} ({pinned}) differs from the data set's {held} in column "
                    f"{column!r}; leave it out to take the data set's"
                )
        with named(f"modalities.{name}.codec"):
            codec = Codec(options.codec or entry["codec_folder"], entry["codec_digest"])
        return dataclasses.replace(
            options,
            column=column,
            codec=codec.folder,
            digest=codec.digest,
            cells=list(entry["size"]),
            mean=options.mean or entry["mean"],
            deviation=options.deviation or entry["deviation"],
        )

    @property
    def codec(self) -> Codec:
        """Return the autoencoder. Raises ConfigError if it is missing or another."""
        with named(f"modalities.{self.name}.codec"):
            if self.options.codec is None:
                raise ConfigError("missing; name the autoencoder's folder")
            return load_codec(self.options.codec, self.options.digest)

    @property
    def data_type(self) -> type:
        return np.float32

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        stored = row[self.column]
        return None if stored is None else np.load(io.BytesIO(stored))

    def augment(self, decoded: np.ndarray, context: RowContext) -> np.ndarray:
        return decoded[int(context.mirrored)].astype(np.float32)  # (2, C, H, W): as it is, mirrored

    def encode(self, data: Tensor) -> Tensor:
        return (data.float() - self.mean) / self.scale

    def from_code(self, code: Tensor) -> Tensor:
        return code.float() * self.scale + self.mean

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        return self.code_negative_log_likelihood(prediction, prediction.new_tensor(self.options.sigma), data)

    def code_negative_log_likelihood(
        self, mean: Tensor, std: Tensor, data: Tensor, known: Tensor | None = None
    ) -> Tensor:
        """Return -log p(data) in nats under N(mean, std^2) on the code, a density, (B,).

        mean: (B, C, H, W); std: a number per sample or channel that broadcasts to it; known: cells that do
        not count, bool (B, H, W).
        """
        std = std.float().clamp_min(LEAST_STD)
        deviation = (mean.float() - self.encode(data)) / std
        nats = 0.5 * deviation.square() + std.log() + 0.5 * math.log(2 * math.pi)
        return (nats if known is None else nats.masked_fill(known[:, None], 0)).flatten(1).sum(1)

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        difference = (self.encode(answer) - self.encode(data)).abs()
        return {"absolute_error": Mean(float(difference.sum()), difference.numel())}

    def pixels(self, data: Tensor) -> Tensor:
        return self.codec.decode(data)

    def picture(self, data: Tensor) -> np.ndarray:
        return self.pixels(data).permute(0, 2, 3, 1).numpy()

    def parse(self, text: str) -> np.ndarray:
        """Return the latents of a picture's file, drawn over white."""
        picture, factor = open_image(text, self.name), self.codec.factor
        size = (self.size[0] * factor, self.size[1] * factor)
        context = RowContext(size, seed=0, visit=0, row_id=0, backgrounds="white", flip=False)
        pixels = torch.from_numpy(draw(resized(picture, size), context, self.name))
        return self.codec.encode(pixels[None])[0].numpy()

    def entry(self) -> dict[str, Any]:
        return {"kind": "image"}

    def stored(self, data: Tensor) -> bytes:
        return to_png(self.picture(data[None])[0])

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.png")
        path.write_bytes(self.stored(data))
        return path
