"""What the pictures of a sweep are made of: pairs of figures, of plotly and of matplotlib."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
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


def page_of(title: str, x: str, y: str, **more: Any) -> Any:
    """Return a figure of plotly. x, y: the words of its axes."""
    import plotly.graph_objects as go

    page = go.Figure()
    page.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", **more)
    return page


def file_name(name: str) -> str:
    """Return a name as part of a file's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)
