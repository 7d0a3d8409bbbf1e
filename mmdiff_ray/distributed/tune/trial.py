"""One trial of a sweep: a training run in segments, evaluated after each, under Ray Tune's control."""

import dataclasses
import json
import math
import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from mmdiff_ray.config import (
    ChangeConfig,
    Config,
    ConfigError,
    OutageError,
    UnreachableError,
    in_force,
    without_passwords,
)
from mmdiff_ray.config.checks import unknown
from mmdiff_ray.data.parquet import Tables
from mmdiff_ray.distributed import launch
from mmdiff_ray.distributed.display import Display
from mmdiff_ray.distributed.evaluate import export_facts, measure, measure_on_ray
from mmdiff_ray.distributed.worker import enter_folder
from mmdiff_ray.evaluation.run import metrics_of
from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs import records
from mmdiff_ray.runs.job import Job
from mmdiff_ray.storage.filesystem import is_uri, join
from mmdiff_ray.storage.mirror import cached, fetched
from mmdiff_ray.storage.retry import OUTAGE_S, retry
from mmdiff_ray.sweeps.journal import TRIALS, Trial, number_of, read_trial, trial_address, write_trial
from mmdiff_ray.sweeps.spec import Sweep
from mmdiff_ray.tracking import run_life
from mmdiff_ray.tracking.store import with_credentials
from mmdiff_ray.tracking.tracker import Tracker
from mmdiff_ray.training.checkpoint import write_json
from mmdiff_ray.training.remote_checkpoints import FOLDER, copy_checkpoint, roll_back
from mmdiff_ray.training.trainer import TrainingError

SCORE = "score"
"""The key of the leading metric in reports to Tune; larger is better."""


def score(sweep: Sweep, figures: Mapping[str, float]) -> float:
    """Return the leading metric, signed so that larger is better. Raises ConfigError if one is missing."""
    missing = [metric for metric in sweep.metrics if metric not in figures]
    if missing:
        known = sorted(key for key in figures if "/floor/" not in key)
        raise ConfigError(unknown("metrics", missing[0], known or ["none"], "figure of the evaluators"))
    return sweep.sign * figures[sweep.main]


def run_trial(
    config: dict[str, Any],
    sweep: Sweep,
    where: str,
    parent: str,
    store: str,
    working_folder: str,
    tables: Tables,
) -> None:
    """Run a trial in Ray Tune: train, evaluate and report until its last sample or until Tune stops it.

    Resumes from the trial's last checkpoint, or copies another trial's (population-based training).

    config: `number` and `values`. where: the sweep's address. parent: the sweep's MLflow run.
    store: tracking URI with its password, which no file contains. working_folder: the driver's.
    tables: reads row groups through the cache.
    """
    from ray import tune

    enter_folder(working_folder)
    os.environ["MLFLOW_TRACKING_URI"] = store
    number = number_of(where, tune.get_context().get_trial_id(), config["number"])
    trial = read_trial(where, number) or Trial(number, dict(config["values"]))
    fresh = tune.get_checkpoint() is None
    if trial.outcome is not None and not fresh:
        return  # a finished member of a population that Tune chose to copy another
    try:
        if not fresh:
            pointer = {**_pointer(tune.get_checkpoint()), "values": config["values"]}
            if pointer["number"] != trial.number:  # else the trial was paused or lost, and resumes
                _adopt(sweep, where, trial, pointer)
        job = _job(sweep, where, trial, parent, store, tables)
        if fresh:
            # Replay reports of earlier drivers. PBT acts on every report, so it gets the last one only.
            for report in trial.reports[-1:] if sweep.scheduler.name == "pbt" else list(trial.reports):
                _report(sweep, trial, report)
        while trial.outcome is None:
            report = _segment(sweep, job, trial)
            trial.reports.append(report)
            if report["samples"] >= job.config.train.samples:
                trial.outcome = "finished"
            write_trial(where, trial)
            if trial.outcome:
                close_run(where, trial, "finished")
            _report(sweep, trial, report)
    except UnreachableError:
        raise
    except (TrainingError, ConfigError) as error:  # a retry would fail in the same way
        end_early(where, trial, "diverged" if isinstance(error, TrainingError) else "failed", str(error))


