"""The result of an experiment: means over seeds, intervals, differences to the main method, costs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError
from mmdiff_ray.config.schema import EvaluateConfig
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.evaluation.statistics import (
    FEWEST_SEEDS,
    METHOD,
    Estimate,
    Tally,
    by_row,
    compare,
    holm,
    interval,
    over_seeds,
)
from mmdiff_ray.evaluation.tallies import load_tally
from mmdiff_ray.experiments.measurement import is_measured, measurements_of
from mmdiff_ray.experiments.parts import Best, Cell, Goal
from mmdiff_ray.experiments.spec import Experiment
from mmdiff_ray.experiments.watch import read
from mmdiff_ray.models.cost import forward_flops
from mmdiff_ray.models.denoiser import build_denoiser, inert_settings

LEVEL = 0.025
"""Significance level of one-sided tests, which matches one side of a 95 % interval."""


@dataclass
class Series:
    """One figure of a method, or of a rule without a model, over seeds."""

    better: str = ""
    values: dict[int, float] = field(default_factory=dict)
    tallies: dict[int, Tally] = field(default_factory=dict)


Table = dict[str, dict[str, dict[str, Series]]]
"""measure -> figure -> method or `rule: NAME` -> series."""


def trained_cells(experiment: Experiment, runs: Path) -> list[Cell]:
    """Return the cells whose training has finished."""
    return [
        cell
        for cell in experiment.cells()
        if (experiment.folder(runs, cell) / "export" / "facts.json").is_file()
    ]


def collect(experiment: Experiment, runs: Path) -> Table:
    """Return the figures of all measurements that match the experiment's current settings."""
    table: Table = {}
    for cell in trained_cells(experiment, runs):
        for one in measurements_of(experiment, cell, runs):
            if not one.is_done:
                continue
            figures = table.setdefault(one.measure.name, {})
            with np.load(one.file.with_suffix(".npz"), allow_pickle=False) as tallies:
                for figure in json.loads(one.file.read_text(encoding="utf8"))["figures"]:
                    rules = figure["floors"] if one.method.name == experiment.main else {}
                    for name, value in {"model": figure["value"], **rules}.items():
                        label = one.method.name if name == "model" else f"rule: {name}"
                        methods = figures.setdefault(figure["key"], {})
                        series = methods.setdefault(label, Series(figure["better"]))
                        series.values[cell.seed] = value
                        if (tally := load_tally(tallies, figure["key"], name)) is not None:
                            series.tallies[cell.seed] = tally
    return table


def choices(best: Best, table: Table) -> dict[int, str]:
    """Return seed -> best method, for the seeds with which all methods are measured."""
    methods = table.get(best.measure, {}).get(best.figure, {})
    found = [methods[name] for name in best.of if name in methods]
    if len(found) < len(best.of):
        return {}
    sign = -1 if found[0].better == "lower" else 1
    shared = set.intersection(*(set(series.values) for series in found))
    return {seed: max(best.of, key=lambda name: sign * methods[name].values[seed]) for seed in sorted(shared)}


def add_best(table: Table, best: Best) -> None:
    """Add a row with the best of several methods to each of their figures."""
    for seed, name in choices(best, table).items():
        for figures in table.values():
            for methods in figures.values():
                chosen = methods.get(name)
                if chosen is None or seed not in chosen.values:
                    continue
                own = methods.setdefault(best.name, Series(chosen.better))
                own.values[seed] = chosen.values[seed]
                if seed in chosen.tallies:
                    own.tallies[seed] = chosen.tallies[seed]


def summary(experiment: Experiment, table: Table) -> list[dict[str, Any]]:
    """Return one entry per figure and method: mean, spread over seeds, interval, and the difference
    main - method with its interval."""
    lines = []
    for measure, figures in table.items():
        for key, methods in figures.items():
            main = methods.get(experiment.main)
            for name, series in methods.items():
                line = {"measure": measure, "figure": key, "method": name, "better": series.better}
                line |= _statistics(series)
                if main is not None and main is not series:
                    line |= _difference(main, series)
                lines.append(line)
    return lines


