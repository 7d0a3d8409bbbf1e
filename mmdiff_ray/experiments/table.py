"""From cells to a table: means over seeds, intervals, paired differences to the main method."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.denoiser import build_denoiser, inert_settings
from mmdiff_ray.evaluation.statistics import Tally, difference, interval
from mmdiff_ray.experiments.cell import cell_folder, measured_file
from mmdiff_ray.experiments.spec import Cell, Experiment, Method


@dataclass
class Series:
    """A figure of a method (or of a rule without a model) over seeds."""

    better: str = ""
    values: dict[int, float] = field(default_factory=dict)
    tallies: dict[int, Tally] = field(default_factory=dict)


Table = dict[str, dict[str, dict[str, Series]]]
"""measure -> figure -> method or `rule: NAME` -> series."""


def collect(experiment: Experiment, runs: Path) -> Table:
    """Return what was measured so far."""
    table: Table = {}
    for cell in experiment.cells():
        folder = cell_folder(experiment, cell, runs)
        for method in experiment.askers(cell.method):
            for wanted in experiment.measures_of(method):
                file = measured_file(folder, method, wanted)
                if file.is_file():
                    _add(table.setdefault(wanted.name, {}), method, cell.seed, file, experiment.main)
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
                if f"{key}|{name}|numerator" in tallies:
                    parts = (tallies[f"{key}|{name}|{part}"] for part in ("numerator", "denominator"))
                    series.tallies[seed] = Tally(*parts)


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
    }
    if len(series.tallies) == len(values):
        found["interval"] = list(interval([series.tallies[seed] for seed in sorted(series.tallies)])[1:])
        found["rows"] = len(next(iter(series.tallies.values())))
    return found


def _against(main: Series, other: Series) -> dict[str, Any]:
    """Return main - other: the mean over the seeds that both have; its interval where it can be had."""
    shared = sorted(main.values.keys() & other.values.keys())
    if not shared:
        return {}
    gap = float(np.mean([main.values[seed] - other.values[seed] for seed in shared]))
    found: dict[str, Any] = {"difference": gap, "paired_seeds": shared}
    if all(seed in main.tallies and seed in other.tallies for seed in shared):
        gap, low, high = difference(
            [main.tallies[seed] for seed in shared], [other.tallies[seed] for seed in shared]
        )
        good = -1 if main.better == "lower" else 1
        verdict = "no difference shown"
        if low > 0 or high < 0:
            verdict = "main better" if gap * good > 0 else "main worse"
        found |= {"difference": gap, "difference_interval": [low, high], "verdict": verdict}
    return found


def facts(experiment: Experiment, runs: Path) -> list[dict[str, Any]]:
    """Return how every trained cell was made: samples, minutes, parameters, machine, versions."""
    found = []
    for cell in experiment.cells():
        file = cell_folder(experiment, cell, runs) / "export" / "facts.json"
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf8"))
            progress = known["progress"]
            found.append(
                {
                    "method": cell.method.name,
                    "seed": cell.seed,
                    "samples_seen": progress["samples_seen"],
                    "minutes": round(progress["seconds"] / 60, 1),
                    "images_per_s": round(progress["samples_seen"] / max(progress["seconds"], 1e-9), 1),
                    **{key: known[key] for key in ("parameters", "machine", "versions", "digest")},
                }
            )
    return found


def result(experiment: Experiment, runs: Path) -> dict[str, Any]:
    """Return the whole result of an experiment as plain values."""
    table, done = collect(experiment, runs), facts(experiment, runs)
    trained = {(fact["method"], fact["seed"]) for fact in done}
    missing = [cell.key for cell in experiment.cells() if (cell.method.name, cell.seed) not in trained]
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "question": experiment.question,
        "preset": experiment.preset.name,
        "command": f"mmdiff experiment {experiment.name} --preset {experiment.preset.name}",
        "main": experiment.main,
        "methods": {name: method.title for name, method in experiment.methods.items()},
        "missing": missing,
        "refused": refusals(experiment),
        "notes": notes(experiment),
        "figures": summary(experiment, table),
        "cells": done,
    }


def refusals(experiment: Experiment) -> dict[str, str]:
    """Return the words with which the methods that are there to be refused are.

    Raises ConfigError for one that is not.
    """
    found = {}
    for method in experiment.methods.values():
        if method.refused:
            config = experiment.config(Cell(method, experiment.preset.seeds[0]), Path())
            try:
                build_denoiser(resolve_modalities(config, read_sources(config)))
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


def markdown(values: Mapping[str, Any]) -> str:
    """Return a result as a page: a table for every measure, methods in rows and figures in columns."""
    lines = [f"# {values['title']}", "", values["question"], ""]
    seeds = sorted({cell["seed"] for cell in values["cells"]})
    main = values["methods"][values["main"]]
    lines += [
        f"`{values['command']}`, seeds {', '.join(map(str, seeds))}. Mean over seeds, plus or minus their "
        f"standard deviation. Marked ▲ where **{main}** is better, ▼ where it is worse: the 95 % interval of "
        "the paired difference, bootstrapped over rows and seeds, excludes 0.",
        "",
    ]
    if values["missing"]:
        lines += [f"Not trained yet: {', '.join(values['missing'])}.", ""]
    for name, why in values["refused"].items():
        lines += [f"Refused: {values['methods'][name]}. {why}", ""]
    for name, sentences in values["notes"].items():
        lines += [f"Inert: {values['methods'][name]}. {' '.join(sentences)}", ""]
    by_measure: dict[str, list[Mapping[str, Any]]] = {}
    for line in values["figures"]:
        by_measure.setdefault(line["measure"], []).append(line)
    for measure, found in by_measure.items():
        keys = list(dict.fromkeys(line["figure"] for line in found))
        keys = [key for key in keys if not _aside(key)] or [key for key in keys if _is_bound(key)]
        cells = {(line["method"], line["figure"]): line for line in found}
        better = {line["figure"]: "↑" if line["better"] == "higher" else "↓" for line in found}
        lines += [f"## {measure}", "", "| | " + " | ".join(f"{key} {better[key]}" for key in keys) + " |"]
        lines += ["|---|" + "---|" * len(keys)]
        for method in dict.fromkeys(line["method"] for line in found):
            title = values["methods"].get(method, method)
            row = [_cell(cells.get((method, key))) for key in keys]
            lines.append(f"| {title} | " + " | ".join(row) + " |")
        real = [
            line for line in found if "/real_" in line["figure"] or line["figure"].endswith("judged_real")
        ]
        said = {line["figure"]: f"{line['figure']} {line['mean']:.3f}" for line in real}
        lines += ["", f"Of real images: {', '.join(said.values())}.", ""] if said else [""]
    lines += [
        "## Cost",
        "",
        "| method | samples | minutes | images/s | parameters | machine |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(cell["method"] for cell in values["cells"]):
        same = [cell for cell in values["cells"] if cell["method"] == method]
        mean = {
            key: np.mean([cell[key] for cell in same]) for key in ("samples_seen", "minutes", "images_per_s")
        }
        lines.append(
            f"| {values['methods'][method]} | {mean['samples_seen']:,.0f} | {mean['minutes']:.1f} | "
            f"{mean['images_per_s']:.0f} | {same[0]['parameters']:,} | {same[0]['machine']} |"
        )
    return "\n".join([*lines, ""])


def _is_bound(figure: str) -> bool:
    return figure.split("/")[-1] in ("l0_nats", "l1_nats", "l2_nats", "l3_nats")


def _aside(figure: str) -> bool:
    """Return whether a figure stands beside the table: terms of the bound in JSON, those of real images
    below."""
    return figure.endswith(("_nats", "judged_real")) or "/real_" in figure


def _cell(line: Mapping[str, Any] | None) -> str:
    if line is None or math.isnan(line["mean"]):
        return ""
    spread = "" if line["spread"] is None else f" ± {line['spread']:.3f}"
    mark = {"main better": " ▲", "main worse": " ▼"}.get(line.get("verdict", ""), "")
    return f"{line['mean']:.3f}{spread}{mark}"
