"""Figures of an experiment: a measured figure over what was varied, a line for every method."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdiff_ray.experiments.files import beside
from mmdiff_ray.experiments.looks import POINTS, RULE, direction, label_ends, looks, numbered, wrapped
from mmdiff_ray.sweeps.drawing import panels_of

Point = tuple[float, float, float, float]
"""x, mean, and the ends of its interval."""


def draw_curves(values: Mapping[str, Any], curves: list[dict[str, Any]], out: Path) -> list[Path]:
    """Draw each of the curves of a result that has points, beside `out`; return the files.

    curves: `name`, `title`, `figure`, `x` and `y` (the words of the axes) and `points`: measure -> x.
    """
    return [_draw_curve(values, curve, lines, out) for curve in curves if (lines := _lines(values, curve))]


def _draw_curve(
    values: Mapping[str, Any], curve: Mapping[str, Any], lines: Mapping[str, list[Point]], out: Path
) -> Path:
    figure, ((axes,),) = panels_of("", 1, 1, (11, 7.2))
    known, ends = looks(values), []
    methods = [name for name in known if name in lines]
    step = 0.03 * (max(curve["points"].values()) - min(curve["points"].values())) / len(methods)
    for at, name in enumerate(methods):
        x, y, low, high = zip(*sorted(lines[name]), strict=True)
        look = known[name]
        x = tuple(one + step * (at - len(methods) / 2) for one in x)  # so that intervals stand side by side
        axes.plot(
            x, y, marker=look.marker, markersize=look.size, color=look.color, linestyle=look.line,
            linewidth=look.width, zorder=3 if look.is_main else 2,
        )  # fmt: skip
        if not name.startswith(RULE):
            axes.vlines(x, low, high, color=look.color, linewidth=1)
        ends.append((x[-1], y[-1], look))
    better = next(line["better"] for line in values["figures"] if line["figure"] == curve["figure"])
    y_words = f"{curve.get('y', curve['figure'])} ({direction(better)})"
    axes.set(title=f"{curve['title']} (bars: 95 % intervals)", xlabel=curve["x"], ylabel=y_words)
    label_ends(axes, ends)
    path = beside(out, f"-{curve['name']}.png")
    figure.savefig(path, dpi=120)
    return path


def _lines(values: Mapping[str, Any], curve: Mapping[str, Any]) -> dict[str, list[Point]]:
    """Return method -> points for methods measured at two places or more."""
    lines: dict[str, list[Point]] = {}
    for line in values["figures"]:
        if line["figure"] == curve["figure"] and line["measure"] in curve["points"]:
            low, high = line.get("interval", (line["mean"], line["mean"]))
            x = float(curve["points"][line["measure"]])
            lines.setdefault(line["method"], []).append((x, line["mean"], low, high))
    return {method: points for method, points in lines.items() if len(points) > 1}


def draw_watched(values: Mapping[str, Any], words: Mapping[str, str], out: Path) -> list[Path]:
    """Draw what was seen of watched tasks: their losses, and how their gradients lie to each other.

    words: task -> its words. Returns the files: OUT-tasks.png, with a panel for every task compared, and
    OUT-conflict.png, with the cosine of the main method's gradients of every two of its tasks.
    """
    watched, main = values["watched"], values["main"]
    if main not in watched:
        return []
    compared, own = shown_tasks(watched, main)
    files = [beside(out, "-tasks.png")]
    _draw_tasks(values, {task: words.get(task, task) for task in compared}, files[0])
    if watched[main][0]["cosines"]:
        files.append(beside(out, "-conflict.png"))
        _draw_conflict(watched[main], {task: words.get(task, task) for task in own}, files[1])
    return files


def shown_tasks(watched: Mapping[str, Any], main: str) -> tuple[list[str], list[str]]:
    """Return the tasks that are compared, which others were watched at, too, and those whose gradients are:
    the ones of the main method alone, which it trains. All of them where there are none, or not two."""
    tasks = list(watched[main][0]["losses"])
    elsewhere = {task for name in watched if name != main for task in watched[name][0]["losses"]}
    own = [task for task in tasks if task not in elsewhere]
    return [task for task in tasks if task in elsewhere] or tasks, own if len(own) > 1 else tasks


def _draw_tasks(values: Mapping[str, Any], tasks: Mapping[str, str], path: Path) -> None:
    """Draw the losses of tasks over training, a panel for each; the legend stands in one more."""
    columns = min(3, len(tasks) + 1)
    rows = len(tasks) // columns + 1
    figure, panels = panels_of("", rows, columns, (11, 3.3 * rows))
    handles: dict[str, Any] = {}
    known, watched = looks(values), values["watched"]
    for axes, (task, words) in zip(panels.flat, tasks.items(), strict=False):
        for name in (name for name in known if name in watched):
            points = [point for point in watched[name] if task in point["losses"]]
            look = known[name]
            if points:
                x, y = zip(
                    *((point["samples"] / 1000, point["losses"][task]) for point in points), strict=True
                )
                (handles[wrapped(look.label, 40)],) = axes.plot(
                    x,
                    y,
                    color=look.color,
                    marker=look.marker,
                    markersize=0.6 * look.size,
                    linewidth=look.width,
                )
        axes.set(title=words, xlabel="thousand samples seen", ylabel="held-out loss (lower is better)")
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    panels.flat[-1].legend(handles.values(), handles, loc="center left", fontsize=POINTS, frameon=False)
    figure.savefig(path, dpi=120)


def _draw_conflict(points: list[dict[str, Any]], tasks: Mapping[str, str], path: Path) -> None:
    """Draw the cosine of the gradients of every two tasks over training, one line each."""
    figure, ((axes,),) = panels_of("", 1, 1, (11, 5.5))
    ends = []
    pairs = [pair for pair in points[0]["cosines"] if set(pair.split("~")) <= set(tasks)]
    for index, pair in enumerate(pairs):
        y = [float("nan") if point["cosines"][pair] is None else point["cosines"][pair] for point in points]
        x = [point["samples"] / 1000 for point in points]
        words = " and ".join(tasks[task] for task in pair.split("~"))
        look = numbered(index, words)
        axes.plot(x, y, marker=look.marker, markersize=look.size, color=look.color, linewidth=look.width)
        known = [(one, value) for one, value in zip(x, y, strict=True) if value == value]
        ends += [(*known[-1], look)] if known else []
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set(
        title="Gradients of two tasks in the shared backbone",
        xlabel="thousand samples seen",
        ylabel="cosine (below 0: they conflict)",
        ylim=(-1, 1),
    )
    label_ends(axes, ends, 60)
    figure.savefig(path, dpi=120)
