"""Pictures of labels, captions and embeddings for a grid, and the text of grids."""

import colorsys
import functools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]


def text_tile(text: str, size: int = 192) -> np.ndarray:
    """Draw a text on a colour derived from it, uint8 (size, size, 3); blank for an empty text."""
    if not text.strip():
        return blank_tile(size)
    hue = zlib.crc32(text.encode()) % 360 / 360
    tile = Image.new("RGB", (size, size), _tint(hue, 0.92, 0.6))
    points, lines = _largest(text, size)
    top = size / 2 - len(lines) * line_height(points) / 2
    write(ImageDraw.Draw(tile), (size / 2, top), lines, points, _tint(hue, 0.27, 0.5), bold=True)
    return np.asarray(tile)


def vector_tile(vector: np.ndarray, size: int = 192) -> np.ndarray:
    """Draw a vector (D,) as a pattern of squares, uint8 (size, size, 3): blue below zero, orange above.

    Larger vectors are projected to 64 components by a fixed random projection, which roughly preserves
    angles: similar embeddings look similar. The norm is not visible.
    """
    values = vector.astype(np.float64)
    if len(values) > 64:
        values = np.random.default_rng(len(values)).normal(size=(64, len(values))) @ values
    values = values / max(float(np.sqrt(np.mean(values**2))), 1e-12)
    side = math.ceil(math.sqrt(len(values)))
    shades = np.zeros(side * side)
    shades[: len(values)] = np.tanh(values / 2)
    ends = np.where(shades[:, None] < 0, (64, 114, 178), (228, 132, 66))
    squares = np.rint(247 + (ends - 247) * np.abs(shades)[:, None]).astype(np.uint8)
    return np.asarray(fit(squares.reshape(side, side, 3), size))


def blank_tile(size: int = 192) -> np.ndarray:
    """Return the tile of missing data: a grey dash, uint8 (size, size, 3)."""
    tile = Image.new("RGB", (size, size), (246, 247, 249))
    middle, half, thick = size // 2, size // 12, max(1, size // 96)
    dash = (middle - half, middle - thick, middle + half, middle + thick)
    ImageDraw.Draw(tile).rectangle(dash, fill=(190, 196, 206))
    return np.asarray(tile)


def fit(picture: np.ndarray, cell: int) -> Image.Image:
    """Scale a picture uint8 (h, w, 3) to fit into a white square of `cell` pixels.

    Enlarges pixels to squares, with blended edges if the cell is not a multiple of the picture.
    """
    image = Image.fromarray(np.ascontiguousarray(picture))
    longer = max(image.size)
    enlarged = math.ceil(cell / longer)
    if enlarged > 1:
        image = image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.NEAREST)
    size = (max(1, round(picture.shape[1] * cell / longer)), max(1, round(picture.shape[0] * cell / longer)))
    if image.size != size:
        image = image.resize(size, Image.Resampling.BOX if enlarged > 1 else Image.Resampling.LANCZOS)
    if size == (cell, cell):
        return image
    square = Image.new("RGB", (cell, cell), (255, 255, 255))
    square.paste(image, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square


def wrap(text: str, points: int, width: float, most: int, *, bold: bool = False) -> list[str]:
    """Wrap a text at a width in pixels into at most `most` lines; cut the rest with an ellipsis."""
    font = _font(points, bold)
    lines: list[str] = []
    words = text.split()
    while words:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        if len(lines) == most - 1:
            return [*lines, _shorten(" ".join(words), font, width)]
        lines.append(_shorten(" ".join(words[:taken]), font, width))
        words = words[taken:]
    return lines


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    lines: Sequence[str],
    points: int,
    colour: Colour,
    *,
    bold: bool = False,
    side: str = "m",
) -> None:
    """Draw lines of text downwards from a point. side: "l", "m" or "r", the anchor of each line."""
    x, y = at
    for number, line in enumerate(lines):
        middle = y + (number + 0.5) * line_height(points)
        draw.text((x, middle), line, font=_font(points, bold), fill=colour, anchor=side + "m")


def text_width(text: str, points: int, *, bold: bool = False) -> float:
    """Return the width of a line in pixels."""
    return _font(points, bold).getlength(text)


def line_height(points: int) -> float:
    """Return the distance of lines in pixels."""
    return points * 1.3


@functools.cache
def _font(points: int, bold: bool) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans from matplotlib, which covers Latin, Greek, Cyrillic and arrows."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, points)


def _largest(text: str, size: int) -> tuple[int, list[str]]:
    """Return the largest font size at which the whole text fits into a square, and its lines."""
    room = size * 0.86
    lines: list[str] = []
    points = 6
    for points in range(max(7, size // 6), max(6, size // 16), -1):
        lines = wrap(text, points, room, max(1, int(room / line_height(points))), bold=True)
        if " ".join(lines) == " ".join(text.split()):
            break
    return points, lines


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text.rstrip() + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _tint(hue: float, light: float, strength: float) -> Colour:
    red, green, blue = colorsys.hls_to_rgb(hue, light, strength)
    return round(red * 255), round(green * 255), round(blue * 255)
