"""Figures by matplotlib: grids of panels, labels that do not overlap, SVG for a page.

The only module that makes figures: it draws without a display, and its SVG needs neither a script library nor
a network.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

Size = tuple[float, float]
"""Width and height in inches."""
POINTS = 8.5
"""Font size of labels at points, lines and rows."""
OFFSETS = sorted(product((0, 1, -1, 2, -2, 3, -3), repeat=2), key=lambda step: abs(step[0]) + abs(step[1]))
"""Where a label may lie around its point, in steps of its own width and height, the nearest first."""


def panels(count: int, columns: int, size: Size) -> tuple[Any, list[Any]]:
    """Return a figure and its `count` axes, row by row. size: of one panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for panel in axes[:count]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
        panel.set_axisbelow(True)
    return figure, axes[:count]


def colored(shares: np.ndarray, colors: str = "viridis") -> np.ndarray:
    """Return numbers from 0 to 1 in a colour map, uint8 (..., 3)."""
    from matplotlib import colormaps

    return colormaps[colors](shares, bytes=True)[..., :3]


def legend_above(figure: Any, colors: Mapping[str, str]) -> None:
    """Write one legend above all panels. colors: label -> colour."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, marker="o", linewidth=2, label=label) for label, c in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9)


def log_scale(axes: Any, which: str = "x") -> None:
    """Make the x or the y axis logarithmic, with few ticks in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def save_png(figure: Any, path: Path, title: str = "") -> Path:
    """Save a figure as a PNG file and return the file. title: written above all panels."""
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=120, bbox_inches="tight" if title else None)
    return path


def to_svg(figure: Any, name: str) -> str:
    """Return a figure as an SVG element for a page that may hold several.

    An artist with the gid `KEY-VALUE` becomes an element with the attribute `data-KEY="VALUE"`. name: of the
    figure, different for each on a page.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # matplotlib's own, alike in every figure
    return re.sub(r' id="([a-z]+)-([^"]*)"', r' data-\1="\2"', svg)


def spread(centres: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Return new centres, in the same order and close to the old, at which boxes do not overlap.

    centres: in ascending order. All boxes lie between low and high if they fit.
    """
    below = [sum(heights[:at]) + height / 2 for at, height in enumerate(heights)]
    groups: list[list[float]] = []  # boxes that touch: where each wants the lower end of the lowest box
    for centre, under in zip(centres, below, strict=True):
        groups.append([centre - under])
        while len(groups) > 1 and mean(groups[-2]) > mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    starts = [max(low, min(mean(group), high - sum(heights))) for group in groups for _ in group]
    return [start + under for start, under in zip(starts, below, strict=True)]


def label_points(axes: Any, labels: Iterable[tuple[float, float, str]], points: Sequence[Size]) -> None:
    """Write labels beside points, each in the nearest place that is free of points and other labels.

    labels: x, y and text. points: x and y of everything drawn. Call it after all that changes the axes.
    """
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # distances depend on the layout
    unit = axes.figure.dpi / 72
    drawn = axes.transData.transform(points)
    taken = [Bbox([point - 4 * unit, point + 4 * unit]) for point in drawn]
    for x, y, text in labels:
        at = axes.transData.transform((x, y))
        width, height = (0.62 * POINTS * len(text) + 4) * unit, 1.3 * POINTS * unit
        boxes = [
            Bbox.from_bounds(at[0] + width * (right - 0.5), at[1] + height * (up - 0.5), width, height)
            for right, up in OFFSETS
        ]
        box = next((one for one in boxes if not any(one.overlaps(other) for other in taken)), boxes[1])
        taken.append(box)
        axes.annotate(
            text, (x, y), xytext=((box.p0 + box.p1) / 2 - at) / unit, textcoords="offset points",
            ha="center", va="center", fontsize=POINTS, color="0.25", zorder=1,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "shrinkA": 4, "shrinkB": 4},
        )  # fmt: skip
