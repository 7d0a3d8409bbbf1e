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


def draw_watched(values: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw what was seen of watched tasks: their losses, and how their gradients lie to each other.

    Returns the files: OUT-tasks.png, with a panel for every task that two methods were watched at, and
    OUT-conflict.png, with the cosine of every two tasks of the main method.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    watched, main = values["watched"], values["main"]
    if main not in watched:
        return []
    tasks = list(watched[main][0]["losses"])
    figure = Figure(figsize=(3.6 * len(tasks), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for method, points in watched.items():
            known = [(point["samples"], point["losses"][task]) for point in points if task in point["losses"]]
            if known:
                color, label = f"C{list(watched).index(method) % 10}", values["methods"][method]
                samples, losses = zip(*known, strict=True)
                x = [count / 1000 for count in samples]
                axes.plot(x, losses, marker="o", markersize=3, color=color, label=label)
        axes.set(title=task, xlabel="thousand samples seen", ylabel="held-out loss")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    handles = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    words = [str(label) for label in handles]
    figure.legend(list(handles.values()), words, loc="outside lower center", ncols=2, fontsize=8)
    files = [out.with_name(f"{out.stem}-tasks.png")]
    figure.savefig(files[0], dpi=110)
    if watched[main][0]["cosines"]:
        files.append(out.with_name(f"{out.stem}-conflict.png"))
        _draw_conflict(watched[main], tasks, files[1])
    return files


def _draw_conflict(points: list[dict[str, Any]], tasks: list[str], path: Path) -> None:
    """Draw the cosine of the gradients of every two tasks over training, one line each."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    pairs = list(points[0]["cosines"])
    for index, pair in enumerate(pairs):
        y = [float("nan") if point["cosines"][pair] is None else point["cosines"][pair] for point in points]
        x = [point["samples"] for point in points]
        color = colormaps["tab20"](index % 20)
        axes.plot(x, y, marker="o", markersize=3, color=color, label=pair.replace("~", " and "))
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set(
        title="Gradients of two tasks in the shared backbone",
        xlabel="samples seen",
        ylabel="cosine (below 0: they conflict)",
        ylim=(-1, 1),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
