"""The report of a sweep: a page with all pictures, PNGs, a table, and the best configurations as YAML."""

import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.sweeps.drawing import Drawn, short
from mmdiff_ray.sweeps.figures import draw
from mmdiff_ray.sweeps.findings import (
    AT_END,
    best_first,
    figures_of,
    front,
    importances,
    leading,
    ranges,
    top,
    trained_config,
)
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.record import Record

KEPT = 5
"""Best configurations that are written."""


def write_report(record: Record, out: Path) -> list[Path]:
    """Write a sweep's report into a folder: `report.html`, `results.json`, `best/*.yaml`, `*.png`.

    Returns the files. A sweep that found nothing yet gives a page that says so. An earlier one is replaced.
    """
    out.mkdir(parents=True, exist_ok=True)
    sweep = record.sweep
    found = {metric: importances(sweep, record.trials, metric, sweep.seed) for metric in sweep.metrics}
    pictures = draw(record, found)
    for old in [*out.glob("*.png"), *out.glob("best/*.yaml")]:
        old.unlink()
    files = [_write_best(record, out), out / "results.json", out / "report.html"]
    results = summary(record)
    results["importances"] = {m: [dataclasses.asdict(i) for i in some] for m, some in found.items()}
    files[1].write_text(json.dumps(results, indent=1), encoding="utf8")
    files[2].write_text(_page(record, pictures), encoding="utf8")
    for picture in pictures:
        files.append(out / f"{picture.name}.png")
        picture.png.savefig(files[-1], dpi=110, bbox_inches="tight")  # long names at the axes, too
    return files


def summary(record: Record) -> dict[str, Any]:
    """Return what was found as plain values."""
    sweep = record.sweep
    ordered = best_first(sweep, record.trials)
    return {
        "sweep": sweep.name,
        "title": sweep.title,
        **record.made,
        "metrics": sweep.metrics,
        "samples": sum(trial.samples for trial in record.trials),
        "searcher": sweep.searcher.name,
        "scheduler": sweep.scheduler.name,
        "seed": sweep.seed,
        "outcomes": _counts(record),
        "front": [trial.number for trial in front(sweep, record.trials)],
        "top": {
            "trials": [trial.number for trial in top(sweep, record.trials)],
            "ranges": ranges(sweep, top(sweep, record.trials)),
        },
        "trials": [
            {
                "number": trial.number,
                "outcome": trial.outcome or "unfinished",
                "samples": trial.samples,
                "figures": figures_of(trial),
                "values": trial.values,
                "changes": trial.changes,
                "why": trial.why,
                "reports": trial.reports,
            }
            for trial in ordered
        ],
    }


def _counts(record: Record) -> dict[str, int]:
    outcomes = [trial.outcome or "unfinished" for trial in record.trials]
    return {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}


def chosen(record: Record) -> list[Any]:
    """Return the trials whose configurations are worth keeping: the front of several metrics, else the best
    few."""
    found = leading(record.sweep, record.trials)
    return found if len(record.sweep.metrics) > 1 else found[:KEPT]


def _write_best(record: Record, out: Path) -> Path:
    folder = out / "best"
    folder.mkdir(exist_ok=True)
    for rank, trial in enumerate(chosen(record), 1):
        config = trained_config(record, trial)
        if config is not None:
            file = folder / f"{rank}-trial-{trial.number}.yaml"
            head = f"# Trial {trial.number} of {record.name}: {_told(trial)}\n# mmdiff train {file.name}\n"
            file.write_text(head + configuration.to_yaml(config), encoding="utf8")
    return folder


def _told(trial: Trial) -> str:
    return ", ".join(f"{metric} {value:.4g}" for metric, value in figures_of(trial).items())


def verdict(record: Record) -> list[str]:
    """Return what the sweep says, in sentences."""
    sweep, best = record.sweep, chosen(record)
    said = ", ".join(f"{count} {outcome}" for outcome, count in _counts(record).items())
    spent = sum(trial.samples for trial in record.trials)
    lines = [f"{len(record.trials)} trials ({said}) saw {spent:,} samples."]
    if not best:
        return [*lines, "No trial has finished: nothing can be said yet."]
    names = short(list(sweep.space))
    if len(sweep.metrics) > 1:
        lines.append(
            f"{len(best)} lie on the front: no other trial is as good in every metric and better in one."
        )
        lines += [f"Trial {trial.number}: {_told(trial)}." for trial in best[:KEPT]]
    else:
        second = f"; the next: {figures_of(best[1])[sweep.main]:.4g}" if len(best) > 1 else ""
        lines.append(f"Best: trial {best[0].number} with {_told(best[0])}{second}.")
    lines += [
        f"The base configuration itself{_base(trial)}."
        for trial in record.trials
        if sweep.is_baseline(trial.number)
    ]
    leading = top(sweep, record.trials)
    at = AT_END * any(trial.changes for trial in leading)
    for key, ends in ranges(sweep, leading).items():
        words = map(str, ends) if sweep.space[key].values else dict.fromkeys(f"{end:.3g}" for end in ends)
        said = (", " if sweep.space[key].values else " to ").join(words)
        lines.append(f"{names[key]} of the best {len(leading)} by {sweep.main}{at}: {said}.")
    lines.append(
        "All trials had one seed: how much is chance, other seeds of the best configurations would tell, on "
        "rows that they were not chosen by."
    )
    return lines


def _base(trial: Trial) -> str:
    """Return what became of the trial of the base configuration, in words."""
    how = (
        ""
        if trial.outcome == "finished"
        else f", {trial.outcome or 'unfinished'} at {trial.samples:,} samples"
    )
    return f" (trial {trial.number}{how}): {_told(trial) or trial.why or 'no figures yet'}"


def _page(record: Record, pictures: Sequence[Drawn]) -> str:
    """Return the page: verdict, table, interactive pictures; it needs no other file and no network."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>{html.escape(record.name)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(record.sweep.title)}</h1>",
        *[f"<p>{html.escape(line)}</p>" for line in verdict(record)],
        _table(record),
    ]
    for index, picture in enumerate(pictures):
        script = index == 0  # the library once, in the page itself
        parts.append(picture.html.to_html(full_html=False, include_plotlyjs=script, default_height="480px"))
    return "\n".join([*parts, "</html>"])


def _table(record: Record) -> str:
    sweep = record.sweep
    names = short(list(sweep.space))
    on_front = [trial.number for trial in front(sweep, record.trials)] if len(sweep.metrics) > 1 else []
    heads = ["trial", "outcome", "samples", *sweep.metrics, *names.values()]
    rows = []
    for trial in best_first(sweep, record.trials):
        figures = figures_of(trial)
        outcome = "on the front" if trial.number in on_front else trial.outcome or "unfinished"
        cells = [
            f"{trial.number}{' (base)' * sweep.is_baseline(trial.number)}",
            outcome,
            f"{trial.samples:,}",
        ]
        cells += [f"{figures[metric]:.4g}" if metric in figures else "" for metric in sweep.metrics]
        cells += [_cell(trial.now.get(key)) for key in names]
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(word)}</th>" for word in heads)
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
.wide { overflow-x: auto; margin: 1.5rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:nth-child(2), td:nth-child(2) { text-align: left }
"""
