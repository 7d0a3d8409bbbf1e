"""Images with a hole, made on the fly from an image: the condition of restoration, only given or absent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdiff_ray.config import ConfigError, ModalityConfig
from mmdiff_ray.modalities.base import Modality, RowContext
from mmdiff_ray.modalities.image import draw, fitted, open_image, resized, to_float
from mmdiff_ray.registry import register

HOLES = ("blocks", "half", "freeform", "scatter")


@dataclass(frozen=True)
class MaskedImageOptions(ModalityConfig):
    """The keys of a masked image.

    channels: where the code lies; by default in the channels of `pixels`, as in the paper.
    source: image that it is made from.
    holes: kinds of holes to draw from: blocks, half, freeform, scatter.
    ratio: smallest and largest share of the image that is missing. The kind half always hides one half.
    """

    channels: str = "pixels"
    source: str = "pixels"
    holes: list[str] = field(default_factory=lambda: list(HOLES))
    ratio: list[float] = field(default_factory=lambda: [0.1, 0.75])


@register("modality", "masked_image")
class MaskedImageModality(Modality):
    """Images with a hole. data: uint8 (B, 4, H, W), RGB that is 0 in the hole, and 255 where visible, 0 in
    the hole; code: (B, 3, H, W), standardised pixels, 0 in the hole; condition: code and visibility of +1
    and -1."""

    Options = MaskedImageOptions
    only_given = True
    shows_source = True
    code_channels = 3
    condition_channels = 4
    prediction_channels = 0
    code_mean: Tensor
    code_scale: Tensor

    def __init__(self, name: str, options: MaskedImageOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        if not options.holes or not set(options.holes) <= set(HOLES):
            raise ConfigError(
                f"modalities.{name}.holes: got {options.holes}, want some of {', '.join(HOLES)}"
            )
        if len(options.ratio) != 2 or not 0 < options.ratio[0] <= options.ratio[1] < 1:
            raise ConfigError(
                f"modalities.{name}.ratio: got {options.ratio}, want [least, most] between 0 and 1"
            )
        if min(size) < 2:
            raise ConfigError(
                f"modalities.{name}: got a space of {size} cells, want at least 2 x 2 for a hole"
            )
        missing = [0.5 if kind == "half" else sum(options.ratio) / 2 for kind in options.holes]
        self.visible_share = 1 - sum(missing) / len(missing)
        self.register_buffer("code_mean", torch.zeros(3))
        self.register_buffer("code_scale", torch.full((3,), 0.5))

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    @property
    def made_from(self) -> str | None:
        return self.options.source

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (4, *self.size)

    @property
    def data_type(self) -> type:
        return np.uint8

    def read(self, row: Mapping[str, Any], context: RowContext, done: Mapping[str, Any]) -> np.ndarray | None:
        image = done.get(self.options.source)
        if image is None:
            return None
        generator = context.generator(f"hole of {self.name}")
        kind = self.options.holes[generator.integers(len(self.options.holes))]
        hole = draw_hole(generator, kind, generator.uniform(*self.options.ratio), context.size)
        return with_hole(image, hole)

    def calibrate(self, data: Tensor) -> None:
        """Fix the visible pixels' mean, and the scale that gives the code, 0 in the holes, unit RMS."""
        visible = data[:, 3:] > 0
        pixels = to_float(data[:, :3]).double()
        count = visible.sum().clamp_min(1)
        mean = (pixels * visible).sum((0, 2, 3)) / count
        deviation = ((pixels - mean[:, None, None]) * visible).square().mean((0, 2, 3)).sqrt()
        self.code_mean.copy_(mean)
        self.code_scale.copy_(deviation.clamp_min(1e-2))

    def encode(self, data: Tensor) -> Tensor:
        code = (to_float(data[:, :3]) - self.code_mean[:, None, None]) / self.code_scale[:, None, None]
        return code * (data[:, 3:] > 0)

    def condition(self, data: Tensor) -> Tensor:
        return torch.cat([self.encode(data), (data[:, 3:] > 0) * 2.0 - 1.0], dim=1)

    def from_code(self, code: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is only ever given; its code is not decoded")

    def picture(self, data: Tensor) -> np.ndarray:
        """Return the visible pixels over a grey chequerboard."""
        pixels = data.permute(0, 2, 3, 1).cpu().numpy()
        height, width = pixels.shape[1:3]
        squares = (np.add.outer(np.arange(height), np.arange(width)) % 2)[None, :, :, None]
        board = np.where(squares, 205, 170).astype(np.uint8)
        return np.where(pixels[..., 3:] > 0, pixels[..., :3], board)

    def parse(self, text: str) -> np.ndarray:
        """Return the masked image in a picture with transparency, whose alpha below 1/2 is the hole, or in
        two pictures, `image,hole`, where white in the second is the hole."""
        path, _, hole_path = text.partition(",")
        picture, size = open_image(path, self.name), self.size[::-1]
        if hole_path:
            hole = fitted(open_image(hole_path, self.name), self.size)
            hole = hole.convert("L").resize(size, Image.Resampling.BOX)
            missing = np.asarray(hole) >= 128
            context = RowContext(self.size, seed=0, visit=0, row_id=0, backgrounds="white", flip=False)
            pixels = draw(resized(picture, self.size), context, self.name)
        else:
            shown = fitted(picture, self.size).convert("RGBA")
            array = np.asarray(shown.resize(size, Image.Resampling.BOX))
            missing, pixels = array[..., 3] < 128, array[..., :3].transpose(2, 0, 1)
        if not missing.any():
            raise ConfigError(
                f"{self.name}: {path} has no hole: no pixel of alpha 0, and no picture of a hole"
            )
        return with_hole(pixels, missing)

    def visible(self, data: Tensor) -> Tensor:
        return data[:, 3] > 0

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.png")
        Image.fromarray(data.permute(1, 2, 0).cpu().numpy()).save(path)
        return path


def with_hole(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Return uint8 (4, H, W) of an image (3, H, W) and a hole (H, W), True = missing."""
    visible = np.where(hole, 0, 255).astype(np.uint8)[None]
    return np.concatenate([np.where(hole[None], 0, image).astype(np.uint8), visible])


def draw_hole(generator: np.random.Generator, kind: str, ratio: float, size: tuple[int, int]) -> np.ndarray:
    """Return a hole, bool (H, W), never empty nor full: the ratio of all cells (half: a half of them).

    size: at least 2 x 2.
    """
    if kind == "half":
        return _half(generator, size)
    wanted = int(np.clip(round(ratio * size[0] * size[1]), 1, size[0] * size[1] - 1))
    if kind == "scatter":
        hole = np.zeros(size[0] * size[1], dtype=bool)
        hole[generator.permutation(hole.size)[:wanted]] = True
        return hole.reshape(size)
    shape = _blocks if kind == "blocks" else _strokes
    hole = np.zeros(size, dtype=bool)
    while (missing := wanted - int(hole.sum())) > 0:
        piece = shape(generator, size) & ~hole
        hole.flat[np.flatnonzero(piece)[:missing]] = True
    return hole


def _half(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return the upper, left, lower or right half."""
    hole = np.zeros(size, dtype=bool)
    side = generator.integers(4)
    middle = size[side % 2] // 2
    part = slice(0, middle) if side < 2 else slice(middle, None)
    hole[(part, slice(None)) if side % 2 == 0 else (slice(None), part)] = True
    return hole


def _blocks(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    piece = np.zeros(size, dtype=bool)
    height, width = (int(generator.integers(max(1, n // 6), max(2, n // 2) + 1)) for n in size)
    top, left = generator.integers(1 - height // 2, size[0]), generator.integers(1 - width // 2, size[1])
    piece[max(0, top) : top + height, max(0, left) : left + width] = True
    return piece


def _strokes(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return a brush stroke that wanders, bool (H, W)."""
    radius = max(generator.uniform(0.04, 0.1) * max(size), 0.7)
    turns = generator.uniform(-0.7, 0.7, int(generator.integers(4, 12)))
    angles = generator.uniform(0, 2 * np.pi) + turns.cumsum()
    steps = 1.2 * radius * np.stack([np.sin(angles), np.cos(angles)])
    y, x = np.clip(
        generator.random((2, 1)) * np.reshape(size, (2, 1)) + steps.cumsum(1), 0, np.reshape(size, (2, 1))
    )
    rows, columns = np.arange(size[0])[:, None], np.arange(size[1])[:, None]
    squared = ((rows - y) ** 2)[:, None] + (columns - x) ** 2
    return (squared <= radius**2).any(-1)
