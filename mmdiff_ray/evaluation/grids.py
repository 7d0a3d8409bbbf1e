"""Grids of pictures for people: samples with all modalities side by side, answers beside truth and rule.

A grid is a table of square cells on white. Small pictures are enlarged pixel by pixel, so that 16 x 16 stays
crisp; what is no picture (labels, captions, embeddings, what a row lacks) becomes one in `tiles`. Every
measure on a page grows with its cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from PIL import Image, ImageDraw

from mmdiff_ray.evaluation import tiles

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
"""The colours of the notes that say what a panel is; any other note is grey."""
TITLE_LINES, NAME_LINES = 5, 3
"""How many lines a panel's title and a sample's name may take; the rest of them is cut off."""


@dataclass(frozen=True)
class Panel:
    """One column of a grid (or row): a title and one picture per sample.

    pictures: uint8 (n, h, w, 3). note: "given", "generated", "truth", "trivial rule" or any other word;
    neighbours with the same note stand under one heading. captions: one text per picture, printed below it,
    or none.
    """

    title: str
    pictures: np.ndarray
    note: str = ""
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class _Head:
    """What stands over a column or beside a row. lines: the text, wrapped; strong: a panel's title."""

    lines: list[str]
    note: str
    strong: bool


@dataclass(frozen=True)
class _Cell:
    picture: np.ndarray
    caption: str


def grid(
    panels: Sequence[Panel],
    title: str = "",
    subtitle: str = "",
    *,
    across: str = "columns",
    names: Sequence[str] = (),
    blocks: int = 1,
    cell_px: int = 96,
) -> Image.Image:
    """Return panels of n samples each as one picture.

    across: "columns" makes each panel a column and each sample a row; "rows" the other way round. names: one
    text per sample, beside its row (over its column). blocks: into how many tables, side by side, the samples
    are dealt. cell_px: the size of a cell before `cell_size`. Raises ValueError where counts or shapes
    differ.
    """
    count = _check(panels, names)
    if across not in ("columns", "rows"):
        raise ValueError(f"across must be columns or rows; got {across!r}")
    cell = cell_size(panels, cell_px)
    parts = np.array_split(np.arange(count), max(1, min(blocks, count)))
    tables = [_Table(panels, names, part.tolist(), across, cell) for part in parts]
    head = max(table.head for table in tables)
    return _page([table.draw(head) for table in tables], title, subtitle, cell)


def mosaic(
    panel: Panel, title: str = "", subtitle: str = "", *, columns: int = 0, cell_px: int = 96
) -> Image.Image:
    """Return one panel's pictures in lines of `columns`, by default in about a square.

    The title is the panel's unless given. Raises ValueError as `grid` does.
    """
    count = _check([panel], ())
    columns = columns or math.ceil(math.sqrt(count))
    blank = Panel("", panel.pictures, "", panel.captions)
    cell = cell_size([panel], cell_px)
    lines = [
        _Table([blank], (), range(start, min(start + columns, count)), "rows", cell)
        for start in range(0, count, columns)
    ]
    whole = stack([line.draw(line.head) for line in lines], gap=_gap(cell))
    return _page([whole], title or panel.title, subtitle, cell)