def _job(sweep: Sweep, where: str, trial: Trial, parent: str, store: str, tables: Tables) -> Job:
    """Return the trial's job with a new or resumed MLflow run, rewound to its last report.

    Raises OutageError if storage does not answer, or does not accept the first files of a new run.
    """
    if trial.copying is not None:  # the sweep ended during the copy
        _adopt(sweep, where, trial, trial.copying)
    address = trial_address(where, trial.number)
    config = trial_config(sweep, trial, where, store)
    place = cached(address)
    job = retry(lambda: jobs.prepare(config, place, tables), f"look at the data of trial {trial.number}")
    if trial.run_id:
        facts = jobs.read_run(_open(where, trial))
        job = dataclasses.replace(
            job,
            tracking_uri=with_credentials(facts["tracking_uri"]),
            run_id=facts["run_id"],
            uri=address if is_uri(address) else "",
            lineage=trial.lineage,
            stored_only=True,
        )
        roll_back(job.checkpoints, job.mirror, trial.samples)
        if trial.outcome is None:
            run_life.resume_run(job.tracking_uri, job.run_id, job.spool)
        return job
    tags = {
        "mlflow.parentRunId": parent,
        "mmdiff.sweep": sweep.name,
        "mmdiff.trial": trial.number,
        "mmdiff.values": json.dumps(trial.values),
    }

    # required=False: MLflow answered when the sweep started; a trial does not fail if it is away now.
    def begin() -> Job:
        runs.clear(address)  # left by an attempt that died before its run started
        return launch.begin(job, required=False, tags=tags)

    job = retry(begin, f"begin {address}")
    job = dataclasses.replace(job, lineage=job.run_id, stored_only=True)
    if job.mirror is not None and (left := job.mirror.flush(OUTAGE_S)):
        run_life.end_run(job.tracking_uri, job.run_id, launch.STATUS["failed"], job.spool)
        raise OutageError(f"{address} does not take {', '.join(left)}")
    trial.run_id = job.run_id  # other machines now find the run at its address
    write_trial(where, trial)
    return job


def _open(where: str, trial: Trial) -> Path:
    """Return a trial's run folder on this machine, with the run's small files downloaded."""
    address = trial_address(where, trial.number)
    if not is_uri(address):
        return Path(address)
    return retry(lambda: runs.open_run(address), f"open {address}")


def trial_config(sweep: Sweep, trial: Trial, where: str, store: str) -> Config:
    """Return a trial's configuration; a single worker trains in the trial's process (workers.count=0)."""
    config = sweep.config(trial.values)
    changes = [ChangeConfig(change["at"], change["values"]) for change in trial.changes]
    workers = config.workers
    if workers.count <= 1:
        threads = workers.threads or max(1, int(workers.cpus))
        workers = dataclasses.replace(workers, count=0, threads=threads)
    # In a population, another trial may copy any checkpoint.
    keep = sweep.budget.reports + 1 if sweep.scheduler.name == "pbt" else 1
    return dataclasses.replace(
        config,
        name=f"{trial.number:04d}",
        runs=join(where, TRIALS),
        train=dataclasses.replace(config.train, changes=changes),
        workers=workers,
        checkpoint=dataclasses.replace(config.checkpoint, keep_last=keep),
        tracking=dataclasses.replace(
            config.tracking,
            uri=without_passwords(store),
            experiment=f"sweep-{sweep.name}",
            log_model=False,
            system_metrics=False,
        ),
    )


