"""A sweep and its trials, read from MLflow only."""

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
    """A sweep as recorded in MLflow.

    run_id: of the parent run. trials: the started trials, by number. configs: number -> configuration at the
    start. times: number -> (start, end) in seconds since the epoch; end is None for a running trial. made:
    its
    provenance: command, machine, versions, code revision.
    """

    sweep: Sweep
    run_id: str
    name: str
    trials: list[Trial]
    configs: dict[int, Config]
    times: dict[int, tuple[float, float | None]]
    made: dict[str, Any]


def read_record(uri: str, reference: str) -> Record:
    """Return the sweep of a run. reference: its name or id. Raises ConfigError if the run is not a sweep."""
    parent = queries.find_run(uri, reference)
    with tempfile.TemporaryDirectory() as place:
        file = queries.artifact(uri, parent.info.run_id, "sweep.yaml", Path(place))
        if file is None:
            raise ConfigError(f"{reference}: this run is not a sweep (it has no sweep.yaml)")
        sweep = load_sweep(file)
        trials: dict[int, Trial] = {}
        configs, times = {}, {}
        for run in queries.children(uri, parent):
            number = int(run.data.tags.get("mmdiff.trial", -1))
            if number < 0:
                continue
            # A process that died while it started a run leaves two runs with the same number: use the newest.
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
    """Build a trial from its run: values from parameters, reports from metrics, the rest from tags."""
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
    """Return the Markdown description of a sweep's parent run. address: of the sweep."""
    goals = ", ".join(f"{metric} ({way})" for metric, way in sweep.metrics.items())
    budget = sweep.budget
    return (
        f"**{sweep.name}**: sweep of {budget.trials} trials x {budget.samples:,} samples over "
        f"{', '.join(sweep.space)}; {sweep.searcher.name} and {sweep.scheduler.name} optimize {goals}. "
        f"Trials are child runs; the report is in the artifacts under `report`.\n\n"
        f"Resume: `mmdiff sweep --resume {shlex.quote(address)}`"
    )
