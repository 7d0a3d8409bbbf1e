"""The pictures of a sweep, each as an interactive page (plotly) and as a PNG (matplotlib)."""

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from matplotlib.ticker import MaxNLocator

from mmdiff_ray.sweeps.curves import lineage, profiles
from mmdiff_ray.sweeps.drawing import SIZE, Drawn, axes_of, file_name, name_points, page_of, panels_of, short
from mmdiff_ray.sweeps.findings import AT_END, Importance, best_of, figures_of, front
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.record import Record
from mmdiff_ray.sweeps.spec import Sweep
from mmdiff_ray.sweeps.study import distribution, hashable, plain_study

BASE = "#222222"
"""The colour of the base configuration itself, where it is a trial."""
MOST_METRICS = 4
"""Of how many metrics every pair is drawn."""


def draw(record: Record, importance: dict[str, list[Importance]]) -> list[Drawn]:
    """Return all pictures that the trials allow. importance: metric -> what `importances` found."""
    sweep = record.sweep
    judged = [trial for trial in record.trials if trial.reports]
    if not judged:
        return []
    several = len(sweep.metrics) > 1
    finished = any(trial.outcome == "finished" for trial in judged)
    pictures = []
    if several and len(sweep.metrics) <= MOST_METRICS and finished:
        pictures.append(_front(sweep, judged))
    names = short(list(sweep.space))
    pictures += [_importance(metric, found, names) for metric, found in importance.items() if found]
    pictures.append(_history(record))
    if any(len(trial.reports) > 1 for trial in judged):
        pictures.append(_curves(sweep, judged))
    for metric in sweep.metrics:
        pictures.append(_parallel(sweep, judged, metric))
        pictures += _slices(sweep, judged, metric)
    pictures += profiles(record)
    if any(trial.changes for trial in judged):
        pictures += lineage(sweep, judged)
    return pictures


def _words(trial: Trial, names: dict[str, str]) -> str:
    values = ", ".join(
        f"{names.get(key, key)} {value:.3g}" if isinstance(value, float) else f"{names.get(key, key)} {value}"
        for key, value in trial.now.items()
    )
    return f"trial {trial.number} ({trial.outcome or 'unfinished'}): {values}"


def _curves(sweep: Sweep, trials: Sequence[Trial]) -> Drawn:
    """Draw the leading metric of every trial over its samples; those stopped early end early."""
    title = f"{sweep.main} while the trials train"
    names = short(list(sweep.space))
    page = page_of(title, "samples seen", sweep.main)
    figure, axes = axes_of(title, xlabel="samples seen", ylabel=sweep.main)
    best = best_of(sweep, trials)
    for trial in trials:
        x = [report["samples"] for report in trial.reports]
        y = [report["figures"][sweep.main] for report in trial.reports]
        finished, is_best = trial.outcome == "finished", trial is best
        color = "#d62728" if is_best else "#1f77b4" if finished else "#b0b0b0"
        color = BASE if sweep.is_baseline(trial.number) and not is_best else color
        width = 2.5 if is_best else 1.2
        page.add_scatter(
            x=x, y=y, mode="lines+markers", name=f"trial {trial.number}", hovertext=_words(trial, names),
            line={"color": color, "width": width}, showlegend=False,
        )  # fmt: skip
        axes.plot(x, y, marker="o", markersize=3, color=color, linewidth=width)
    marks = [("#d62728", f"best: trial {best.number}"), ("#1f77b4", "finished"), ("#b0b0b0", "stopped early")]
    early = any(trial.outcome != "finished" for trial in trials)
    marks = marks if early else marks[:2]
    for color, label in [*marks, (BASE, "base configuration")] if sweep.baseline else marks:
        axes.plot([], [], color=color, label=label)
    axes.legend(frameon=False)
    return Drawn("trials", title, page, figure)