def _statistics(series: Series) -> dict[str, Any]:
    seeds = sorted(series.values)
    values = list(series.values.values())
    found: dict[str, Any] = {
        "mean": float(np.mean(values)),
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "seeds": seeds,
        "values": [series.values[seed] for seed in seeds],
    }
    if len(series.tallies) == len(values):
        found["interval"] = list(interval([series.tallies[seed] for seed in seeds])[1:])
        found["rows"] = len(by_row(list(series.tallies.values()))[0])
    return found


def _difference(main: Series, other: Series) -> dict[str, Any]:
    """Return main - other: the mean over common seeds, and interval and verdict if they can be computed."""
    shared = sorted(main.values.keys() & other.values.keys())
    if not shared:
        return {}
    gaps = [main.values[seed] - other.values[seed] for seed in shared]
    found: dict[str, Any] = {"difference": float(np.mean(gaps)), "paired_seeds": shared}
    estimate = _paired(main, other)
    if estimate is None:
        return found
    gap, verdict = estimate.interval(), "no difference shown"
    if gap.excludes_zero:
        verdict = "main better" if (gap.value < 0) == (main.better == "lower") else "main worse"
    return found | {"difference": gap.value, "difference_interval": [gap.low, gap.high], "verdict": verdict}


def _paired(ours: Series, other: Series, factor: float = 1.0) -> Estimate | None:
    """Return ours - factor * other over common seeds, or None if no interval can be computed."""
    shared = sorted(ours.values.keys() & other.values.keys())
    if shared and all(seed in ours.tallies and seed in other.tallies for seed in shared):
        first, second = ([series.tallies[seed] for seed in shared] for series in (ours, other))
        return compare(first, second, factor)
    gaps = [ours.values[seed] - factor * other.values[seed] for seed in shared]
    return over_seeds(gaps) if len(shared) >= FEWEST_SEEDS and not np.isnan(gaps).any() else None


def evaluate_goals(goals: Sequence[Goal], table: Table) -> list[dict[str, Any]]:
    """Return the goals with difference, interval, p-value and whether each is met (None: not measured).

    `better` and `within N %` are one-sided tests. They are met if the p-value, Holm-corrected over all such
    goals, is below 0.025. `not worse` tests whether a is worse than b, and is met unless the uncorrected 95 %
    interval shows it: a correction would make the goal easier to meet.
    """
    found = [dataclasses.asdict(goal) | _test_goal(goal, table) for goal in goals]
    claims = [one for one in found if one["p"] is not None and one["kind"] != "not worse"]
    for one, p in zip(claims, holm([one["p"] for one in claims]), strict=True):
        one |= {"p": p, "met": p < LEVEL}
    return found


def _test_goal(goal: Goal, table: Table) -> dict[str, Any]:
    methods = table.get(goal.measure, {}).get(goal.figure, {})
    ours, other = methods.get(goal.a), methods.get(goal.b)
    gap = None if ours is None or other is None else _paired(ours, other)
    if ours is None or other is None or gap is None:
        return {"difference": None, "interval": None, "seeds": 0, "p": None, "met": None}
    low, high = gap.interval()[1:]
    seeds = len(ours.values.keys() & other.values.keys())
    found = {"difference": gap.value, "interval": [low, high], "seeds": seeds}
    is_lower = ours.better == "lower"
    if goal.kind == "not worse":
        p = 1 - gap.p_below() if is_lower else gap.p_below()
        return found | {"p": p, "met": p >= LEVEL}
    allowed = goal.margin * np.sign(np.mean(list(other.values.values())))
    bounded = _paired(ours, other, 1 + allowed if is_lower else 1 - allowed)
    assert bounded is not None, "the same series gave an interval above"
    return found | {"p": bounded.p_below() if is_lower else 1 - bounded.p_below(), "met": None}


