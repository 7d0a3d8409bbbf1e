"""The report of a sweep: one page with every figure, PNG files, a table, and the best configurations."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.plotting import save_png, to_svg
from mmdiff_ray.sweeps.findings import (
    best_first,
    front,
    groups,
    importances,
    leading,
    ranges,
    short_names,
    top,
    trained_config,
)
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.plots import COLORS, Plot, draw
from mmdiff_ray.sweeps.record import Record
from mmdiff_ray.sweeps.spec import Sweep

KEPT = 5
"""Number of best configurations to write for a single metric."""
ONE_SEED = (
    "All trials use one seed. Before you trust the best ones, repeat them with other seeds and other "
    "held-out rows."
)


def write_report(record: Record, out: Path) -> list[Path]:
    """Write `report.html`, `results.json`, `best/*.yaml` and `*.png` into a folder; return the paths.

    Replaces an earlier report. Without any trial reports, the page says so.
    """
    (out / "best").mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("*.png"), *out.glob("best/*.yaml")]:
        old.unlink()
    sweep = record.sweep
    found = {metric: importances(sweep, record.trials, metric, sweep.seed) for metric in sweep.metrics}
    results = summary(record)
    results["importances"] = {m: [dataclasses.asdict(one) for one in some] for m, some in found.items()}
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf8")
    best, plots = _write_best(record, out / "best"), draw(record, found)
    (out / "report.html").write_text(_page(record, plots, best), encoding="utf8")
    pngs = [save_png(plot.figure, out / f"{plot.name}.png", plot.title) for plot in plots]
    return [out / "best", out / "results.json", out / "report.html", *pngs]


def summary(record: Record) -> dict[str, Any]:
    """Return the findings as plain values."""
    sweep = record.sweep
    best = top(sweep, record.trials)
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
        "top": {"trials": [trial.number for trial in best], "ranges": ranges(sweep, best)},
        "trials": [
            {
                "number": trial.number,
                "outcome": trial.outcome or "unfinished",
                "samples": trial.samples,
                "figures": trial.figures,
                "values": trial.values,
                "changes": trial.changes,
                "why": trial.why,
                "reports": trial.reports,
            }
            for trial in best_first(sweep, record.trials)
        ],
    }


def chosen(record: Record) -> list[Trial]:
    """Return the trials whose configurations to write: the Pareto front, or the best for one metric."""
    found = leading(record.sweep, record.trials)
    return found if len(record.sweep.metrics) > 1 else found[:KEPT]


def verdict(record: Record) -> list[str]:
    """Return the findings as sentences."""
    heading, values = _ranges(record)
    return [*_headlines(record), *(f"{heading}, {key}: {text}." for key, text in values.items()), ONE_SEED]


def _headlines(record: Record) -> list[str]:
    sweep, best = record.sweep, chosen(record)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in _counts(record).items())
    samples = sum(trial.samples for trial in record.trials)
    lines = [f"{len(record.trials)} trials ({counts}), {samples:,} samples."]
    if not best:
        lines.append("No trial has finished yet.")
    elif len(sweep.metrics) > 1:
        count = f"{len(best)} trials are" if len(best) > 1 else "1 trial is"
        lines.append(f"{count} on the Pareto front.")
        lines += [f"Trial {trial.number}: {_metrics(trial)}." for trial in best[:KEPT]]
    else:
        runner_up = f" (next: {best[1].figures[sweep.main]:.4g})" if len(best) > 1 else ""
        lines.append(f"Best: trial {best[0].number} with {_metrics(best[0])}{runner_up}.")
    for trial in (one for one in record.trials if sweep.is_baseline(one.number)):
        ended = f", {trial.outcome or 'unfinished'} at {trial.samples:,} samples"
        how = "" if trial.outcome == "finished" else ended
        found = _metrics(trial) or trial.why or "no report yet"
        lines.append(f"The base configuration itself (trial {trial.number}{how}): {found}.")
    return lines


def _ranges(record: Record) -> tuple[str, dict[str, str]]:
    """Return a heading, and key -> range of values of the best trials."""
    sweep = record.sweep
    best, names, found = top(sweep, record.trials), short_names(list(sweep.space)), {}
    for key, ends in ranges(sweep, best).items():
        is_choice = bool(sweep.space[key].values)
        texts = ends if is_choice else list(dict.fromkeys(f"{end:.3g}" for end in ends))
        found[names[key]] = (", " if is_choice else " to ").join(texts)
    at_end = " at the end" if any(trial.changes for trial in best) else ""
    return f"Values{at_end} of the best {len(best)} by {sweep.main}", found


def _counts(record: Record) -> dict[str, int]:
    outcomes = [trial.outcome or "unfinished" for trial in record.trials]
    return {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}


def _metrics(trial: Trial) -> str:
    return ", ".join(f"{metric} {value:.4g}" for metric, value in trial.figures.items())


def _write_best(record: Record, folder: Path) -> list[Path]:
    written = []
    for rank, trial in enumerate(chosen(record), 1):
        config = trained_config(record, trial)
        if config is not None:
            file = folder / f"{rank}-trial-{trial.number}.yaml"
            head = f"# Trial {trial.number} of {record.name}: {_metrics(trial)}\n# mmdiff train {file.name}\n"
            file.write_text(head + configuration.to_yaml(config), encoding="utf8")
            written.append(file)
    return written


def _page(record: Record, plots: Sequence[Plot], best: Sequence[Path]) -> str:
    """Return the HTML page, which is self-contained: no other files, no network."""
    sweep, trials = record.sweep, record.trials
    names, group = short_names(list(sweep.space)), groups(sweep, trials)
    heading, values = _ranges(record)
    origin = [record.name, sweep.searcher.name, sweep.scheduler.name, f"seed {sweep.seed}"]
    rows = [_row(sweep, trial, names, group[trial.number]) for trial in best_first(sweep, trials)]
    heads = ["trial", "outcome", "samples", *sweep.metrics, *names.values()]
    heads = [escape(head).replace(".", ".<wbr>").replace("/", "/<wbr>") for head in heads]
    figures = [
        f"<section><h2>{escape(plot.title)}</h2><p>{escape(plot.caption)}</p>"
        f"{to_svg(plot.figure, plot.name)}</section>"
        for plot in plots
    ]
    parts = {
        "name": escape(record.name),
        "title": escape(sweep.title),
        "origin": escape(" · ".join([*origin, record.made.get("command", "")]).removesuffix(" · ")),
        "summary": "".join(f"<p>{escape(line)}</p>" for line in [*_headlines(record), ONE_SEED]),
        "commands": escape("\n".join(f"mmdiff train best/{file.name}" for file in best)),
        "heads": "".join(f"<th>{head}</th>" for head in heads),
        "trials": "\n".join(rows),
        "heading": escape(heading),
        "ranges": "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in values.items()),
        "figures": "\n".join(figures),
    }
    page = files("mmdiff_ray.sweeps").joinpath("report.html").read_text(encoding="utf8")
    return re.sub("@([a-z]+)@", lambda match: parts[match[1]], page)


def _row(sweep: Sweep, trial: Trial, names: Mapping[str, str], group: str) -> str:
    figures = trial.figures
    values = [*(figures.get(metric) for metric in sweep.metrics), *(trial.now.get(key) for key in names)]
    texts = ["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
    number = f"{trial.number}{' (base)' * sweep.is_baseline(trial.number)}"
    cells = [escape(text) for text in (number, group, f"{trial.samples:,}", *texts)]
    cells[1] = f"<i style='background:{COLORS[group]}'></i>{cells[1]}"
    return f"<tr data-trial='{trial.number}'><td>{'</td><td>'.join(cells)}</td></tr>"
