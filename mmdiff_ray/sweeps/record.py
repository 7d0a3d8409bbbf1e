"""A sweep read back from MLflow alone: what it was, and what became of its trials."""

import json
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.spec import Sweep, load_sweep
from mmdiff_ray.tracking import queries


@dataclass(frozen=True)
class Record:
    """A sweep as MLflow knows it.

    run_id: of the sweep's own run. trials: those that began, by number. configs: number -> the
    configuration that a trial began with. times: number -> when it began and ended, in seconds since the
    epoch (None: it has not). made: how it was made: command, machine, versions, revision of the code.
    """

    sweep: Sweep
    run_id: str
    name: str
    trials: list[Trial]
    configs: dict[int, Config]
    times: dict[int, tuple[float, float | None]]
    made: dict[str, Any]


def read_record(uri: str, reference: str) -> Record:
    """Return the sweep of a run's name or id. Raises ConfigError where that run is no sweep."""
    parent = queries.find_run(uri, reference)
    with tempfile.TemporaryDirectory() as place:
        file = queries.artifact(uri, parent.info.run_id, "sweep.yaml", Path(place))
        if file is None:
            raise ConfigError(f"{reference}: this run is no sweep (it has no sweep.yaml)")
        sweep = load_sweep(file)
        trials: dict[int, Trial] = {}
        configs, times = {}, {}
        for run in queries.children(uri, parent):
            number = int(run.data.tags.get("mmdiff.trial", -1))
            if number < 0:
                continue
            # Where a process died while its run began, a second run took its number: the newest counts.
            trials[number] = _trial(uri, run, number, sweep)
            text = queries.artifact(uri, run.info.run_id, "config.yaml", Path(place))
            if text is not None:
                configs[number] = configuration.load_saved(text)
            end = run.info.end_time
            times[number] = (run.info.start_time / 1000, end / 1000 if end else None)
    name, made = parent.info.run_name, _made(parent.data.tags)
    ordered = [trials[number] for number in sorted(trials)]
    return Record(sweep, parent.info.run_id, name, ordered, configs, times, made)


def _made(tags: Mapping[str, str]) -> dict[str, Any]:
    versions = {key.removeprefix("version."): tags[key] for key in sorted(tags) if key.startswith("version.")}
    known = {
        "command": "mmdiff.command",
        "machine": "mmdiff.machine",
        "revision": "mlflow.source.git.commit",
        "changed_files": "git.changed_files",
    }
    return {name: tags[tag] for name, tag in known.items() if tag in tags} | {"versions": versions}


def _trial(uri: str, run: queries.Run, number: int, sweep: Sweep) -> Trial:
    """Return a trial from its run: values from parameters, reports from metrics, the rest from tags."""
    tags = run.data.tags
    reports: dict[int, dict[str, float]] = {}
    for metric in sweep.metrics:
        for step, value in queries.history(uri, run.info.run_id, f"eval/{metric}"):
            reports.setdefault(step, {})[metric] = value
    whole = [
        {"samples": step, "figures": figures}
        for step, figures in sorted(reports.items())
        if len(figures) == len(sweep.metrics)
    ]
    values = json.loads(tags.get("mmdiff.values", "{}"))
    outcome = tags.get("mmdiff.outcome")
    changes = json.loads(tags.get("mmdiff.changes", "[]"))
    return Trial(number, values, run.info.run_id, whole, changes, outcome, tags.get("mmdiff.why", ""))


def sweep_description(sweep: Sweep, address: str) -> str:
    """Return the description of a sweep's own run as Markdown. address: where the sweep lies."""
    goals = ", ".join(f"{metric} ({way})" for metric, way in sweep.metrics.items())
    budget = sweep.budget
    return (
        f"**{sweep.name}**: sweep of {budget.trials} trials x {budget.samples:,} samples over "
        f"{', '.join(sweep.space)}; {sweep.searcher.name} and {sweep.scheduler.name} look for {goals}. "
        f"Trials are child runs; the report is in the artifacts under `report`.\n\n"
        f"Resume: `mmdiff sweep --resume {shlex.quote(address)}`"
    )
