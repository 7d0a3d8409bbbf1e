"""What the pictures of a sweep are made of: pairs of figures, of plotly and of matplotlib."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from mmdiff_ray.config import Config

SIZE = (9.0, 5.0)
"""Inches of a PNG."""


@dataclass(frozen=True)
class Drawn:
    """A picture. html: plotly's figure; png: matplotlib's."""

    name: str
    title: str
    html: Any
    png: Any


def short(keys: Sequence[str]) -> dict[str, str]:
    """Return key -> its last parts, two or more, as few as tell all keys apart.

    None begins with the name of a configuration's section that it is not in: the end `modalities.alpha` of
    `loss.modalities.alpha` would be read as a modality. What is a modality's or a task's keeps its name.
    """
    sections = {field.name for field in dataclasses.fields(Config)}
    names = {}
    for key in keys:
        parts = key.split(".")
        least = len(parts) - 1 if parts[0] in ("modalities", "tasks") else 2
        ends = (parts[-count:] for count in range(least, len(parts)) if parts[-count] not in sections)
        names[key] = next((end for end in map(".".join, ends) if _tells(end, keys)), key)
    return names


def _tells(end: str, keys: Sequence[str]) -> bool:
    return sum(f".{key}".endswith(f".{end}") for key in keys) == 1


def axes_of(title: str, **words: Any) -> tuple[Any, Any]:
    """Return a figure of matplotlib with its axes."""
    figure, ((axes,),) = panels_of("", 1, 1)
    axes.set(title=title, **words)
    return figure, axes


def panels_of(title: str, rows: int, columns: int, size: tuple[float, float] = SIZE) -> tuple[Any, Any]:
    """Return a figure of matplotlib with its axes, of shape (rows, columns). size: of all, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return figure, panels


def spread(centres: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Return where things of such heights lie without overlap, in their order, near where they are wanted.

    centres: where they are wanted, the lowest first. All lie between low and high where there is room.
    """
    below = [sum(heights[:at]) + height / 2 for at, height in enumerate(heights)]
    groups: list[list[float]] = []  # of things that touch: where each wants the lowest thing's lower end
    for centre, under in zip(centres, below, strict=True):
        groups.append([centre - under])
        while len(groups) > 1 and mean(groups[-2]) > mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    starts = [max(low, min(mean(group), high - sum(heights))) for group in groups for _ in group]
    return [start + under for start, under in zip(starts, below, strict=True)]


def name_points(axes: Any, named: Sequence[tuple[float, float, str]], points: Any, color: str) -> None:
    """Write names beside points, each at the first place around its own that no point and no name takes.

    named: x, y and name; points: (N, 2), all that are drawn. What changes the axes must have been done.
    """
    axes.figure.draw_without_rendering()  # the layout, on which distances depend
    scale = axes.figure.dpi / 72
    drawn = axes.transData.transform(points) / scale
    taken = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in drawn]
    for x, y, name in named:
        at = axes.transData.transform((x, y)) / scale
        width = 5.2 * len(name)
        boxes = [Box(at[0] + dx - width / 2, at[1] + dy - 4.5, at[0] + dx + width / 2, at[1] + dy + 4.5)
                 for dx, dy in _around(width)]  # fmt: skip
        box = next((one for one in boxes if not any(one.meets(other) for other in taken)), boxes[0])
        taken.append(box)
        moved = (box.left + width / 2 - at[0], box.low + 4.5 - at[1])
        far = math.hypot(moved[0], moved[1]) > 14 + width / 2
        axes.annotate(
            name, (x, y), xytext=moved, textcoords="offset points", ha="center", va="center_baseline",
            color=color, fontsize=8,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 3} if far else None,
        )  # fmt: skip


def _around(width: float) -> Iterator[tuple[float, float]]:
    """Return places around a point in points, the nearest first."""
    for ring in range(1, 5):
        for angle in (45, 135, -45, -135, 0, 180, 90, -90, 20, 160, -20, -160, 70, 110, -70, -110):
            turn = math.radians(angle)
            yield (6 * ring + width / 2) * math.cos(turn) * 1.1, (1 + 8 * ring) * math.sin(turn)


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    low: float
    right: float
    high: float

    def meets(self, other: "Box") -> bool:
        """Return whether two rectangles overlap."""
        beside = self.right <= other.left or other.right <= self.left
        return not beside and self.low < other.high and other.low < self.high


def page_of(title: str, x: str, y: str, **more: Any) -> Any:
    """Return a figure of plotly. x, y: the words of its axes."""
    import plotly.graph_objects as go

    page = go.Figure()
    page.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", **more)
    return page


def file_name(name: str) -> str:
    """Return a name as part of a file's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)
