"""Picture files: opened upright, in 8 bits, cut to the size of the data set."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from mmdiff_ray.config import ConfigError, decoding
from mmdiff_ray.datasets.embedders import has_alpha
from mmdiff_ray.modalities.image import in_8_bits, in_memory, register_heif, upright

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
    *(".heic", ".heif"),
)
UNREADABLE = (OSError, ValueError)
"""What is raised, by `decoding`, for files that are truncated, corrupt, absurdly large or no pictures."""
FITS = ("crop", "pad", "stretch")
DEPTHS = ("refuse", "scale")


@dataclass(frozen=True)
class Picture:
    """A picture as people see it. raw_size: (width, height) in the file; turn: what made it upright."""

    image: Image.Image
    raw_size: tuple[int, int]
    turn: Image.Transpose | None

    def annotation(self, drawn: Image.Image, what: str = "mask") -> Image.Image:
        """Return a mask or map turned like the picture, where it has the size of the file's own pixels.

        Raises ValueError for one of another size.
        """
        if self.turn is not None and drawn.size == self.raw_size:
            drawn = drawn.transpose(self.turn)
        if drawn.size != self.image.size:
            (width, height), (w, h) = self.image.size, drawn.size
            raise ValueError(f"its {what} has {w}x{h} pixels, the picture {width}x{height}")
        return drawn


@dataclass(frozen=True)
class Frame:
    """What pictures and masks become: height x width pixels; fit: crop (the middle), pad or stretch."""

    height: int
    width: int
    fit: str = "crop"

    def __call__(self, image: Image.Image, method: Image.Resampling, fill: int = 0) -> Image.Image:
        """Return an image in this size. fill: the value of added borders."""
        size = (self.width, self.height)
        if self.fit == "stretch":
            return image.resize(size, method)
        if self.fit == "crop":
            return ImageOps.fit(image, size, method)
        inside = ImageOps.contain(image, size, method)
        framed = Image.new(image.mode, size, fill if image.mode in ("L", "P", "I;16", "I") else 0)
        framed.paste(inside, ((size[0] - inside.width) // 2, (size[1] - inside.height) // 2))
        return framed


def make_frame(size: str, fit: str) -> Frame:
    """Return the frame of an option's text: `64`, or HEIGHTxWIDTH. Raises ConfigError for other text."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if not found:
        raise ConfigError(f"size: got {size!r}, want pixels a side (64) or HEIGHTxWIDTH (48x64)")
    height, width = int(found[1]), int(found[2] or found[1])
    if min(height, width) < 8:
        raise ConfigError(f"size ({size}) must be at least 8")
    if fit not in FITS:
        raise ConfigError(f"fit: got {fit!r}, want one of {', '.join(FITS)}")
    return Frame(height, width, fit)


def open_picture(file: Path | BinaryIO, depth: str = "refuse") -> Picture:
    """Return a picture in RGB or RGBA, turned upright. Raises one of UNREADABLE if it cannot be decoded.

    depth: scale brings 16-bit values to 0 to 255, and floats from [0, 1]; refuse raises ValueError for them.
    """
    if isinstance(file, Path):
        register_heif(file)
    with decoding(), Image.open(in_memory(file) if isinstance(file, Path) else file) as image:
        if image.mode[0] in "IF" and depth == "refuse":
            named = file if isinstance(file, Path) else "it"
            raise ValueError(
                f"{named} has more than 8 bits a channel (mode {image.mode}); scale it with depth=scale"
            )
        turned, turn = upright(in_8_bits(image))
        return Picture(turned.convert("RGBA" if has_alpha(turned) else "RGB"), image.size, turn)


def is_transparent(file: Path) -> bool:
    """Return whether a picture has a pixel that is not opaque; False for an unreadable one."""
    try:
        register_heif(file)
        with decoding(), Image.open(file) as image:
            return has_alpha(image) and int(np.asarray(image.convert("RGBA"))[..., 3].min()) < 255
    except UNREADABLE:
        return False
