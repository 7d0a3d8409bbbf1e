"""From cells to a result: means over seeds, intervals, paired differences to the main method, costs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.evaluation.statistics import (
    FEWEST_SEEDS,
    METHOD,
    Estimate,
    Interval,
    Tally,
    by_row,
    compare,
    holm,
    interval,
    over_seeds,
)
from mmdiff_ray.experiments.cell import asked_of, cell_folder, is_measured
from mmdiff_ray.experiments.spec import Cell, Experiment, Goal, Method
from mmdiff_ray.experiments.tallies import load_tally
from mmdiff_ray.experiments.watch import read
from mmdiff_ray.models.cost import forward_flops
from mmdiff_ray.models.denoiser import build_denoiser, inert_settings


@dataclass
class Series:
    """A figure of a method (or of a rule without a model) over seeds."""

    better: str = ""
    values: dict[int, float] = field(default_factory=dict)
    tallies: dict[int, Tally] = field(default_factory=dict)


LEVEL = 0.025
"""Of one-sided tests: one side of a 95 % interval."""
Table = dict[str, dict[str, dict[str, Series]]]
"""measure -> figure -> method or `rule: NAME` -> series."""


def trained(experiment: Experiment, runs: Path) -> list[Cell]:
    """Return the cells that were trained to their end."""
    return [
        cell
        for cell in experiment.cells()
        if (cell_folder(experiment, cell, runs) / "export" / "facts.json").is_file()
    ]


def collect(experiment: Experiment, runs: Path) -> Table:
    """Return what was measured so far, with the settings that are asked for now."""
    table: Table = {}
    for cell in trained(experiment, runs):
        for asked in asked_of(experiment, cell, runs):
            if asked.taken:
                figures = table.setdefault(asked.measure.name, {})
                _add(figures, asked.method, cell.seed, asked.file, experiment.main)
    return table


def _add(figures: dict[str, dict[str, Series]], method: Method, seed: int, file: Path, main: str) -> None:
    with np.load(file.with_suffix(".npz")) as tallies:
        for figure in json.loads(file.read_text(encoding="utf8"))["figures"]:
            key = figure["key"]
            rules = figure["floors"] if method.name == main else {}
            for name, value in {"model": figure["value"], **rules}.items():
                label = method.name if name == "model" else f"rule: {name}"
                series = figures.setdefault(key, {}).setdefault(label, Series(figure["better"]))
                series.values[seed] = value
                if (tally := load_tally(tallies, key, name)) is not None:
                    series.tallies[seed] = tally


def summary(experiment: Experiment, table: Table) -> list[dict[str, Any]]:
    """Return a line for every figure of every method: mean, spread over seeds, interval, and the difference
    main - method with its interval."""
    lines = []
    for measure, figures in table.items():
        for key, methods in figures.items():
            main = methods.get(experiment.main)
            for name, series in methods.items():
                lines.append(
                    {"measure": measure, "figure": key, "method": name, "better": series.better}
                    | _numbers(series)
                    | (_against(main, series) if main is not None and main is not series else {})
                )
    return lines


def _numbers(series: Series) -> dict[str, Any]:
    values = list(series.values.values())
    found: dict[str, Any] = {
        "mean": float(np.mean(values)),
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "seeds": sorted(series.values),
        "values": [series.values[seed] for seed in sorted(series.values)],
    }
    if len(series.tallies) == len(values):
        found["interval"] = list(interval([series.tallies[seed] for seed in sorted(series.tallies)])[1:])
        found["rows"] = len(by_row(list(series.tallies.values()))[0])
    return found


def _against(main: Series, other: Series) -> dict[str, Any]:
    """Return main - other: the mean over the seeds that both have; its interval where it can be had."""
    shared = sorted(main.values.keys() & other.values.keys())
    if not shared:
        return {}
    gaps = [main.values[seed] - other.values[seed] for seed in shared]
    found: dict[str, Any] = {"difference": float(np.mean(gaps)), "paired_seeds": shared}
    estimate = _paired(main, other)
    return found if estimate is None else found | _verdict(estimate.interval(), main.better)


def _paired(ours: Series, other: Series, factor: float = 1.0) -> Estimate | None:
    """Return ours - factor * other over the seeds that both have; None where no interval can be had."""
    shared = sorted(ours.values.keys() & other.values.keys())
    if shared and all(seed in ours.tallies and seed in other.tallies for seed in shared):
        first, second = ([series.tallies[seed] for seed in shared] for series in (ours, other))
        return compare(first, second, factor)
    gaps = [ours.values[seed] - factor * other.values[seed] for seed in shared]
    return over_seeds(gaps) if len(shared) >= FEWEST_SEEDS and not np.isnan(gaps).any() else None


def evaluate_goals(goals: Sequence[Goal], table: Table) -> list[dict[str, Any]]:
    """Return the goals with difference, interval, p-value and whether each is met (None: not measured).

    `better` and `within N %` are one-sided tests, met where the p-value after Holm's correction for all of
    them is below 0.025, as for a 95 % interval. `not worse` is met unless the uncorrected interval shows a to
    be worse: correction would make it easier to meet. Its p-value is that of a being worse.
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


