"""The main figure of an experiment: what matters most of it, methods in rows and a panel for each."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff_ray.experiments.files import beside
from mmdiff_ray.experiments.looks import POINTS, RULE, Look, direction, looks, wrapped
from mmdiff_ray.experiments.spec import Panel
from mmdiff_ray.sweeps.drawing import panels_of

WIDTH, ROW = 11.0, 0.36
"""Inches of the figure and of a row."""
TITLE, LEGEND = 26, 28
"""Letters in a line of a panel's title, and of the names of rules below."""
Lines = dict[str, Mapping[str, Any]]
"""method or rule -> its line of a result's figures."""


def draw_overview(values: Mapping[str, Any], overview: Sequence[Panel], out: Path) -> list[Path]:
    """Draw the panels of a result that are measured, beside `out`; return the file, if there is one."""
    drawn = [
        (panel, lines) for panel in overview if (lines := _lines(values, panel)).keys() & values["methods"]
    ]
    if not drawn:
        return []
    known = looks(values)
    rows = [name for name in known if name in values["methods"] and any(name in lines for _, lines in drawn)]
    most = max(len(lines.keys() - values["methods"]) for _, lines in drawn)
    figure, panels = panels_of("", 1, len(drawn), (WIDTH, ROW * len(rows) + 1.7 + 0.3 * most))
    for axes, (panel, lines) in zip(panels[0], drawn, strict=True):
        _draw(axes, panel, lines, rows, known)
    words = _names(rows, [lines for _, lines in drawn], known)
    for tick, name in zip(panels[0, 0].set_yticks(range(len(rows)), words), rows, strict=True):
        tick.label1.set(fontweight=known[name].weight, fontsize=POINTS)
    path = beside(out, "-overview.png")
    figure.savefig(path, dpi=120)
    return [path]


def _names(rows: Sequence[str], panels: Sequence[Lines], known: Mapping[str, Look]) -> list[str]:
    """Return the words for rows: titles, and the number of seeds of those that have fewer than others."""
    seeds = {name: max(len(lines[name]["seeds"]) for lines in panels if name in lines) for name in rows}
    few = {name: count for name, count in seeds.items() if count < max(seeds.values())}
    counts = {name: f" ({count} seed{'s' * (count > 1)})" for name, count in few.items()}
    return [wrapped(known[name].label + counts.get(name, ""), 40) for name in rows]


def _lines(values: Mapping[str, Any], panel: Panel) -> Lines:
    return {
        line["method"]: line
        for line in values["figures"]
        if (line["measure"], line["figure"]) == (panel.measure, panel.figure) and not math.isnan(line["mean"])
    }


def _draw(axes: Any, panel: Panel, lines: Lines, rows: Sequence[str], known: Mapping[str, Look]) -> None:
    """Draw a panel: means with their intervals, single seeds, and rules as lines."""
    for at, name in enumerate(rows):
        if name in lines:
            line, look = lines[name], known[name]
            low, high = _ends(line)
            axes.plot([low, high], [at, at], color=look.color, linewidth=look.width)
            seeds = line.get("values", [])
            axes.plot(seeds, [at + 0.27] * len(seeds), ".", color=look.color, markersize=4, alpha=0.6)
            axes.plot(line["mean"], at, marker=look.marker, color=look.color, markersize=look.size)
    better = next(iter(lines.values()))["better"]
    title = "\n".join(wrapped(part, TITLE) for part in [*panel.name.split(": "), f"({direction(better)})"])
    axes.set_title(title, fontsize=9.5)
    axes.set_xlabel(_bars([lines[name] for name in rows if name in lines]), fontsize=POINTS, color="0.35")
    ends = [end for name in rows if name in lines for end in _ends(lines[name])]
    rules = {name: line["mean"] for name, line in lines.items() if name.startswith(RULE)}
    _scale(axes, panel, limits(ends, list(rules.values()), panel.log))
    _rules(axes, rules, known)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=POINTS)


def _ends(line: Mapping[str, Any]) -> tuple[float, float]:
    """Return the ends of a mean's bar: its interval, or its deviation over seeds; the mean where there is
    neither."""
    spread = line["spread"] or 0.0
    low, high = line.get("interval", (line["mean"] - spread, line["mean"] + spread))
    return low, high


def _bars(lines: Sequence[Mapping[str, Any]]) -> str:
    if any("interval" in line for line in lines):
        return "bars: 95 % intervals"
    if any(line["spread"] is not None for line in lines):
        return "bars: ± s. d. over seeds"
    return "one seed, no interval"


def limits(ends: Sequence[float], rules: Sequence[float], log: bool) -> tuple[float, float]:
    """Return the ends of an axis that holds all bars, and the rules that do not take more room than these.

    ends: of the bars. log: whether the axis is logarithmic.
    """
    to, back = (math.log, math.exp) if log else (float, float)
    low, high = to(min(ends)), to(max(ends))
    room = high - low or 0.1 * abs(high) or 1.0
    near = [to(value) for value in rules if (value > 0 or not log) and low - room < to(value) < high + room]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.08 * (high - low or room)
    return back(low - margin), back(high + margin)


def _scale(axes: Any, panel: Panel, ends: tuple[float, float]) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    if panel.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlim(ends)


def _rules(axes: Any, rules: Mapping[str, float], known: Mapping[str, Look]) -> None:
    """Draw the rules that lie on the axis as lines; name all of them, with their values, below."""
    low, high = axes.get_xlim()
    for name, value in rules.items():
        look, inside = known[name], low < value < high
        words = f"{name.removeprefix(RULE)}: {value:.{3 if value < 10 else 0}f}" + ", off the axis" * (
            not inside
        )
        axes.axvline(
            value if inside else math.nan, color=look.color, linestyle=look.line, linewidth=look.width,
            label=wrapped(words, LEGEND), zorder=1,
        )  # fmt: skip
    if rules:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5, fontsize=7.5, frameon=False,
            handlelength=2.6,
        )  # fmt: skip
