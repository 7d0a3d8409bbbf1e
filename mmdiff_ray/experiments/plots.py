"""Figures of an experiment's page: the overview, curves, and the watched tasks during training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff_ray.experiments.archive import result_file
from mmdiff_ray.experiments.parts import Panel
from mmdiff_ray.experiments.styles import RULE, Style, label_ends, numbered, styles, wrapped
from mmdiff_ray.plotting import POINTS, log_scale, panels, save_png

WIDTH = 11.0
"""Width of a figure in inches."""
TITLE, LEGEND = 26, 28
"""Characters per line of a panel's title, and of the legend of rules below it."""
Line = Mapping[str, Any]
"""One figure of one method: an entry of a result's `figures`."""


def draw_overview(values: Mapping[str, Any], overview: Sequence[Panel], out: Path) -> list[Path]:
    """Draw the measured panels of the overview, with methods as rows; return the file, if any."""
    titles, measured = values["methods"], []
    for panel in overview:
        lines = {
            line["method"]: line
            for line in values["figures"]
            if (line["measure"], line["figure"]) == (panel.measure, panel.figure)
            and not math.isnan(line["mean"])
        }
        if lines.keys() & titles:
            measured.append((panel, lines))
    if not measured:
        return []
    known = styles(values)
    rows = [name for name in known if name in titles and any(name in lines for _, lines in measured)]
    most_rules = max(len(lines.keys() - titles) for _, lines in measured)
    height = 0.36 * len(rows) + 1.7 + 0.3 * most_rules
    figure, axes = panels(len(measured), len(measured), (WIDTH / len(measured), height))
    for one, (panel, lines) in zip(axes, measured, strict=True):
        _draw_panel(one, panel, lines, rows, known)
    seeds = {name: max(len(lines[name]["seeds"]) for _, lines in measured if name in lines) for name in rows}
    labels = []
    for name, count in seeds.items():
        fewer = f" ({count} seed{'s' * (count > 1)})" if count < max(seeds.values()) else ""
        labels.append(wrapped(known[name].label + fewer, 40))
    for tick, name in zip(axes[0].set_yticks(range(len(rows)), labels), rows, strict=True):
        tick.label1.set(fontweight=known[name].weight, fontsize=POINTS)
    return [save_png(figure, result_file(out, "-overview.png"))]


def _draw_panel(
    axes: Any, panel: Panel, lines: Mapping[str, Line], rows: Sequence[str], known: Mapping[str, Style]
) -> None:
    """Draw means with intervals, single seeds as dots, and rules as vertical lines."""
    ends: list[float] = []
    for at, name in enumerate(rows):
        if line := lines.get(name):
            style, seeds, bar = known[name], line.get("values", []), _interval(line)
            axes.plot(bar, [at, at], color=style.color, linewidth=style.width)
            axes.plot(seeds, [at + 0.27] * len(seeds), ".", color=style.color, markersize=4, alpha=0.6)
            axes.plot(line["mean"], at, **style.drawn)
            ends += bar
    better = next(iter(lines.values()))["better"]
    parts = [*panel.name.split(": "), f"({better} is better)"]
    axes.set_title("\n".join(wrapped(part, TITLE) for part in parts), fontsize=9.5)
    shown = [lines[name] for name in rows if name in lines]
    bars = "one seed, no interval"
    if any("interval" in line for line in shown):
        bars = "bars: 95 % intervals"
    elif any(line["spread"] is not None for line in shown):
        bars = "bars: ± s. d. over seeds"
    axes.set_xlabel(bars, fontsize=POINTS, color="0.35")
    rules = {name: line["mean"] for name, line in lines.items() if name.startswith(RULE)}
    if panel.log:
        log_scale(axes)
    else:
        axes.locator_params(axis="x", nbins=4)
    axes.set_xlim(limits(ends, list(rules.values()), panel.log))
    _draw_rules(axes, rules, known)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=POINTS)


def _interval(line: Line) -> tuple[float, float]:
    """Return the ends of a bar: the interval if there is one, else mean ± standard deviation over seeds."""
    spread = line["spread"] or 0.0
    low, high = line.get("interval", (line["mean"] - spread, line["mean"] + spread))
    return low, high


def limits(ends: Sequence[float], rules: Sequence[float], log: bool) -> tuple[float, float]:
    """Return axis limits that include all bars, and each rule within one bar range of them.

    ends: ends of the bars. log: whether the axis is logarithmic. A distant rule would squeeze the bars.
    """
    to, back = (math.log, math.exp) if log else (float, float)
    low, high = to(min(ends)), to(max(ends))
    room = high - low or 0.1 * abs(high) or 1.0
    near = [to(value) for value in rules if (value > 0 or not log) and low - room < to(value) < high + room]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.08 * (high - low or room)
    return back(low - margin), back(high + margin)


def _draw_rules(axes: Any, rules: Mapping[str, float], known: Mapping[str, Style]) -> None:
    """Draw rules inside the limits as vertical lines; the legend lists all rules with their values."""
    low, high = axes.get_xlim()
    for name, value in rules.items():
        is_inside = low < value < high
        label = f"{name.removeprefix(RULE)}: {value:.{3 if value < 10 else 0}f}"
        label = wrapped(label if is_inside else f"{label}, off the axis", LEGEND)
        axes.axvline(value if is_inside else math.nan, label=label, **known[name].drawn | {"zorder": 1})
    if rules:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5, fontsize=7.5, frameon=False,
            handlelength=2.6,
        )  # fmt: skip


