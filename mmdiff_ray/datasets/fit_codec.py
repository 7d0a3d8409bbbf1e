"""Train a small autoencoder on the pictures of a data set, and save it in the folder layout of diffusers."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff_ray.codecs.autoencoder import Codec, encoded, new_autoencoder
from mmdiff_ray.config import ConfigError, DataConfig
from mmdiff_ray.data.batches import local_batches, split_batches
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.data.plan import Plan
from mmdiff_ray.data.reader import RowReader
from mmdiff_ray.distributed.display import show_progress
from mmdiff_ray.evaluation.lpips import Lpips
from mmdiff_ray.modalities.base import need_column
from mmdiff_ray.modalities.image import ImageModality, ImageOptions

HELD_OUT = 512
"""Rows that reconstructions are measured on, at most."""


@dataclass(frozen=True)
class Fit:
    """How an autoencoder is trained.

    source: URI of the data set. column: of its images. channels: of the latents. factor: pixels a side per
    cell. width: channels inside. samples: images seen. kl: weight of the divergence from N(0, I), per element
    of the latents; above 0 makes an AutoencoderKL, else an AutoencoderTiny. lpips: weight of LPIPS (AlexNet)
    beside L1.
    """

    source: str
    column: str = "pixels"
    channels: int = 4
    factor: int = 8
    width: int = 32
    samples: int = 200_000
    batch: int = 32
    learning_rate: float = 1e-3
    kl: float = 0.0
    lpips: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be, naming its option."""
        for name in ("channels", "width", "samples", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} ({getattr(self, name)}) must be at least 1")
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise ConfigError(f"--factor ({self.factor}) must be a power of 2, such as 8")
        if not self.learning_rate > 0:
            raise ConfigError(f"--learning-rate ({self.learning_rate:g}) must be above 0")
        for name in ("kl", "lpips"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name} ({getattr(self, name):g}) must be at least 0")


def fit_codec(fit: Fit, out: Path, progress: bool = True) -> dict[str, float]:
    """Train an autoencoder, save it, and return figures of reconstructed held-out images (`measure`).

    Transparent images are drawn over white. `fit.json` in the folder holds options and figures. Raises
    ConfigError for a folder that is not empty, missing LPIPS weights, or images that do not fit the factor.
    """
    fit.check()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is not empty; use a new folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lpips = Lpips("alex", device) if fit.lpips else None
    reader = _reader(fit)
    with torch.random.fork_rng():
        torch.manual_seed(fit.seed)
        model = new_autoencoder(fit.channels, fit.factor, fit.width, kl=fit.kl > 0).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), fit.learning_rate, (0.9, 0.99), weight_decay=0.01)
        steps = math.ceil(fit.samples / fit.batch)
        warmup = max(1, min(200, steps // 10))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
        )
        with show_progress(f"codec of {fit.source} -> {out}", fit.samples, progress) as advance:
            for pixels in _training_pixels(fit, reader, steps):
                loss = _loss(model, pixels.to(device), fit, lpips)
                optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if not norm.isfinite():
                    raise ConfigError(f"the gradient is {norm.item()}; lower --learning-rate")
                optimizer.step()
                schedule.step()
                advance(len(pixels))
    model.save_pretrained(out)
    figures = measure(Codec(str(out)), _held_out(fit, reader), lpips)
    (out / "fit.json").write_text(json.dumps({"options": asdict(fit), "figures": figures}, indent=1))
    return figures


def measure(codec: Codec, images: Tensor, lpips: Lpips | None) -> dict[str, float]:
    """Return PSNR in dB (the mean over images), L1 of pixels in [-1, 1] and LPIPS of reconstructed images.

    images: uint8 (n, 3, H, W).
    """
    again = codec.decode(codec.encode(images))
    difference = (again.double() - images.double()) / 127.5
    psnr = 10 * torch.log10(4 / difference.square().mean((1, 2, 3)).clamp_min(1e-10))
    figures = {"psnr": float(psnr.mean()), "l1": float(difference.abs().mean()), "rows": len(images)}
    return figures if lpips is None else {**figures, "lpips": float(lpips(again, images).mean())}


def _loss(model: Any, pixels: Tensor, fit: Fit, lpips: Lpips | None) -> Tensor:
    """Return L1 + LPIPS + KL of pixels in [-1, 1], (B, 3, H, W)."""
    divergence: Tensor | float = 0.0
    if fit.kl:
        posterior = model.encode(pixels).latent_dist
        latents = posterior.sample()
        divergence = posterior.kl().mean() / latents[0].numel()
    else:
        latents = encoded(model, pixels)
    again = model.decode(latents).sample
    loss = (again - pixels).abs().mean() + fit.kl * divergence
    return loss if lpips is None else loss + fit.lpips * lpips.loss(again, pixels)


def _reader(fit: Fit) -> RowReader:
    """Return the reader of the images at the size that they have. Raises ConfigError for an unfit size."""
    entry = need_column("pixels", fit.column, read_manifest(fit.source).columns, ("image",))
    height, width = entry["size"]
    if height % fit.factor or width % fit.factor:
        raise ConfigError(
            f"--factor ({fit.factor}) must divide the sides of the images, {height} x {width} pixels in "
            f"{fit.source}"
        )
    images = ImageModality("pixels", ImageOptions(type="image", column=fit.column), (height, width))
    return RowReader({"pixels": images}, [fit.source], DataConfig(backgrounds="white"), fit.seed)


def _training_pixels(fit: Fit, reader: RowReader, steps: int) -> Iterator[Tensor]:
    """Yield batches of training images in [-1, 1]."""
    plan = Plan([(read_manifest(fit.source).splits["train"], 1.0)], 1, 4, fit.batch, fit.seed)
    for batch in local_batches(plan, reader, stop_batch=steps):
        yield batch.data["pixels"].float() / 127.5 - 1


def _held_out(fit: Fit, reader: RowReader) -> Tensor:
    """Return validation images, or where there are none, training images: uint8 (n, 3, H, W), not mirrored
    anew at each call."""
    splits = read_manifest(fit.source).splits
    split = splits["val"] if splits["val"].rows else splits["train"]
    (batch,) = split_batches(reader, [split], HELD_OUT, min(HELD_OUT, split.rows))
    return batch.data["pixels"]
