"""Grids of pictures: samples with all modalities side by side, predictions next to truth and trivial rule.

A grid is a table of square cells on white. Small pictures are enlarged pixel by pixel, so that 16 x 16 stays
crisp; labels, captions and embeddings become pictures in `tiles`. All lengths on a page scale with its cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from mmdiff_ray.evaluation import tiles
from mmdiff_ray.modalities.base import Modality

PAPER: tiles.Colour = (255, 255, 255)
INK: tiles.Colour = (31, 41, 55)
MUTED: tiles.Colour = (107, 114, 128)
LINE: tiles.Colour = (218, 222, 229)
NOTES: dict[str, tiles.Colour] = {
    "given": (52, 103, 190),
    "generated": (16, 138, 104),
    "truth": (88, 99, 118),
    "trivial rule": (196, 122, 28),
}
"""Colours of a panel's notes; any other note is grey."""
TITLE_LINES, NAME_LINES = 5, 3
"""Maximum number of lines of a panel's title and of a sample's name; longer text is cut."""
CELL_PX = 96


@dataclass(frozen=True)
class Panel:
    """One column of a grid: a title and one picture per sample.

    pictures: uint8 (n, h, w, 3). note: a key of `NOTES` or any text; adjacent panels with equal notes share
    one heading.
    """

    title: str
    pictures: np.ndarray
    note: str = ""

    @classmethod
    def of(cls, modality: Modality, title: str, data: Tensor, note: str) -> "Panel":
        """Return a modality's data (n, ...) as a panel."""
        pictures = modality.picture(data)
        if isinstance(pictures, list):
            pictures = np.stack([tiles.text_tile(text) for text in pictures])
        return cls(title, pictures, note)


def grid(
    panels: Sequence[Panel],
    title: str = "",
    subtitle: str = "",
    *,
    names: Sequence[str] = (),
    blocks: int = 1,
) -> Image.Image:
    """Return panels of n samples each as one picture: a column per panel, a row per sample.

    names: one text per sample, beside its row. blocks: number of tables, side by side, that share the
    samples. Raises ValueError where counts or shapes differ.
    """
    count = _check(panels)
    if len(names) not in (0, count):
        raise ValueError(f"{len(names)} names for {count} samples")
    cell, heads = cell_size(panels), [(panel.title, panel.note) for panel in panels]
    bodies = []
    for samples in np.array_split(np.arange(count), max(1, min(blocks, count))):
        rows = [[panel.pictures[index] for panel in panels] for index in samples]
        bodies.append(_table(rows, heads, [names[index] if names else "" for index in samples], cell))
    return _page(bodies, title, subtitle, cell)


def mosaic(panel: Panel) -> Image.Image:
    """Return one panel's pictures in about a square, under its title. Raises ValueError as `grid` does."""
    columns, cell = math.ceil(math.sqrt(_check([panel]))), cell_size([panel])
    rows = [list(panel.pictures[start : start + columns]) for start in range(0, len(panel.pictures), columns)]
    body = _table(rows, [("", "")] * columns, [""] * len(rows), cell)
    return _page([body], panel.title, "", cell)


def cell_size(panels: Sequence[Panel]) -> int:
    """Return the multiple of the smallest pictures' longer side that is nearest to CELL_PX.

    A multiple scales each pixel to a whole square. Returns CELL_PX if pictures are over twice as large.
    """
    side = min(max(panel.pictures.shape[1:3]) for panel in panels)
    return math.floor(CELL_PX / side + 0.5) * side or CELL_PX