def draw_curves(values: Mapping[str, Any], curves: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """Draw a curve for each method that is measured at two or more points; return the files.

    curves: each has `name`, `title`, `figure`, the axis labels `x` and `y`, and `points`: measure -> x.
    """
    files = []
    for curve in curves:
        points: dict[str, list[tuple[float, Line]]] = {}
        for line in values["figures"]:
            if line["figure"] == curve["figure"] and line["measure"] in curve["points"]:
                points.setdefault(line["method"], []).append((float(curve["points"][line["measure"]]), line))
        if points := {
            name: sorted(found, key=lambda one: one[0]) for name, found in points.items() if len(found) > 1
        }:
            files.append(_draw_curve(values, curve, points, out))
    return files


def _draw_curve(
    values: Mapping[str, Any],
    curve: Mapping[str, Any],
    points: Mapping[str, Sequence[tuple[float, Line]]],
    out: Path,
) -> Path:
    figure, (axes,) = panels(1, 1, (WIDTH, 7.2))
    known, ends = styles(values), []
    methods = [name for name in known if name in points]
    step = 0.03 * (max(curve["points"].values()) - min(curve["points"].values())) / len(methods)
    for at, name in enumerate(methods):
        x = [
            one + step * (at - len(methods) / 2) for one, _ in points[name]
        ]  # shifted, so that intervals do not overlap
        y = [line["mean"] for _, line in points[name]]
        axes.plot(x, y, **known[name].drawn)
        if not name.startswith(RULE):
            bars = [line.get("interval", (line["mean"], line["mean"])) for _, line in points[name]]
            axes.vlines(x, *zip(*bars, strict=True), color=known[name].color, linewidth=1)
        ends.append((x[-1], y[-1], known[name]))
    y_label = f"{curve.get('y', curve['figure'])} ({points[methods[0]][0][1]['better']} is better)"
    axes.set(title=f"{curve['title']} (bars: 95 % intervals)", xlabel=curve["x"], ylabel=y_label)
    label_ends(axes, ends)
    return save_png(figure, result_file(out, f"-{curve['name']}.png"))


def draw_watched(values: Mapping[str, Any], titles: Mapping[str, str], out: Path) -> list[Path]:
    """Draw the watched tasks during training; return the files.

    titles: task -> title. OUT-tasks.png shows the loss of each compared task. OUT-conflict.png shows the
    cosine between the gradients of each pair of the main method's tasks.
    """
    watched, main = values["watched"], values["main"]
    if main not in watched:
        return []
    compared, own = compared_tasks(watched, main)
    files = [_draw_tasks(values, {task: titles.get(task, task) for task in compared}, out)]
    if watched[main][0]["cosines"]:
        files.append(_draw_conflict(watched[main], {task: titles.get(task, task) for task in own}, out))
    return files


def compared_tasks(watched: Mapping[str, Any], main: str) -> tuple[list[str], list[str]]:
    """Return the tasks for the plot of losses, and the tasks for the plot of gradients.

    Losses: the tasks that other methods watch too, or all tasks if there are none. Gradients: the tasks that
    only the main method watches, which are the ones it trains; all tasks if there are fewer than two.
    """
    tasks = list(watched[main][0]["losses"])
    elsewhere = {task for name in watched if name != main for task in watched[name][0]["losses"]}
    own = [task for task in tasks if task not in elsewhere]
    return [task for task in tasks if task in elsewhere] or tasks, own if len(own) > 1 else tasks


def _draw_tasks(values: Mapping[str, Any], tasks: Mapping[str, str], out: Path) -> Path:
    """Draw the loss of each task during training, one panel per task, with the legend in the last panel."""
    columns = min(3, len(tasks) + 1)
    figure, axes = panels(len(tasks) + 1, columns, (WIDTH / columns, 3.3))
    known, watched, handles = styles(values), values["watched"], {}
    for panel, (task, title) in zip(axes, tasks.items(), strict=False):
        for name, style in known.items():
            points = [point for point in watched.get(name, ()) if task in point["losses"]]
            if points:
                x = [point["samples"] / 1000 for point in points]
                y = [point["losses"][task] for point in points]
                drawn = style.drawn | {"markersize": 0.6 * style.size}
                (handles[wrapped(style.label, 40)],) = panel.plot(x, y, **drawn)
        panel.set(title=title, xlabel="thousand samples seen", ylabel="held-out loss (lower is better)")
    axes[-1].set_axis_off()
    axes[-1].legend(handles.values(), handles, loc="center left", fontsize=POINTS, frameon=False)
    return save_png(figure, result_file(out, "-tasks.png"))


def _draw_conflict(points: Sequence[Mapping[str, Any]], tasks: Mapping[str, str], out: Path) -> Path:
    """Draw the cosine between the gradients of each pair of tasks during training."""
    figure, (axes,) = panels(1, 1, (WIDTH, 5.5))
    pairs = [pair for pair in points[0]["cosines"] if set(pair.split("~")) <= set(tasks)]
    x, ends = [point["samples"] / 1000 for point in points], []
    for at, pair in enumerate(pairs):
        style = numbered(at, " and ".join(tasks[task] for task in pair.split("~")))
        cosines = [point["cosines"][pair] for point in points]
        axes.plot(x, [math.nan if cosine is None else cosine for cosine in cosines], **style.drawn)
        known = [(one, cosine) for one, cosine in zip(x, cosines, strict=True) if cosine is not None]
        ends += [(*known[-1], style)] if known else []
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set(title="Gradients of two tasks in the shared backbone", xlabel="thousand samples seen")
    axes.set(ylabel="cosine (below 0: they conflict)", ylim=(-1, 1))
    label_ends(axes, ends, 60)
    return save_png(figure, result_file(out, "-conflict.png"))
