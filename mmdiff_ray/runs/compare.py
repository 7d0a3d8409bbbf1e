"""Compare runs: their figures with paired intervals, their settings, and what they sample side by side."""

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmdiff_ray import config as configuration
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.data.check import read_sources
from mmdiff_ray.evaluation.context import Context
from mmdiff_ray.evaluation.grids import Panel, grid
from mmdiff_ray.evaluation.statistics import Interval, difference
from mmdiff_ray.evaluation.tallies import load_tally
from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs.job import make_reader, read_run
from mmdiff_ray.sampling.export import load_export, read_config
from mmdiff_ray.storage.filesystem import join

FIGURES, TALLIES = "evaluation.json", "evaluation.npz"
APART = ("name", "runs", "tracking.")
"""Keys that say where a run lies, not what it is."""
ROWS = 6
"""Samples per picture."""


class Line(NamedTuple):
    """A figure of several runs. values: one per run, None where it has none. differences: of every further
    run from the first, with a 95 % interval where both have it by row, for the same rows."""

    key: str
    better: str
    values: list[float | None]
    differences: list[float | Interval | None]


def compare_figures(folders: Sequence[Path]) -> list[Line]:
    """Return the figures that any of the runs has, those of all runs first."""
    found = [_figures(folder) for folder in folders]
    tallies = [_tallies(folder) for folder in folders]
    lines = []
    for key in dict.fromkeys(key for one in found for key in one):
        values = [one[key]["value"] if key in one else None for one in found]
        better = next(one[key]["better"] for one in found if key in one)
        gaps = [_difference(key, values, tallies, other) for other in range(1, len(folders))]
        lines.append(Line(key, better, values, gaps))
    return sorted(lines, key=lambda line: None in line.values)


def _figures(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / FIGURES
    figures = json.loads(file.read_text(encoding="utf8"))["figures"] if file.is_file() else []
    return {figure["key"]: figure for figure in figures}


def _tallies(folder: Path) -> Mapping[str, np.ndarray]:
    if (mirror := runs.mirror_of(folder)) is not None:
        mirror.fetch(TALLIES)
    if not (folder / TALLIES).is_file():
        return {}
    with np.load(folder / TALLIES) as arrays:
        return dict(arrays) | {"data": np.array(read_run(folder)["datasets"])}


def _difference(
    key: str, values: Sequence[float | None], tallies: Sequence[Mapping[str, np.ndarray]], other: int
) -> float | Interval | None:
    first, second = values[0], values[other]
    if first is None or second is None:
        return None
    ours, theirs = (load_tally(tallies[index], key, "model") for index in (other, 0))
    if ours is None or theirs is None or not np.array_equal(tallies[0]["data"], tallies[other]["data"]):
        return second - first
    try:
        return difference([ours], [theirs])
    except ValueError:  # of other rows
        return second - first


def compare_configs(folders: Sequence[Path]) -> dict[str, list[Any]]:
    """Return the keys whose values differ, key -> one value per run."""
    plain = [configuration.flatten(configuration.load_saved(folder / "config.yaml")) for folder in folders]
    keys = dict.fromkeys(key for one in plain for key in one if not key.startswith(APART))
    found = {key: [one.get(key) for one in plain] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def compare_pictures(folders: Sequence[Path], rows: int = ROWS) -> dict[str, Image.Image]:
    """Return pictures of the runs' samples by title: from noise, by the same seed; and, where all runs have
    the same data, given each modality of the same held-out rows that every run can be given alone."""
    contexts = [_context(folder, read_config(_export(folders[0])).seed, rows) for folder in folders]
    names = [folder.name for folder in folders]
    pictures = {"from noise": _picture([], contexts, names)}
    if any(read_run(folder)["datasets"] != read_run(folders[0])["datasets"] for folder in folders):
        return pictures
    for name in contexts[0].denoiser.modalities:
        if all(name in one.denoiser.modalities and _answers(one, name) for one in contexts):
            pictures[f"given {name}"] = _picture([name], contexts, names)
    return pictures


def _export(folder: Path) -> str:
    return join(runs.address(folder), "export")


def _context(folder: Path, seed: int, rows: int) -> Context:
    """Return a run's model with held-out rows, and with a seed in place of its own."""
    config = dataclasses.replace(read_config(_export(folder)), seed=seed)
    model = load_export(_export(folder), config=config)
    manifests = read_sources(config)
    splits = [manifest.splits[config.evaluate.split] for manifest in manifests]
    (batch,) = split_batches(make_reader(config, model.denoiser), splits, rows, rows)
    return Context(model, batch.where(batch.real), manifests[0].columns)


def _answers(context: Context, given: str) -> list[str]:
    """Return what a model is trained to generate from one given modality, as for `evaluate`."""
    rows = context.rows_with(given)
    return [name for name in context.denoiser.modalities if rows.all() and context.trained(name, given)]


def _picture(given: list[str], contexts: Sequence[Context], names: Sequence[str]) -> Image.Image:
    """Return one picture: what is given, then the samples of every run."""
    first, batch = contexts[0], contexts[0].batch
    panels = [Panel.of(first.denoiser.modalities[name], name, batch.data[name], "given") for name in given]
    for context, title in zip(contexts, names, strict=True):
        drawn = context.sampled(*given).data
        panels += [
            Panel.of(modality, name, drawn[name], title)
            for name, modality in context.denoiser.modalities.items()
            if name in drawn and name not in given
        ]
    return grid(panels, title=f"given {given[0]}" if given else "from noise")


def write_page(
    out: Path,
    names: Sequence[str],
    lines: Sequence[Line],
    settings: Mapping[str, Sequence[Any]],
    pictures: Mapping[str, Image.Image],
) -> Path:
    """Write a comparison as `index.html` with its pictures beside it, and return the page."""
    out.mkdir(parents=True, exist_ok=True)
    shown = []
    for title, picture in pictures.items():
        file = f"{title.replace(' ', '_')}.png"
        (out / file).write_bytes(to_png(picture))
        shown.append(
            f'<h2>{html.escape(title)}</h2><img src="{html.escape(file)}" alt="{html.escape(title)}">'
        )
    heads = ["figure", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    figures = [cells(line) for line in lines]
    page = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(' and '.join(names))}</title>",
        "<style>body{font:15px sans-serif;margin:2em auto;max-width:70em}img{max-width:100%}"
        "td,th{padding:.2em 1em;text-align:left}</style>",
        f"<h1>{html.escape(' and '.join(names))}</h1>",
        "<h2>Figures</h2>",
        _html_table(heads, figures),
        "<h2>Settings that differ</h2>",
        _html_table(["key", *names], [[key, *map(str, values)] for key, values in settings.items()]),
        *shown,
    ]
    (out / "index.html").write_text("\n".join(page), encoding="utf8")
    return out / "index.html"


def cells(line: Line) -> list[str]:
    """Return a line as texts: figure, values, differences with their intervals."""
    arrow = "\N{UPWARDS ARROW}" if line.better == "higher" else "\N{DOWNWARDS ARROW}"
    found = [f"{line.key} {arrow}", *("" if value is None else f"{value:.4g}" for value in line.values)]
    for gap in line.differences:
        if isinstance(gap, Interval):
            found.append(f"{gap.value:+.3g} ({gap.low:+.3g} to {gap.high:+.3g})")
        else:
            found.append("" if gap is None else f"{gap:+.3g}")
    return found


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = [("th", heads), *(("td", row) for row in rows)]
    made = ["".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row) for tag, row in body]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in made) + "</table>"