def _table(
    rows: Sequence[Sequence[np.ndarray]], heads: Sequence[tuple[str, str]], names: Sequence[str], cell: int
) -> Image.Image:
    """Return rows of pictures with names beside them, under the columns' (title, note), without margins."""
    unit, gap = _unit(cell), _gap(cell)
    points, small = round(12.5 * unit), round(11 * unit)
    titles = [tiles.wrap(title, points, cell + 0.5 * gap, TITLE_LINES, bold=True) for title, _ in heads]
    labels = [tiles.wrap(name, points, 1.6 * cell, NAME_LINES) for name in names]
    names_width = max((tiles.text_width(line, points) for lines in labels for line in lines), default=0)
    lefts = [round(names_width + 1.5 * gap) if names_width else 1]  # 1: the frame
    for (_, before), (_, after) in pairwise(heads):
        lefts.append(lefts[-1] + cell + gap * (1 if before == after else 3))
    title_lines = max(len(lines) for lines in titles)
    head = tiles.line_height(small) + gap if any(note for _, note in heads) else 0.0
    head += title_lines * tiles.line_height(points) + 0.75 * gap if title_lines else 0
    top = 1 + round(head)
    height = top + len(rows) * cell + (len(rows) - 1) * gap + 1
    page = Image.new("RGB", (lefts[-1] + cell + 1, height), PAPER)
    draw = ImageDraw.Draw(page)
    _write_notes(draw, [note for _, note in heads], lefts, cell)
    for left, lines in zip(lefts, titles, strict=True):
        above = top - 0.6 * gap - len(lines) * tiles.line_height(points)
        tiles.write(draw, (left + cell / 2, above), lines, points, INK, bold=True)
    for row, lines in zip(rows, labels, strict=True):
        middle = top + (cell - len(lines) * tiles.line_height(points)) / 2
        tiles.write(draw, (lefts[0] - 1.5 * gap, middle), lines, points, MUTED, side="r")
        for left, picture in zip(lefts, row, strict=False):
            page.paste(tiles.fit(picture, cell), (left, top))
            draw.rectangle((left - 1, top - 1, left + cell, top + cell), outline=LINE, width=1)
        top += cell + gap
    return page


def _write_notes(draw: ImageDraw.ImageDraw, notes: Sequence[str], lefts: Sequence[int], cell: int) -> None:
    """Write each note once over its columns, with a line that spans them."""
    unit, gap = _unit(cell), _gap(cell)
    small = round(11 * unit)
    below = tiles.line_height(small) + 0.2 * gap
    for note, run in groupby(zip(notes, lefts, strict=True), key=lambda pair: pair[0]):
        columns = [left for _, left in run]
        if note:
            right, colour = columns[-1] + cell, NOTES.get(note, MUTED)
            tiles.write(draw, ((columns[0] + right) / 2, 0), [note], small, colour)
            draw.rectangle((columns[0], round(below), right - 1, round(below + 1.5 * unit)), fill=colour)


def _page(bodies: Sequence[Image.Image], title: str, subtitle: str, cell: int) -> Image.Image:
    """Return tables side by side under a heading, with margins."""
    unit = _unit(cell)
    margin, space = round(28 * unit), round(44 * unit)
    large, small = round(19 * unit), round(12 * unit)
    width = max(sum(body.width for body in bodies) + space * (len(bodies) - 1), round(300 * unit))
    titles = tiles.wrap(title, large, width, 3, bold=True)
    subtitles = tiles.wrap(subtitle, small, width, 4)
    below = len(titles) * tiles.line_height(large) + (4 * unit if titles and subtitles else 0)
    heading = below + len(subtitles) * tiles.line_height(small)
    top = margin + (round(heading + 18 * unit) if heading else 1)
    height = top + max(body.height for body in bodies) + margin
    page = Image.new("RGB", (width + 2 * margin, height), PAPER)
    draw = ImageDraw.Draw(page)
    tiles.write(draw, (margin, margin), titles, large, INK, bold=True, side="l")
    tiles.write(draw, (margin, margin + below), subtitles, small, MUTED, side="l")
    left = margin
    for body in bodies:
        page.paste(body, (left, top))
        left += body.width + space
    return page


def _check(panels: Sequence[Panel]) -> int:
    """Return the number of samples. Raises ValueError where panels do not fit together."""
    if not panels or not len(panels[0].pictures):
        raise ValueError("a grid needs a panel with at least one picture")
    count = len(panels[0].pictures)
    for panel in panels:
        got = panel.pictures
        if got.dtype != np.uint8 or got.ndim != 4 or got.shape[-1] != 3:
            raise ValueError(
                f"{panel.title!r}: pictures must be uint8 (n, h, w, 3); got {got.dtype} {got.shape}"
            )
        if len(got) != count:
            raise ValueError(f"{panel.title!r}: {len(got)} pictures; want {count}")
    return count


def _unit(cell: int) -> float:
    """Return the scale of letters and margins: 1 for cells of 96 pixels."""
    return max(0.75, cell / 96)


def _gap(cell: int) -> int:
    return round(9 * _unit(cell))
