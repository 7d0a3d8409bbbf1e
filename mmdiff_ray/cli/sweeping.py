"""The implementation of `mmdiff sweep`: run, resume, report, dry run."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from mmdiff_ray.cli.training import rows_per_s
from mmdiff_ray.config import ConfigError, RunError, UnreachableError, without_passwords
from mmdiff_ray.distributed.cluster import amount_of
from mmdiff_ray.distributed.display import duration, make_console
from mmdiff_ray.distributed.launch import STATUS
from mmdiff_ray.distributed.tune.sweep import (
    TEXT,
    begin_sweep,
    check_sweep,
    read_facts,
    resources_of,
    run_sweep,
    sweep_cluster,
    sweep_folder,
    sweeps_in,
    write_text,
)
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import records
from mmdiff_ray.runs.job import Job
from mmdiff_ray.storage.filesystem import is_uri, join, parent
from mmdiff_ray.storage.mirror import cached
from mmdiff_ray.sweeps.journal import read_trials, trial_address
from mmdiff_ray.sweeps.record import Record, read_record
from mmdiff_ray.sweeps.report import chosen, verdict, write_report
from mmdiff_ray.sweeps.spec import Sweep, load_sweep, standalone_yaml
from mmdiff_ray.tracking import run_life
from mmdiff_ray.tracking.store import is_server, reachable, tracking_uri
from mmdiff_ray.tracking.tracker import Tracker

REPORT = "report"


def sweep(spec: Sweep, file: str, overrides: Sequence[str], where: str) -> int:
    """Run a new sweep and write its report. where: folder or URI of all runs."""
    console = make_console()
    seen, job = check_sweep(spec)
    run_life.check_store(_store(job.config.tracking.uri, where))
    if is_uri(where):
        runs.check_runs(where)
    with sweep_cluster(spec):
        resources_of(spec, job.config)
        command = shlex.join(["mmdiff", "sweep", file, *overrides])
        folder = begin_sweep(spec, seen, standalone_yaml(file, overrides), command, where)
        size = f"up to {spec.trials} trials of {spec.budget.samples:,} samples"
        console.print(f"{spec.title} (sweep {folder.name}): {size}")
        if folder.name != spec.name:
            before = shlex.join([spec.name] if where == "runs" else [spec.name, "--runs", where])
            console.print(f"{spec.name} already exists; resume it with: mmdiff sweep --resume {before}")
        with runs.lock_run(folder, _say):
            return _run(spec, folder)


def _say(line: str) -> None:
    make_console().print(line, soft_wrap=True)


def _store(named: str | None, where: str) -> str:
    """Return the MLflow URI: `named`, or the default for the runs. Raises ConfigError."""
    return tracking_uri(named, where if is_uri(where) else Path(where).absolute())


def resume(name: str, where: str, overrides: Sequence[str]) -> int:
    """Resume a sweep. Overrides of its budget are saved."""
    folder = sweep_folder(name, where)
    facts = read_facts(folder)
    spec = load_sweep(folder / TEXT, overrides)
    with runs.lock_run(folder, _say), sweep_cluster(spec):
        resources_of(spec, spec.config({}))
        records.fetch_unsent(folder, runs.mirror_of(folder))
        run_life.resume_run(facts["tracking_uri"], facts["run_id"], records.root(folder))
        write_text(folder, standalone_yaml(folder / TEXT, overrides))
        return _run(spec, folder)


def _run(spec: Sweep, folder: Path) -> int:
    """Run the remaining trials of a sweep and write its report, even after an error or interrupt."""
    console, where = make_console(), runs.address(folder)
    state, error = "failed", None
    try:
        state = run_sweep(spec, folder, _say)
    except BaseException as raised:
        state, error = "stopped" if isinstance(raised, KeyboardInterrupt) else "failed", raised
    facts = read_facts(folder)
    run_life.end_run(facts["tracking_uri"], facts["run_id"], STATUS[state], records.root(folder))
    waiting = 0
    try:
        waiting = _send_records(where)
        record = _report(facts["tracking_uri"], facts["run_id"], folder)
        for line in verdict(record):
            console.print(line, soft_wrap=True)
        _say_where(folder, trained=state == "finished")
    except (RunError, UnreachableError) as unmade:
        console.print(str(unmade), soft_wrap=True)
        error = error or unmade
    records.store_unsent(folder, runs.mirror_of(folder))
    if waiting:
        console.print(
            f"{waiting} records of trials are not in MLflow yet and not in this report; send them with: "
            f"{_later(folder)}",
            soft_wrap=True,
        )
    if state == "stopped":
        console.print(f"stopped; resume with: mmdiff sweep --resume {shlex.quote(where)}", soft_wrap=True)
    if error is not None:
        raise error
    ended = [trial.outcome for trial in read_trials(where)]
    if state == "stopped":
        return 130
    return 0 if {"finished", "stopped"} & set(ended) and not waiting else 1


def _send_records(where: str) -> int:
    """Send the waiting records of trials to MLflow; return the number that still wait."""
    trials = [trial.number for trial in read_trials(where) if trial.run_id]
    return sum(records.send(trial_address(where, number)).waiting for number in trials)


def _later(folder: Path) -> str:
    """Return the commands that send waiting records to MLflow and update the report."""
    where = runs.address(folder)
    named = [folder.name, "--runs", parent(parent(where)[0])[0]] if is_uri(where) else [folder.name]
    return f"mmdiff sync {shlex.quote(where)}, then: mmdiff sweep report {shlex.join(named)}"


def _report(uri: str, run_id: str, folder: Path) -> Record:
    """Write the report of a sweep, from MLflow only, to its folder and its run."""
    if is_server(uri) and not reachable(uri):
        raise RunError(
            f"MLflow at {without_passwords(uri)} is unavailable, but the report needs it; "
            f"run later: {_later(folder)}"
        )
    record = read_record(uri, run_id)
    files = write_report(record, folder / REPORT)
    tracker = Tracker(uri, record.run_id, records.root(folder))
    for file in files:
        tracker.artifact(file, REPORT)
    best = chosen(record)
    if best:
        tracker.metrics({f"best/{metric}": value for metric, value in best[0].figures.items()}, 0)
    tracker.close(timeout_s=60)
    mirror = runs.mirror_of(folder)
    if mirror is not None:
        mirror.send(REPORT)
        if left := mirror.flush():
            raise RunError(runs.not_sent(mirror.uri, folder, left, "mmdiff sweep report"))
    return record


def report(name: str, where: str) -> int:
    """Rewrite the report of a sweep, from MLflow only."""
    try:
        folder = sweep_folder(name, where)
        facts = read_facts(folder)
        uri, run_id = facts["tracking_uri"], facts["run_id"]
    except ConfigError as error:
        if isinstance(error, UnreachableError) or is_uri(name):
            raise
        # The sweep is in another folder, or `name` is a run id.
        uri, run_id = _store(None, where), Path(name).name
        folder = cached(join(sweeps_in(where), run_id))
        if is_uri(where):
            runs.make_cache(join(sweeps_in(where), run_id))
    record = _report(uri, run_id, folder)
    console = make_console()
    for line in verdict(record):
        console.print(line, soft_wrap=True)
    _say_where(folder)
    return 0


def _say_where(folder: Path, trained: bool = True) -> None:
    console, where = make_console(), runs.address(folder)
    console.print(f"report    {join(where, REPORT, 'report.html')}", soft_wrap=True)
    if is_uri(where):
        console.print(f"here      {folder / REPORT}", soft_wrap=True)
    best = sorted((folder / REPORT / "best").glob("*.yaml"))
    if best and trained:
        console.print(f"next      mmdiff train {best[0]}", soft_wrap=True)


def dry_run(spec: Sweep, file: str, overrides: Sequence[str], runs: str) -> int:
    """Check a sweep and print its space and cost without starting it."""
    console = make_console()
    seen, job = check_sweep(spec)
    shown = Table(title=f"{spec.title}: space", title_justify="left")
    for heading in ("key", "values", "when"):
        shown.add_column(heading)
    for key, dimension in spec.space.items():
        when = "; ".join(f"{other} in {allowed}" for other, allowed in dimension.when.items())
        shown.add_row(key, str(dimension), when)
    console.print(shown)
    console.print(f"metrics    {', '.join(f'{way} {metric}' for metric, way in spec.metrics.items())}")
    if spec.baseline:
        console.print("baseline   trial 0 is the unchanged base configuration")
    refused = sum(seen.refused.values())
    console.print(f"points     {seen.tried} checked (corners and random), {refused} invalid")
    for why, count in sorted(seen.refused.items(), key=lambda item: -item[1])[:3]:
        console.print(f"           {count} times: {why}", soft_wrap=True)
    for line in _cost(spec, job):
        console.print(line, soft_wrap=True)
    console.print("nothing was started; run it with the same command without --dry-run")
    return 0


def _cost(spec: Sweep, job: Job) -> list[str]:
    """Return the resources of a trial and the cost of the sweep, from the speed measured on this machine."""
    workers, budget = job.config.workers, spec.budget
    count = max(1, workers.count)
    asks = ", ".join(amount_of(name, count * each) for name, each in workers.per_worker.items())
    judged = "once" if budget.reports == 1 else f"{budget.reports} times"
    limit = f", at most {budget.hours:g} h" if budget.hours else ""
    lines = [
        f"a trial    needs {asks}; is evaluated {judged}",
        f"the sweep  {spec.searcher.name} and {spec.scheduler.name}: {spec.trials} trials of "
        f"{budget.samples:,} samples, {spec.trials * budget.samples:,} at most{limit}",
    ]
    timed = rows_per_s(job, job.denoiser())
    if timed is None:
        return [*lines, "the cost   not timed: workers have GPUs (workers.gpus), this machine has none"]
    rate, _, device = timed
    seconds = budget.samples / (rate * count)
    here = max(1, int((os.cpu_count() or 1) // (count * workers.cpus)))
    at_once = min(here, budget.concurrent or here)
    whole = duration(spec.trials * seconds / at_once)
    return [
        *lines,
        f"the cost   training: {duration(seconds)} per trial ({rate:.0f} rows/s per worker on this "
        f"{device}), at most {whole} for all, with {at_once} at a time on this machine; plus evaluation. A "
        "larger cluster runs more at a time",
    ]
