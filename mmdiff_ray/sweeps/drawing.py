"""What the pictures of a sweep are made of: pairs of figures, of plotly and of matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """Return key -> its last parts, as few as tell all keys apart."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            if (sum(other == end or other.endswith("." + end) for other in keys) == 1 and count > 1) or (
                count == len(parts)
            ):
                names[key] = end
                break
    return names


def axes_of(title: str, **words: Any) -> tuple[Any, Any]:
    """Return a figure of matplotlib with its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, **words)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    return figure, axes


def page_of(title: str, x: str, y: str, **more: Any) -> Any:
    """Return a figure of plotly. x, y: the words of its axes."""
    import plotly.graph_objects as go

    page = go.Figure()
    page.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", **more)
    return page


def file_name(name: str) -> str:
    """Return a name as part of a file's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)