def _history(record: Record) -> Drawn:
    """Draw when trials ran, and what each came to: one bar per trial."""
    title = "Trials over time"
    page = page_of(title, "minutes since the sweep began", "trial")
    figure, axes = axes_of(title, xlabel="minutes since the sweep began", ylabel="trial")
    colors = {"finished": "#1f77b4", "stopped": "#b0b0b0", "diverged": "#d62728", "failed": "#ff7f0e"}
    known = [trial for trial in record.trials if trial.number in record.times]
    begun = min((record.times[trial.number][0] for trial in known), default=0.0)
    names = short(list(record.sweep.space))
    for trial in known:
        start, end = record.times[trial.number]
        left = (start - begun) / 60
        width = max(0.02, ((end or start) - start) / 60)
        color = colors.get(trial.outcome or "", "#2ca02c")
        page.add_bar(
            x=[width], y=[trial.number], base=[left], orientation="h", marker_color=color, showlegend=False,
            hovertext=_words(trial, names),
        )  # fmt: skip
        axes.barh(trial.number, width, left=left, color=color)
    for outcome in dict.fromkeys(trial.outcome or "unfinished" for trial in known):
        axes.barh(0, 0, color=colors.get(outcome, "#2ca02c"), label=outcome)
    if known:
        axes.legend(frameon=False)
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    page.update_yaxes(autorange="reversed", tickformat="d")
    return Drawn("timeline", title, page, figure)


def _study(sweep: Sweep, trials: Sequence[Trial], metric: str) -> optuna.Study:
    """Return the judged trials as a study of one metric with short names, all as complete, at their last
    report."""
    names = short(list(sweep.space))
    study = plain_study({metric: sweep.metrics[metric]})
    for trial in trials:
        if sweep.is_baseline(trial.number):
            continue
        known = {key: value for key, value in trial.now.items() if key in sweep.space}
        study.add_trial(
            optuna.create_trial(
                params={names[key]: hashable(value) for key, value in known.items()},
                distributions={names[key]: distribution(sweep.space[key]) for key in known},
                value=figures_of(trial)[metric],
            )
        )
    return study


