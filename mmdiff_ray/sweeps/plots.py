"""Figures of a sweep's report. A trial has the same colour in every figure."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmdiff_ray.config import Config
from mmdiff_ray.diffusion.weights import w_from_b
from mmdiff_ray.models.denoiser import build_modalities, build_process
from mmdiff_ray.plotting import label_points, legend_above, log_scale, panels
from mmdiff_ray.sweeps.findings import Importance, best_first, groups, leading, short_names
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.record import Record
from mmdiff_ray.sweeps.spec import Sweep

COLORS = {
    "best": "#D55E00", "on the front": "#D55E00", "base configuration": "#222222", "finished": "#4477AA",
    "stopped": "#B8B8B8", "diverged": "#AA3377", "failed": "#882255", "unfinished": "#228833",
}  # fmt: skip
"""Group of a trial -> its colour."""
PANEL = (4.0, 3.2)
"""Size in inches of a panel, with three panels per row."""


@dataclass(frozen=True)
class Plot:
    """A figure of the report. name: stem of its PNG file; caption: how to read it."""

    name: str
    title: str
    caption: str
    figure: Any


def draw(record: Record, importance: dict[str, list[Importance]]) -> list[Plot]:
    """Draw every figure that has data. importance: metric -> result of `importances`."""
    sweep = record.sweep
    judged = [trial for trial in record.trials if trial.reports]
    if not judged:
        return []
    found = [
        _front(sweep, judged),
        _importance(importance, short_names(list(sweep.space))),
        _curves(sweep, judged),
        _parallel(sweep, judged),
        *(_slices(sweep, judged, metric) for metric in sweep.metrics),
        _weights(record),
        _lineage(sweep, judged),
        _timeline(record),
    ]
    return [plot for plot in found if plot is not None]


def _front(sweep: Sweep, trials: Sequence[Trial]) -> Plot | None:
    done = [trial for trial in trials if trial.outcome == "finished"]
    if len(sweep.metrics) < 2 or not done:
        return None
    pairs, group = list(itertools.combinations(sweep.metrics, 2)), groups(sweep, trials)
    figure, axes = panels(len(pairs), 3, PANEL)
    for panel, (first, second) in zip(axes, pairs, strict=True):
        for trial in done:
            _line(panel, trial, group, [trial.figures[first]], [trial.figures[second]], markersize=7)
        panel.set(xlabel=_directed(sweep, first), ylabel=_directed(sweep, second))
    _legend(figure, [group[trial.number] for trial in done])
    for panel, (first, second) in zip(axes, pairs, strict=True):  # labels need the final layout
        points = [(trial.figures[first], trial.figures[second]) for trial in done]
        labels = ["base" if sweep.is_baseline(trial.number) else str(trial.number) for trial in done]
        shown = [group[trial.number] in ("on the front", "base configuration") for trial in done]
        named = [(x, y, text) for (x, y), text, show in zip(points, labels, shown, strict=True) if show]
        label_points(panel, named, points)
    caption = "No other trial is at least as good in every metric and better in one. Numbers are trials."
    return Plot("pareto", "Pareto front", caption, figure)


def _importance(importance: dict[str, list[Importance]], names: dict[str, str]) -> Plot | None:
    known = {metric: found for metric, found in importance.items() if found}
    if not known:
        return None
    most = max(map(len, known.values()))
    figure, axes = panels(len(known), 3, (4.0, 1.2 + 0.3 * most))
    for panel, (metric, found) in zip(axes, known.items(), strict=True):
        keys, shares = [names[one.key] for one in found], [one.share for one in found]
        errors = np.clip([(one.share - one.low, one.high - one.share) for one in found], 0, None).T
        panel.barh(keys, shares, xerr=errors, color=COLORS["finished"], ecolor="0.3", capsize=3)
        panel.invert_yaxis()
        panel.set(title=metric, xlabel="share of the variance", xlim=(0, 1))
    caption = "Share of the variance that a key explains (fANOVA). Bars: 90 % of bootstrap resamples."
    return Plot("importance", "What matters", caption, figure)


def _curves(sweep: Sweep, trials: Sequence[Trial]) -> Plot | None:
    if all(len(trial.reports) < 2 for trial in trials):
        return None
    group = groups(sweep, trials)
    figure, axes = panels(len(sweep.metrics), 3, PANEL if len(sweep.metrics) > 1 else (8, 4))
    for panel, metric in zip(axes, sweep.metrics, strict=True):
        for trial in trials:
            x = [report["samples"] for report in trial.reports]
            y = [report["figures"][metric] for report in trial.reports]
            _line(panel, trial, group, x, y)
        panel.set(xlabel="samples seen", ylabel=_directed(sweep, metric))
    _legend(figure, group.values())
    return Plot("trials", "Trials during training", "Lines of stopped trials end early.", figure)


def _parallel(sweep: Sweep, trials: Sequence[Trial]) -> Plot:
    """Draw swept values and metrics as parallel axes, one line per trial, darker for a better rank."""
    names = short_names(list(sweep.space))
    columns = [[trial.now.get(key) for trial in trials] for key in names]
    columns += [[trial.figures.get(metric) for trial in trials] for metric in sweep.metrics]
    logs = [dimension.kind == "loguniform" for dimension in sweep.space.values()]
    logs += [False] * len(sweep.metrics)
    scales = [_unit_scale(column, log) for column, log in zip(columns, logs, strict=True)]
    figure, (axes,) = panels(1, 1, (12, 4))
    ranked = best_first(sweep, trials)
    shades = {trial.number: 0.25 + 0.75 * at / len(ranked) for at, trial in enumerate(reversed(ranked), 1)}
    best = next(iter(leading(sweep, trials)), ranked[0])
    for row, trial in enumerate(trials):
        shade, is_best = shades[trial.number], trial is best
        axes.plot(
            [heights[row] for heights, _ in scales], gid=f"trial-{trial.number}",
            linewidth=2.6 if is_best else 1.2, zorder=3 if is_best else 1 + shade,
            color=COLORS["best"] if is_best else (0.27, 0.47, 0.67, shade),
        )  # fmt: skip
    for at, (_, ticks) in enumerate(scales):
        axes.axvline(at, color="0.6", linewidth=0.8)
        for height, text in ticks.items():
            axes.annotate(
                text, (at, height), xytext=(3, 0), textcoords="offset points", fontsize=7.5, color="0.3",
                va="bottom" if height > 0.5 else "top",
            )  # fmt: skip
    heads = [name.replace(".", ".\n") for name in names.values()]
    heads += [_directed(sweep, metric).replace(" (", "\n(") for metric in sweep.metrics]
    axes.set_xticks(range(len(columns)), heads, fontsize=8.5)
    axes.set(yticks=[], ylim=(-0.08, 1.08))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    caption = f"One line per trial, darker for a better rank by {sweep.main}; orange: trial {best.number}."
    return Plot("parallel", "All values together", caption, figure)


def _unit_scale(column: Sequence[Any], log: bool) -> tuple[list[float], dict[float, str]]:
    """Return values as heights in [0, 1] (NaN for None), and the ticks: height -> text."""
    known = [value for value in column if value is not None]
    choices = [] if all(type(value) in (int, float) for value in known) else sorted(set(map(str, known)))
    numbers = [choices.index(str(value)) if choices else value for value in known]
    scaled = np.log(numbers) if log else np.array(numbers, dtype=float)
    low, high = (scaled.min(), scaled.max()) if known else (0.0, 1.0)
    places = iter(((scaled - low) / ((high - low) or 1)).tolist())
    heights = [math.nan if value is None else next(places) for value in column]
    ticks = {
        height: str(value) if choices else f"{value:.4g}"
        for height, value in zip(heights, column, strict=True)
        if value is not None and (choices or height in (0, 1))
    }
    return heights, ticks


def _slices(sweep: Sweep, trials: Sequence[Trial], metric: str) -> Plot | None:
    """Draw a metric over each swept key, one point per trial; a line shows the base configuration."""
    known = [key for key in sweep.space if any(key in trial.now for trial in trials)]
    if not known:
        return None
    names, group = short_names(list(sweep.space)), groups(sweep, trials)
    bases = [one for one in trials if sweep.is_baseline(one.number) and one.outcome == "finished"]
    columns = math.ceil(len(known) / math.ceil(len(known) / 4))
    figure, axes = panels(len(known), columns, (12 / columns if columns > 2 else 4.0, 3.0))
    for panel, key in zip(axes, known, strict=True):
        dimension = sweep.space[key]
        choices = [str(value) for value in dimension.values]
        for trial in (one for one in trials if key in one.now):
            value = trial.now[key]
            x = choices.index(str(value)) if choices else value
            _line(panel, trial, group, [x], [trial.figures[metric]], markersize=7)
        for trial in bases:
            panel.axhline(trial.figures[metric], color=COLORS["base configuration"], linestyle="--")
        if choices:
            panel.set_xticks(range(len(choices)), choices)
            panel.set_xlim(-0.5, len(choices) - 0.5)
        if dimension.kind == "loguniform":
            log_scale(panel)
        panel.set_xlabel(names[key])
    figure.supylabel(_directed(sweep, metric), fontsize=10)
    _legend(figure, [group[one.number] for one in trials if one in bases or one.now])
    at_end = " Values are those at the end of training." if any(trial.changes for trial in trials) else ""
    caption = f"One point per trial{'; dashed: the base configuration' if bases else ''}.{at_end}"
    file = "".join(letter if letter.isalnum() else "_" for letter in metric)
    return Plot(f"slices-{file}", f"{metric} over each key", caption, figure)


def _weights(record: Record) -> Plot | None:
    """Draw b(t) and w_t of each modality with swept weights, for the base and the best trial."""
    sweep = record.sweep
    swept = list(dict.fromkeys(key.split(".")[1] for key in sweep.space if ".weights." in key))
    known = [trial for trial in record.trials if trial.number in record.configs]
    if not swept or not known:
        return None
    trial = next(iter([*leading(sweep, known), *best_first(sweep, known)]))
    best, plain = record.configs[trial.number], sweep.config({})
    base = {
        name: dataclasses.replace(options, weights=plain.modalities[name].weights)
        for name, options in best.modalities.items()
    }
    lines = {"base configuration": dataclasses.replace(best, modalities=base), "best": best}
    figure, axes = panels(2 * len(swept), max(2, len(swept)), (3.6, 2.8))
    for at, name in enumerate(swept):
        upper, lower = axes[at], axes[len(swept) + at]
        upper.set(title=name, ylabel="b(t)" if at == 0 else "")
        lower.set(xlabel="t (0: data, 1: noise)", ylabel="w_t" if at == 0 else "")
        first = {}
        for group, config in lines.items():
            t, b, w = _profile(config, name)
            style = {"color": COLORS[group], "linestyle": "-" if group == "best" else "--"}
            upper.plot(t, b, **style)
            lower.plot(t[1:], w[1:], **style)  # the first weight is far larger than the others
            first[group] = f"{w[0]:.3g}"
        lower.set_title(f"w_1: {first['best']}, base {first['base configuration']}", fontsize=9)
    _legend(figure, lines)
    caption = f"Profile b(t) and its step weights w_t on 100 steps; best is trial {trial.number}."
    return Plot("weights", "Weights over time", caption, figure)


def _profile(config: Config, name: str, steps: int = 100) -> tuple[list[float], list[float], list[float]]:
    """Return t, b(t) and w_t of a modality at t = 1 / steps, ..., 1."""
    process = build_process(config, build_modalities(config))
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    b = process.profiles[name](t[1:])
    w = w_from_b(b, process.schedule.log_abar(t).diff().exp())
    return t[1:].tolist(), b.tolist(), w.round(decimals=9).tolist()  # rounding errors around 0 become 0


def _lineage(sweep: Sweep, trials: Sequence[Trial]) -> Plot | None:
    """Draw each swept value over samples for every member of a population, and mark copies."""
    if not any(trial.changes for trial in trials):
        return None
    names, group = short_names(list(sweep.space)), groups(sweep, trials)
    figure, axes = panels(len(names), 3, PANEL)
    for panel, (key, name) in zip(axes, names.items(), strict=True):
        for trial in trials:
            x, y = [0], [trial.values.get(key, math.nan)]
            for change in (one for one in trial.changes if key in one["values"]):
                x, y = [*x, change["at"]], [*y, change["values"][key]]
                if change["source"] != trial.number:
                    panel.annotate(f"from {change['source']}", (x[-1], y[-1]), fontsize=6.5, color="0.3")
            steps = {"drawstyle": "steps-post", "marker": ""}
            _line(panel, trial, group, [*x, trial.samples], [*y, y[-1]], **steps)
        if sweep.space[key].kind == "loguniform":
            log_scale(panel, "y")
        panel.set(xlabel="samples seen", ylabel=name)
    _legend(figure, group.values())
    caption = "Steps are changes of the value; `from N`: the trial copied the state of trial N."
    return Plot("lineage", "Values of the population", caption, figure)


def _timeline(record: Record) -> Plot | None:
    known = [trial for trial in record.trials if trial.number in record.times]
    if not known:
        return None
    group = groups(record.sweep, record.trials)
    begin = min(record.times[trial.number][0] for trial in known)
    figure, (axes,) = panels(1, 1, (8, 1.4 + 0.16 * len(known)))
    for number in (trial.number for trial in known):
        start, end = record.times[number]
        minutes = max(0.02, ((end or start) - start) / 60)
        left, color = (start - begin) / 60, COLORS[group[number]]
        axes.broken_barh([(left, minutes)], (number - 0.4, 0.8), color=color, gid=f"trial-{number}")
    axes.invert_yaxis()
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="minutes since the start of the sweep", ylabel="trial")
    _legend(figure, [group[trial.number] for trial in known])
    return Plot("timeline", "Trials over time", "One bar per trial.", figure)


def _line(axes: Any, trial: Trial, group: dict[int, str], x: Any, y: Any, **style: Any) -> None:
    """Draw a trial as a line with points, in the colour of its group."""
    name = group[trial.number]
    stands_out = name in ("best", "on the front", "base configuration")
    defaults = {"marker": "o", "markersize": 4, "linewidth": 2.2 if stands_out else 1.2}
    zorder = 3 if stands_out else 1.5 if name == "stopped" else 2
    axes.plot(x, y, color=COLORS[name], zorder=zorder, gid=f"trial-{trial.number}", **defaults | style)


def _legend(figure: Any, present: Collection[str]) -> None:
    legend_above(figure, {name: COLORS[name] for name in COLORS if name in present})


def _directed(sweep: Sweep, metric: str) -> str:
    return f"{metric} ({'lower' if sweep.metrics[metric] == 'min' else 'higher'} is better)"
