"""The commands around sweeps, with what they print."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.distributed.alone import alone
from mmdiff_ray.distributed.cluster import amount_of
from mmdiff_ray.distributed.commands import make_console, rows_per_s
from mmdiff_ray.distributed.display import duration
from mmdiff_ray.distributed.job import Job
from mmdiff_ray.distributed.launch import STATUS
from mmdiff_ray.distributed.sweep import (
    begin_sweep,
    check_sweep,
    resources_of,
    run_sweep,
    sweep_cluster,
    sweep_folder,
)
from mmdiff_ray.sweeps.findings import figures_of
from mmdiff_ray.sweeps.journal import read_trials
from mmdiff_ray.sweeps.record import Record, read_record
from mmdiff_ray.sweeps.report import chosen, verdict, write_report
from mmdiff_ray.sweeps.spec import Sweep, load_sweep, whole_text
from mmdiff_ray.tracking import run_life
from mmdiff_ray.tracking.jobs import is_server, reachable
from mmdiff_ray.tracking.sender import replay
from mmdiff_ray.tracking.store import shown, tracking_uri
from mmdiff_ray.tracking.tracker import Tracker

MAY_CHANGE = ("budget.trials", "budget.hours", "budget.concurrent", "budget.retries")
"""What a resumed sweep may have otherwise; trials of other samples or reports would not compare."""


def sweep(spec: Sweep, file: str, overrides: Sequence[str], runs: str) -> int:
    """Run a new sweep and write its report."""
    console = make_console()
    seen, job = check_sweep(spec)
    run_life.check_store(tracking_uri(job.config.tracking.uri, Path(runs).absolute()))
    with sweep_cluster(spec):
        resources_of(spec, job.config)
        command = shlex.join(["mmdiff", "sweep", file, *overrides])
        folder = begin_sweep(spec, seen, whole_text(file, overrides), command, runs)
        size = f"up to {spec.trials} trials of {spec.budget.samples:,} samples"
        console.print(f"{spec.title} (sweep {folder.name}): {size}")
        if folder.name != spec.name:
            console.print(f"{spec.name} is there already; mmdiff sweep --resume {spec.name} goes on with it")
        with alone(folder):
            return _run(spec, folder)


def check_changed(overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override that no sweep can go on with."""
    for word in overrides:
        if word.partition("=")[0] not in MAY_CHANGE:
            raise ConfigError(f"{word}: a sweep goes on as it began, but for {', '.join(MAY_CHANGE)}")


def resume(name: str, runs: str, overrides: Sequence[str]) -> int:
    """Go on with a sweep; what of its budget may change stays changed."""
    folder = sweep_folder(name, runs)
    facts = json.loads((folder / "sweep.json").read_text(encoding="utf8"))
    spec = load_sweep(folder / "sweep.yaml", overrides)
    with alone(folder), sweep_cluster(spec):
        resources_of(spec, spec.config({}))
        run_life.resume_run(facts["tracking_uri"], facts["run_id"], folder / "tracking")
        text = whole_text(folder / "sweep.yaml", overrides)
        (folder / "sweep.yaml").write_text(text, encoding="utf8")
        return _run(spec, folder)


def _run(spec: Sweep, folder: Path) -> int:
    """Run what is left of a sweep, and write its report, whatever ended it."""
    console = make_console()
    state, error = "failed", None
    try:
        state = run_sweep(spec, folder, lambda line: console.print(line, soft_wrap=True))
    except BaseException as raised:
        state, error = "stopped" if isinstance(raised, KeyboardInterrupt) else "failed", raised
    facts = json.loads((folder / "sweep.json").read_text(encoding="utf8"))
    run_life.end_run(facts["tracking_uri"], facts["run_id"], STATUS[state], folder / "tracking")
    waiting = sum(replay(place).waiting for place in sorted(folder.glob("trials/*/tracking")))
    try:
        record = _report(facts["tracking_uri"], facts["run_id"], folder / "report", folder / "tracking")
        for line in verdict(record):
            console.print(line, soft_wrap=True)
        _say_where(folder / "report", trained=state == "finished")
    except RunError as unmade:
        console.print(str(unmade), soft_wrap=True)
        error = error or unmade
    if waiting:
        console.print(
            f"{waiting} records of trials wait for MLflow and are not in this report; later: mmdiff sync "
            f"{folder}, then: mmdiff sweep report {folder.name}",
            soft_wrap=True,
        )
    if state == "stopped":
        console.print(f"stopped. Go on with: mmdiff sweep --resume {folder}", soft_wrap=True)
    if error is not None:
        raise error
    ended = [trial.outcome for trial in read_trials(folder)]
    if state == "stopped":
        return 130
    return 0 if {"finished", "stopped"} & set(ended) and not waiting else 1