def stack(pages: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Return pages one below the other on white, `gap` pixels apart."""
    height = sum(page.height for page in pages) + gap * (len(pages) - 1)
    whole = Image.new("RGB", (max(page.width for page in pages), height), PAPER)
    top = 0
    for page in pages:
        whole.paste(page, (0, top))
        top += page.height + gap
    return whole


def cell_size(panels: Sequence[Panel], cell_px: int) -> int:
    """Return the multiple of the smallest pictures' longer side that is nearest to cell_px.

    So each of their pixels becomes a square of whole pixels. cell_px itself where pictures are over twice as
    large.
    """
    side = min(max(panel.pictures.shape[1:3]) for panel in panels)
    return math.floor(cell_px / side + 0.5) * side or cell_px


class _Table:
    """A table of some samples: rows of cells, with a head for each column and each row."""

    def __init__(
        self, panels: Sequence[Panel], names: Sequence[str], samples: Sequence[int], across: str, cell: int
    ) -> None:
        self.cell, self.unit, self.gap = cell, _unit(cell), _gap(cell)
        self.points, self.small = round(12.5 * self.unit), round(11 * self.unit)
        lines = [[_Cell(p.pictures[i], p.captions[i] if p.captions else "") for i in samples] for p in panels]
        titles = [(panel.title, panel.note, True) for panel in panels]
        labels = [(names[i] if names else "", "", False) for i in samples]
        if across == "columns":
            lines, titles, labels = [list(row) for row in zip(*lines, strict=True)], labels, titles
        self.rows = lines
        self.columns = [self._head(*label, width=cell + 0.5 * self.gap) for label in labels]
        self.names = [self._head(*title, width=1.6 * cell) for title in titles]
        self.lefts = self._lefts()
        self.head = self._head_height()

    def draw(self, head: int) -> Image.Image:
        """Return the table as a picture without margins. head: the height kept for the columns' heads."""
        heights = [self._row_height(row) for row in self.rows]
        height = round(head + sum(heights) + self.gap * (len(heights) - 1))
        page = Image.new("RGB", (self.lefts[-1] + self.cell + 1, height + 1), PAPER)
        draw = ImageDraw.Draw(page)
        self._write_notes(draw)
        self._write_titles(draw, head)
        top = float(head)
        for row, name, row_height in zip(self.rows, self.names, heights, strict=True):
            self._write_name(draw, name, top)
            for left, cell in zip(self.lefts, row, strict=True):
                self._put(page, draw, cell, left, top)
            top += row_height + self.gap
        return page

    def _head(self, text: str, note: str, strong: bool, *, width: float) -> _Head:
        most = TITLE_LINES if strong else NAME_LINES
        return _Head(tiles.wrap(text, self.points, width, most, bold=strong), note, strong)

    def _lefts(self) -> list[int]:
        """Return where each column begins: after the rows' names, with wider gaps between notes."""
        widths = [
            tiles.text_width(line, self.points, bold=name.strong)
            for name in self.names
            for line in name.lines
        ]
        widths += [tiles.text_width(name.note, self.small) for name in self.names]
        left = round(max(widths) + 1.5 * self.gap) if max(widths) else 1  # 1: the frame
        lefts = [left]
        for before, after in pairwise(self.columns):
            left += self.cell + self.gap * (1 if before.note == after.note else 3)
            lefts.append(left)
        return lefts

    def _head_height(self) -> int:
        notes = tiles.line_height(self.small) + self.gap if any(column.note for column in self.columns) else 0
        lines = max(len(column.lines) for column in self.columns)
        return 1 + round(notes + (lines * tiles.line_height(self.points) + 0.75 * self.gap if lines else 0))

    def _row_height(self, row: Sequence[_Cell]) -> int:
        lines = max(len(self._caption(cell)) for cell in row)
        return round(self.cell + (lines * tiles.line_height(self.small) + 0.5 * self.gap if lines else 0))

    def _caption(self, cell: _Cell) -> list[str]:
        return tiles.wrap(cell.caption, self.small, self.cell + 0.5 * self.gap, 2)

    def _write_notes(self, draw: ImageDraw.ImageDraw) -> None:
        """Write each note once over its columns, with a line that spans them."""
        below = tiles.line_height(self.small) + 0.2 * self.gap
        for note, run in groupby(zip(self.columns, self.lefts, strict=True), key=lambda pair: pair[0].note):
            lefts = [left for _, left in run]
            if note:
                right = lefts[-1] + self.cell
                colour = NOTES.get(note, MUTED)
                tiles.write(draw, ((lefts[0] + right) / 2, 0), [note], self.small, colour)
                line = (lefts[0], round(below), right - 1, round(below + 1.5 * self.unit))
                draw.rectangle(line, fill=colour)

    def _write_titles(self, draw: ImageDraw.ImageDraw, head: int) -> None:
        for column, left in zip(self.columns, self.lefts, strict=True):
            top = head - 0.6 * self.gap - len(column.lines) * tiles.line_height(self.points)
            at, colour = (left + self.cell / 2, top), INK if column.strong else MUTED
            tiles.write(draw, at, column.lines, self.points, colour, bold=column.strong)

    def _write_name(self, draw: ImageDraw.ImageDraw, name: _Head, top: float) -> None:
        right, height = self.lefts[0] - 1.5 * self.gap, len(name.lines) * tiles.line_height(self.points)
        top += (self.cell - height - (tiles.line_height(self.small) if name.note else 0)) / 2
        colour, note_colour = INK if name.strong else MUTED, NOTES.get(name.note, MUTED)
        tiles.write(draw, (right, top), name.lines, self.points, colour, bold=name.strong, side="r")
        tiles.write(draw, (right, top + height), [name.note], self.small, note_colour, side="r")

    def _put(self, page: Image.Image, draw: ImageDraw.ImageDraw, cell: _Cell, left: int, top: float) -> None:
        page.paste(tiles.fit(cell.picture, self.cell), (left, round(top)))
        frame = (left - 1, round(top) - 1, left + self.cell, round(top) + self.cell)
        draw.rectangle(frame, outline=LINE, width=1)
        at = (left + self.cell / 2, top + self.cell + 0.4 * self.gap)
        tiles.write(draw, at, self._caption(cell), self.small, MUTED)


def _page(bodies: Sequence[Image.Image], title: str, subtitle: str, cell: int) -> Image.Image:
    """Return tables side by side under a heading, with margins."""
    unit = _unit(cell)
    margin, space = round(28 * unit), round(44 * unit)
    width = max(sum(body.width for body in bodies) + space * (len(bodies) - 1), round(300 * unit))
    heading = _heading(title, subtitle, width, unit)
    height = heading.height + max(body.height for body in bodies)
    page = Image.new("RGB", (width + 2 * margin, height + 2 * margin), PAPER)
    page.paste(heading, (margin, margin))
    left = margin
    for body in bodies:
        page.paste(body, (left, margin + heading.height))
        left += body.width + space
    return page


def _heading(title: str, subtitle: str, width: int, unit: float) -> Image.Image:
    large, small = round(19 * unit), round(12 * unit)
    titles = tiles.wrap(title, large, width, 3, bold=True)
    subtitles = tiles.wrap(subtitle, small, width, 4)
    between = 4 * unit if titles and subtitles else 0
    height = len(titles) * tiles.line_height(large) + between + len(subtitles) * tiles.line_height(small)
    heading = Image.new("RGB", (width, round(height + 18 * unit) if height else 1), PAPER)
    draw = ImageDraw.Draw(heading)
    tiles.write(draw, (0, 0), titles, large, INK, bold=True, side="l")
    below = len(titles) * tiles.line_height(large) + between
    tiles.write(draw, (0, below), subtitles, small, MUTED, side="l")
    return heading


def _check(panels: Sequence[Panel], names: Sequence[str]) -> int:
    """Return the number of samples. Raises ValueError where panels, captions and names do not fit."""
    if not panels or not len(panels[0].pictures):
        raise ValueError("a grid needs a panel with at least one picture")
    count = len(panels[0].pictures)
    for panel in panels:
        got = panel.pictures
        if got.dtype != np.uint8 or got.ndim != 4 or got.shape[-1] != 3:
            raise ValueError(
                f"{panel.title!r}: pictures must be uint8 (n, h, w, 3); got {got.dtype} {got.shape}"
            )
        if len(got) != count or len(panel.captions) not in (0, count):
            raise ValueError(
                f"{panel.title!r}: {len(got)} pictures, {len(panel.captions)} captions; want {count} of each"
            )
    if len(names) not in (0, count):
        raise ValueError(f"{len(names)} names for {count} samples")
    return count


def _unit(cell: int) -> float:
    """Return the scale of letters and margins: 1 for cells of 96 pixels."""
    return max(0.75, cell / 96)


def _gap(cell: int) -> int:
    return round(9 * _unit(cell))