def _verdict(gap: Interval, better: str) -> dict[str, Any]:
    verdict = "no difference shown"
    if gap.excludes_zero:
        verdict = "main better" if (gap.value < 0) == (better == "lower") else "main worse"
    return {"difference": gap.value, "difference_interval": [gap.low, gap.high], "verdict": verdict}


def facts(experiment: Experiment, runs: Path) -> list[dict[str, Any]]:
    """Return how every trained cell was made: samples, minutes, parameters, GFLOP of a sample's forward pass,
    machine, versions."""
    found = []
    for cell in trained(experiment, runs):
        export = cell_folder(experiment, cell, runs) / "export"
        known = json.loads((export / "facts.json").read_text(encoding="utf8"))
        progress = known["progress"]
        found.append(
            {
                "method": cell.method.name,
                "seed": cell.seed,
                "samples_seen": progress["samples_seen"],
                "minutes": round(progress["seconds"] / 60, 1),
                "images_per_s": round(progress["samples_seen"] / max(progress["seconds"], 1e-9), 1),
                "gflops": forward_flops(build_denoiser(configuration.load_saved(export / "config.yaml")))
                / 1e9,
                **{key: known[key] for key in ("parameters", "machine", "versions", "digest")},
            }
        )
    return found


def sampling(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Return how each method's samples are drawn where a measure does not say otherwise: method -> `sampler`,
    and `predictions` of the network for a sample."""
    found = {}
    for name, method in experiment.methods.items():
        if method.refused:
            continue
        asked = experiment.config(Cell(method, experiment.preset.seeds[0]), Path()).evaluate
        repeats = 1 if asked.inpaint == "given" else asked.repeats
        found[name] = {"sampler": asked.sampler, "predictions": (asked.steps - 1) * repeats + 1}
    return found


def watched(experiment: Experiment, runs: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what was seen of the watched tasks, method -> points, each the mean over seeds: `samples`, and
    `losses`, `gradients`, `cosines` by name. What still trains has fewer points, and is left out."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for cell in trained(experiment, runs):
        points = read(cell_folder(experiment, cell, runs) / "watched.json")
        if points:
            found.setdefault(cell.method.name, []).append(points)
    return {
        name: [mean_point(points) for points in zip(*seeds, strict=False)] for name, seeds in found.items()
    }


def mean_point(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of points at the same number of samples; of values that are not all NaN, over the
    points that have them."""
    mean: dict[str, Any] = {"samples": points[0]["samples"], "seeds": len(points)}
    for kind in ("losses", "gradients", "cosines"):
        mean[kind] = {}
        for key in dict.fromkeys(key for point in points for key in point[kind]):
            values = [point[kind][key] for point in points if not np.isnan(point[kind].get(key, np.nan))]
            mean[kind][key] = float(np.mean(values)) if values else None
    return mean


def result(experiment: Experiment, runs: Path) -> dict[str, Any]:
    """Return the whole result of an experiment as plain values."""
    table, present = collect(experiment, runs), trained(experiment, runs)
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "question": experiment.question,
        "preset": experiment.preset.name,
        "command": f"mmdiff experiment {experiment.name} --preset {experiment.preset.name}",
        "main": experiment.main,
        "methods": {name: method.title for name, method in experiment.methods.items()},
        "missing": [cell.key for cell in experiment.cells() if cell not in present],
        "unmeasured": [cell.key for cell in present if not is_measured(experiment, cell, runs)],
        "refused": refusals(experiment),
        "notes": notes(experiment),
        "intervals": METHOD,
        "figures": summary(experiment, table),
        "goals": evaluate_goals(experiment.goals, table),
        "cells": facts(experiment, runs),
        "sampling": sampling(experiment),
        "watched": watched(experiment, runs),
        "matrices": experiment.matrices,
    }


def refusals(experiment: Experiment) -> dict[str, str]:
    """Return the words with which the methods that are there to be refused are.

    Raises ConfigError for one that is not.
    """
    found = {}
    for method in experiment.methods.values():
        if method.refused:
            config = experiment.config(Cell(method, experiment.preset.seeds[0]), Path())
            manifests = read_sources(config)
            try:
                build_denoiser(resolve_modalities(config, manifests))
            except ConfigError as error:
                found[method.name] = str(error)
            else:
                raise ConfigError(f"{experiment.name}, method {method.name}: it is not refused, as it says")
    return found


def notes(experiment: Experiment) -> dict[str, list[str]]:
    """Return what changes nothing in the configuration of each method, where anything does not."""
    first = [cell for cell in experiment.cells() if cell.seed == experiment.preset.seeds[0]]
    found = {cell.method.name: inert_settings(experiment.config(cell, Path())) for cell in first}
    return {name: sentences for name, sentences in found.items() if sentences}