def _report(uri: str, run_id: str, out: Path, spool: Path) -> Record:
    """Write the report of a sweep, from MLflow alone, into a folder and into its run."""
    if is_server(uri) and not reachable(uri):
        raise RunError(
            f"MLflow at {shown(uri)} does not answer, and the report is made of what it holds; later: mmdiff "
            f"sync {out.parent}, then: mmdiff sweep report {out.parent.name}"
        )
    record = read_record(uri, run_id)
    files = write_report(record, out)
    tracker = Tracker(uri, record.run_id, spool)
    for file in files:
        tracker.artifact(file, "report")
    best = chosen(record)
    if best:
        tracker.metrics({f"best/{metric}": value for metric, value in figures_of(best[0]).items()}, 0)
    tracker.close(timeout_s=60)
    return record


def report(name: str, runs: str) -> int:
    """Write the report of a sweep anew, from MLflow alone."""
    out = Path(runs) / "sweeps" / Path(name).name / "report"
    facts = out.parent / "sweep.json"
    known = json.loads(facts.read_text(encoding="utf8")) if facts.is_file() else {}
    uri = known.get("tracking_uri") or tracking_uri(None, Path(runs).absolute())
    record = _report(uri, known.get("run_id", name), out, out.parent / "tracking")
    console = make_console()
    for line in verdict(record):
        console.print(line, soft_wrap=True)
    _say_where(out)
    return 0


def _say_where(out: Path, trained: bool = True) -> None:
    console = make_console()
    console.print(f"report    {out}/report.html", soft_wrap=True)
    best = sorted((out / "best").glob("*.yaml"))
    if best and trained:
        console.print(f"next      mmdiff train {best[0]}", soft_wrap=True)


def dry_run(spec: Sweep, file: str, overrides: Sequence[str], runs: str) -> int:
    """Check a sweep and say what it would do; start nothing."""
    console = make_console()
    seen, job = check_sweep(spec)
    shown = Table(title=f"{spec.title}: space", title_justify="left")
    for heading in ("key", "values", "when"):
        shown.add_column(heading)
    for key, dimension in spec.space.items():
        what = dimension.values or f"{dimension.low:g} to {dimension.high:g}"
        when = "; ".join(f"{other} in {allowed}" for other, allowed in dimension.when.items())
        shown.add_row(key, f"{dimension.kind} {what}", when)
    console.print(shown)
    console.print(f"metrics    {', '.join(f'{way} {metric}' for metric, way in spec.metrics.items())}")
    if spec.baseline:
        console.print("baseline   trial 0 is the base configuration itself")
    refused = sum(seen.refused.values())
    console.print(f"points     {seen.tried} looked at (corners and inside), {refused} refused")
    for why, count in sorted(seen.refused.items(), key=lambda item: -item[1])[:3]:
        console.print(f"           {count} times: {why}", soft_wrap=True)
    for line in _cost(spec, job):
        console.print(line, soft_wrap=True)
    console.print("nothing was started; run it with the same command without --dry-run")
    return 0


def _cost(spec: Sweep, job: Job) -> list[str]:
    """Return what a trial asks for and what it all costs, with the speed measured here."""
    workers, budget = job.config.workers, spec.budget
    count = max(1, workers.count)
    asks = ", ".join(amount_of(name, count * each) for name, each in workers.asks.items())
    judged = "once" if budget.reports == 1 else f"{budget.reports} times"
    limit = f", at most {budget.hours:g} h" if budget.hours else ""
    lines = [
        f"a trial    asks for {asks}; is judged {judged}",
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
        f"the cost   to train takes a trial {duration(seconds)} ({rate:.0f} rows/s a worker on {device} "
        f"here), all of them at most {whole} with {at_once} at once, as many as this machine holds; judging "
        "comes on top, and a cluster runs as many as it holds",
    ]
