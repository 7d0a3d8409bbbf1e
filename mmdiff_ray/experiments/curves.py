"""Figures of an experiment: a measured figure over what was varied, a line for every method."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RULE = "rule: "


def draw_curves(values: Mapping[str, Any], curves: list[dict[str, Any]], out: Path) -> list[Path]:
    """Draw each of the curves of a result that has points, beside `out`; return the files.

    curves: `name`, `title`, `figure`, `x` (the axis' label) and `points`: measure -> x.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    for curve in curves:
        lines = _lines(values, curve)
        if not lines:
            continue
        figure = Figure(figsize=(8, 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        styles = itertools.cycle(["--", ":", "-."])
        for method, points in lines.items():
            x, y, low, high = zip(*sorted(points), strict=True)
            style: dict[str, Any] = (
                {"linestyle": next(styles), "color": "0.5"} if method.startswith(RULE) else {}
            )
            (line,) = axes.plot(
                x, y, marker="o", markersize=4, label=values["methods"].get(method, method), **style
            )
            if not method.startswith(RULE):
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(title=curve["title"], xlabel=curve["x"], ylabel=curve["figure"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
        path = out.with_name(f"{out.stem}-{curve['name']}.png")
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _lines(
    values: Mapping[str, Any], curve: Mapping[str, Any]
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Return method -> points (x, mean, low, high) for methods measured at two places or more."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for line in values["figures"]:
        if line["figure"] == curve["figure"] and line["measure"] in curve["points"]:
            low, high = line.get("interval", (line["mean"], line["mean"]))
            x = float(curve["points"][line["measure"]])
            lines.setdefault(line["method"], []).append((x, line["mean"], low, high))
    return {method: points for method, points in lines.items() if len(points) > 1}