def _segment(sweep: Sweep, job: Job, trial: Trial) -> dict[str, Any]:
    """Train to the next report, evaluate the model, and return the report."""
    started, total = time.monotonic(), job.config.train.samples
    pause = min(total, (trial.samples // sweep.period + 1) * sweep.period)
    launch.work(dataclasses.replace(job, pause_at=pause), Display(Console(quiet=True)))
    model, seen = _exported(job, trial)
    now = in_force(job.config, seen)  # after changes: evaluate with the last values in training
    evaluate = partial(measure_on_ray, facts=model) if job.config.workers.count else measure
    findings = retry(lambda: evaluate(job.folder, now, tables=job.tables), f"evaluate {job.folder.name}")
    figures = {key.removeprefix("eval/"): value for key, value in metrics_of(findings.figures).items()}
    for metric in sweep.metrics:
        if not math.isfinite(figures.get(metric, 0.0)):
            raise TrainingError(f"{metric} is {figures[metric]} at {seen:,} samples, not finite")
    tracker = Tracker(job.tracking_uri, job.run_id, job.spool)
    tracker.metrics({f"eval/{key}": value for key, value in figures.items()}, seen)
    if trial.changes:
        tracker.tags({"mmdiff.changes": json.dumps(trial.changes), "mmdiff.values": json.dumps(trial.values)})
    if seen >= total:
        tracker.tags({"mmdiff.outcome": "finished"})
    for name, picture in findings.pictures.items():  # at every report: any may be the last
        tracker.image(f"evaluation/{name}", to_png(picture), seen)
    tracker.close(timeout_s=5)
    records.store_unsent(job.folder, job.mirror)
    return {"samples": seen, "figures": figures, "seconds": time.monotonic() - started}


def _exported(job: Job, trial: Trial) -> tuple[dict[str, Any], int]:
    """Return the facts of the model that a worker exported in this segment, and its samples seen.

    The worker may run on another machine. Raises OutageError if its upload failed.
    """
    where = runs.address(job.folder)
    if job.config.workers.count:
        retry(lambda: fetched(join(where, "export")), f"download the model of {where}")
    model = export_facts(job.folder)
    seen = model.get("progress", {}).get("samples_seen", 0)
    if seen <= trial.samples or model.get("lineage") != job.lineage:
        raise OutageError(f"{where} has no model newer than {trial.samples:,} samples; its upload failed")
    return model, seen


def _report(sweep: Sweep, trial: Trial, report: Mapping[str, Any]) -> None:
    """Report to Tune, with a pointer to the checkpoint, which stays in the trial's own folder."""
    from ray import tune

    metrics = {
        SCORE: score(sweep, report["figures"]),
        "samples_seen": report["samples"],
        "number": trial.number,
    }
    with tempfile.TemporaryDirectory() as place:
        pointer = {"number": trial.number, "samples": report["samples"]}
        (Path(place) / "pointer.json").write_text(json.dumps(pointer), encoding="utf8")
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(place))


def _pointer(checkpoint: Any) -> dict[str, int]:
    with checkpoint.as_directory() as place:
        return json.loads((Path(place) / "pointer.json").read_text(encoding="utf8"))


def _adopt(sweep: Sweep, where: str, trial: Trial, pointer: Mapping[str, Any]) -> None:
    """Copy another trial's checkpoint, reports and changes into a trial (population-based training).

    pointer: the donor's `number`, `samples`, and the `values` to continue with. Does nothing if the donor is
    at its last sample; keeps the trial's own state if the donor's checkpoint is gone.
    """
    at, values = pointer["samples"], pointer["values"]
    if at >= sweep.budget.samples:
        return
    donor = read_trial(where, pointer["number"])
    assert donor is not None, f"trial {pointer['number']} reported and left no journal"
    trial.copying = dict(pointer)
    write_trial(where, trial)
    mine, copied = _open(where, trial), f"{trial.run_id}-{secrets.token_hex(4)}"
    theirs = join(trial_address(where, donor.number), FOLDER, f"{at:012d}")
    if copy_checkpoint(theirs, donor.lineage, mine / FOLDER, runs.mirror_of(mine), copied):
        trial.copied, trial.values = copied, dict(donor.values)
        trial.changes = [change for change in donor.changes if change["at"] < at]
        trial.reports = [report for report in donor.reports if report["samples"] <= at]
        changed = {key: value for key, value in values.items() if trial.now.get(key) != value}
        trial.changes.append({"at": at, "values": changed, "source": donor.number})
    trial.copying = None
    write_trial(where, trial)


def end_early(where: str, trial: Trial, outcome: str, why: str = "") -> None:
    """Record the outcome of a trial that ends before its last sample, and close its run."""
    trial.outcome, trial.why = outcome, why
    write_trial(where, trial)
    tags = {"mmdiff.outcome": outcome, **({"mmdiff.why": why[:500]} if why else {})}
    close_run(where, trial, "finished" if outcome == "stopped" else "failed", tags)


def close_run(where: str, trial: Trial, state: str, tags: Mapping[str, str] | None = None) -> None:
    """End a trial's run in MLflow and in its `run.json`. state: finished, stopped or failed."""
    if not trial.run_id or not ((place := _open(where, trial)) / runs.RUN).is_file():
        return  # its run has not started or was removed
    facts, spool = jobs.read_run(place), records.root(place)
    write_json(place / runs.RUN, {**facts, "state": state, "lineage": trial.lineage})
    if tags:
        tracker = Tracker(facts["tracking_uri"], facts["run_id"], spool)
        tracker.tags(tags)
        tracker.close(timeout_s=5)
    run_life.end_run(facts["tracking_uri"], facts["run_id"], launch.STATUS[state], spool, timeout_s=5)
    if (mirror := runs.mirror_of(place)) is not None:
        mirror.send(runs.RUN)
        records.store_unsent(place, mirror)
        mirror.flush()