def cell_facts(experiment: Experiment, runs: Path) -> list[dict[str, Any]]:
    """Return the training cost of every trained cell. gflops: forward pass of one sample."""
    found = []
    for cell in trained_cells(experiment, runs):
        export = experiment.folder(runs, cell) / "export"
        known = json.loads((export / "facts.json").read_text(encoding="utf8"))
        denoiser = build_denoiser(configuration.load_saved(export / "config.yaml"))
        samples, seconds = known["progress"]["samples_seen"], known["progress"]["seconds"]
        found.append(
            {
                "method": cell.method.name,
                "seed": cell.seed,
                "samples_seen": samples,
                "minutes": round(seconds / 60, 1),
                "images_per_s": round(samples / max(seconds, 1e-9), 1),
                "gflops": forward_flops(denoiser) / 1e9,
                **{key: known[key] for key in ("parameters", "machine", "versions", "digest")},
            }
        )
    return found


def watched(experiment: Experiment, runs: Path) -> dict[str, list[dict[str, Any]]]:
    """Return method -> the recorded points of its watched tasks, averaged over seeds."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for cell in trained_cells(experiment, runs):
        if points := read(experiment.folder(runs, cell) / "watched.json"):
            found.setdefault(cell.method.name, []).append(points)
    return {
        name: [mean_point(points) for points in zip(*seeds, strict=False)] for name, seeds in found.items()
    }


def mean_point(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average points at the same number of samples. Values that are missing or NaN in a point are skipped."""
    mean: dict[str, Any] = {"samples": points[0]["samples"], "seeds": len(points)}
    for kind in ("losses", "gradients", "cosines"):
        mean[kind] = {}
        for key in dict.fromkeys(key for point in points for key in point[kind]):
            values = [point[kind][key] for point in points if not np.isnan(point[kind].get(key, np.nan))]
            mean[kind][key] = float(np.mean(values)) if values else None
    return mean


def result(experiment: Experiment, runs: Path) -> dict[str, Any]:
    """Return the complete result of an experiment as plain values, as saved in OUT.json."""
    table, present = collect(experiment, runs), trained_cells(experiment, runs)
    for best in experiment.best:
        add_best(table, best)
    seed = experiment.preset.seeds[0]
    configs = {
        name: experiment.config(Cell(method, seed), Path())
        for name, method in experiment.methods.items()
        if not method.refused
    }
    trains = {cell.method.name for cell in experiment.cells() if cell.seed == seed}
    notes = {name: inert_settings(config) for name, config in configs.items() if name in trains}
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "question": experiment.question,
        "preset": experiment.preset.name,
        "command": f"mmdiff experiment {experiment.name} --preset {experiment.preset.name}",
        "main": experiment.main,
        "methods": {name: one.title for name, one in experiment.methods.items()}
        | {best.name: best.title for best in experiment.best},
        "best": {best.name: choices(best, table) for best in experiment.best},
        "missing": [cell.key for cell in experiment.cells() if cell not in present],
        "unmeasured": [cell.key for cell in present if not is_measured(experiment, cell, runs)],
        "refused": refusals(experiment),
        "notes": {name: sentences for name, sentences in notes.items() if sentences},
        "intervals": METHOD,
        "figures": summary(experiment, table),
        "goals": evaluate_goals(experiment.goals, table),
        "cells": cell_facts(experiment, runs),
        "sampling": {name: _sampling(config.evaluate) for name, config in configs.items()},
        "watched": watched(experiment, runs),
        "matrices": experiment.matrices,
    }


def _sampling(settings: EvaluateConfig) -> dict[str, Any]:
    """Return the default sampler and its network evaluations per sample. Measures may override both."""
    repeats = 1 if settings.inpaint == "given" else settings.repeats
    return {"sampler": settings.sampler, "predictions": (settings.steps - 1) * repeats + 1}


def refusals(experiment: Experiment) -> dict[str, str]:
    """Return method -> error message for the methods marked `refused`. Raises ConfigError if one is valid."""
    found = {}
    for name, method in experiment.methods.items():
        if method.refused:
            config = experiment.config(Cell(method, experiment.preset.seeds[0]), Path())
            manifests = read_sources(config)
            try:
                build_denoiser(resolve_modalities(config, manifests))
            except ConfigError as error:
                found[name] = str(error)
            else:
                raise ConfigError(
                    f"{experiment.name}, method {name}: "
                    "refused is true, but the configuration is valid; remove the key"
                )
    return found