def _parallel(sweep: Sweep, trials: Sequence[Trial], metric: str) -> Drawn:
    title = f"{metric}: parallel coordinates, the darker the better"
    study = _study(sweep, trials, metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = optuna.visualization.plot_parallel_coordinate(study, target_name=metric)
        axes = optuna.visualization.matplotlib.plot_parallel_coordinate(study, target_name=metric)
    page.update_layout(title=title)
    axes.set_title(title)
    shown = [metric, *sorted({name for trial in study.trials for name in trial.params})]
    if len(axes.get_xticks()) == len(shown):  # Optuna cuts names short
        page.update_xaxes(ticktext=shown)
        axes.set_xticks(axes.get_xticks(), shown, rotation=20, ha="right")
    figure: Any = axes.figure
    figure.set_size_inches(*SIZE)
    return Drawn(f"parallel-{file_name(metric)}", title, page, figure)


def _slices(sweep: Sweep, trials: Sequence[Trial], metric: str) -> list[Drawn]:
    """Draw a metric over every swept dimension, a point per trial; of a population, its values at the end."""
    names, found = short(list(sweep.space)), []
    for key, dimension in sweep.space.items():
        known = [trial for trial in trials if key in trial.now]
        if not known:
            continue
        title = f"{metric} over {names[key]}{AT_END * any(trial.changes for trial in known)}"
        page = page_of(title, key, metric)
        figure, axes = axes_of(title, xlabel=key, ylabel=metric)
        for finished, color, label in ((True, "#1f77b4", "finished"), (False, "#b0b0b0", "stopped early")):
            some = [trial for trial in known if (trial.outcome == "finished") is finished]
            if not some:
                continue
            x = [hashable(trial.now[key]) for trial in some]
            x = [str(value) for value in x] if dimension.values else x
            y = [figures_of(trial)[metric] for trial in some]
            page.add_scatter(
                x=x, y=y, mode="markers", name=label, marker={"color": color, "size": 9},
                hovertext=[_words(trial, names) for trial in some],
            )  # fmt: skip
            axes.scatter(x, y, color=color, label=label)
        for trial in (one for one in trials if sweep.is_baseline(one.number) and one.outcome == "finished"):
            level = figures_of(trial)[metric]
            page.add_hline(
                y=level, line={"color": BASE, "dash": "dash"}, annotation_text="base configuration"
            )
            axes.axhline(level, color=BASE, linestyle="--", label="base configuration")
        if dimension.kind == "loguniform":
            page.update_xaxes(type="log")
            axes.set_xscale("log")
        axes.legend(frameon=False)
        found.append(Drawn(f"slice-{file_name(metric)}-{file_name(names[key])}", title, page, figure))
    return found


def _importance(metric: str, found: list[Importance], names: dict[str, str]) -> Drawn:
    title = f"What {metric} depends on (fANOVA; bars: 90 % of resampled trials)"
    keys = [names[importance.key] for importance in found][::-1]
    shares = [importance.share for importance in found][::-1]
    below = [max(0.0, importance.share - importance.low) for importance in found][::-1]
    above = [max(0.0, importance.high - importance.share) for importance in found][::-1]
    page = page_of(title, "share of the variance", "")
    page.add_bar(
        x=shares, y=keys, orientation="h",
        error_x={"type": "data", "symmetric": False, "array": above, "arrayminus": below},
    )  # fmt: skip
    figure, axes = axes_of(title, xlabel="share of the variance")
    axes.barh(keys, shares, xerr=[below, above], color="#1f77b4", ecolor="0.3", capsize=3)
    return Drawn(f"importance-{file_name(metric)}", title, page, figure)


def _front(sweep: Sweep, trials: Sequence[Trial]) -> Drawn:
    """Draw every pair of metrics, a point per trial; those on the front stand out."""
    from plotly.subplots import make_subplots

    title = "Pareto front (red): no other trial is as good in every metric and better in one"
    pairs, names = list(itertools.combinations(sweep.metrics, 2)), short(list(sweep.space))
    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    page = make_subplots(rows, columns)
    page.update_layout(title=title, template="plotly_white", showlegend=False)
    figure, panels = panels_of(title, rows, columns, (max(SIZE[0], 4.5 * columns), 4.2 * rows))
    done = [trial for trial in trials if trial.outcome == "finished"]
    on_front = {trial.number for trial in front(sweep, done)}
    for at, (across, up) in enumerate(pairs):
        row, column = divmod(at, columns)
        axes = panels[row, column]
        better = ["lower" if sweep.metrics[metric] == "min" else "higher" for metric in (across, up)]
        axes.set(xlabel=f"{across} ({better[0]} is better)", ylabel=f"{up} ({better[1]} is better)")
        page.update_xaxes(title=across, row=row + 1, col=column + 1)
        page.update_yaxes(title=up, row=row + 1, col=column + 1)
        for is_front, color in ((False, "#1f77b4"), (True, "#d62728")):
            some = [trial for trial in done if (trial.number in on_front) is is_front]
            x, y = ([figures_of(trial)[metric] for trial in some] for metric in (across, up))
            page.add_scatter(
                x=x, y=y, mode="markers", marker={"color": color, "size": 9}, row=row + 1, col=column + 1,
                hovertext=[_words(trial, names) for trial in some],
            )  # fmt: skip
            axes.scatter(x, y, color=color, label="on the front" if is_front else "finished")
    for axes in panels.flat[len(pairs) :]:
        axes.set_visible(False)
    panels[0, 0].legend(frameon=False)
    named = [trial for trial in done if trial.number in on_front or sweep.is_baseline(trial.number)]
    for axes, pair in zip(panels.flat, pairs, strict=False):
        points = [[figures_of(trial)[metric] for metric in pair] for trial in done]
        places = [[figures_of(trial)[metric] for metric in pair] for trial in named]
        words = ["base" if sweep.is_baseline(trial.number) else str(trial.number) for trial in named]
        name_points(
            axes, [(x, y, word) for (x, y), word in zip(places, words, strict=True)], points, "#8c1a1a"
        )
    return Drawn("pareto", title, page, figure)
