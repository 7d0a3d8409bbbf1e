"""The commands around sweeps, with what they print."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.distributed.cluster import amount_of
from mmdiff_ray.distributed.commands import make_console, rows_per_s
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
from mmdiff_ray.sweeps.record import Record, read_record
from mmdiff_ray.sweeps.report import chosen, verdict, write_report
from mmdiff_ray.sweeps.spec import Sweep, load_sweep
from mmdiff_ray.tracking import run_life
from mmdiff_ray.tracking.jobs import is_server, reachable
from mmdiff_ray.tracking.store import shown, tracking_uri
from mmdiff_ray.tracking.tracker import Tracker


def sweep(spec: Sweep, file: str, overrides: Sequence[str], runs: str) -> int:
    """Run a new sweep and write its report."""
    console = make_console()
    seen, job = check_sweep(spec)
    run_life.check_store(tracking_uri(job.config.tracking.uri, Path(runs).absolute()))
    with sweep_cluster(spec):
        resources_of(spec, job.config)
        command = shlex.join(["mmdiff", "sweep", file, *overrides])
        folder = begin_sweep(spec, seen, _with_overrides(file, overrides), command, runs)
        console.print(f"{spec.title}: up to {spec.budget.trials} trials of {spec.budget.samples:,} samples")
        return _run(spec, folder)


def resume(name: str, runs: str, overrides: Sequence[str]) -> int:
    """Go on with a sweep; what may change is its budget."""
    for word in overrides:
        if not word.startswith("budget."):
            raise ConfigError(f"{word}: a sweep goes on as it began, but for its budget (budget.*)")
    folder = sweep_folder(name, runs)
    facts = json.loads((folder / "sweep.json").read_text(encoding="utf8"))
    run_life.resume_run(facts["tracking_uri"], facts["run_id"], folder / "tracking")
    return _run(load_sweep(folder / "sweep.yaml", overrides), folder)


def _run(spec: Sweep, folder: Path) -> int:
    """Run what is left of a sweep, and write its report, whatever ended it."""
    console = make_console()
    state = "failed"
    try:
        state = run_sweep(spec, folder, lambda line: console.print(line, soft_wrap=True))
    except KeyboardInterrupt:
        state = "stopped"
        raise
    finally:
        facts = json.loads((folder / "sweep.json").read_text(encoding="utf8"))
        run_life.end_run(facts["tracking_uri"], facts["run_id"], STATUS[state], folder / "tracking")
        record = _report(facts["tracking_uri"], facts["run_id"], folder / "report", folder / "tracking")
    for line in verdict(record):
        console.print(line, soft_wrap=True)
    _say_where(folder / "report")
    if state == "stopped":
        console.print(f"stopped. Go on with: mmdiff sweep --resume {folder}", soft_wrap=True)
    return 130 if state == "stopped" else 0


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
    uri = tracking_uri(None, Path(runs).absolute())
    out = Path(runs) / "sweeps" / Path(name).name / "report"
    record = _report(uri, name, out, out.parent / "tracking")
    console = make_console()
    for line in verdict(record):
        console.print(line, soft_wrap=True)
    _say_where(out)
    return 0


def _say_where(out: Path) -> None:
    console = make_console()
    console.print(f"report    {out}/report.html", soft_wrap=True)
    best = sorted((out / "best").glob("*.yaml"))
    if best:
        console.print(f"next      mmdiff train {best[0]}", soft_wrap=True)


def _with_overrides(file: str, overrides: Sequence[str]) -> str:
    """Return a sweep's YAML with its name and overrides in it, so that it alone tells what was done."""
    text = Path(file).read_text(encoding="utf8")
    plain, spec = configuration.read_yaml(file), load_sweep(file, overrides)
    if not overrides:
        return text if "name" in plain else f"{text.rstrip()}\nname: {spec.name}\n"
    plain |= {
        "overrides": spec.overrides,
        "seed": spec.seed,
        "name": spec.name,
        **{name: vars(getattr(spec, name)) for name in ("searcher", "scheduler", "budget")},
    }
    return json.dumps(plain, indent=1)


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
    rate, _, device = rows_per_s(job, job.denoiser())
    minutes = budget.samples / (rate * count) / 60
    limit = f", at most {budget.hours:g} h" if budget.hours else ""
    here = max(1, int((os.cpu_count() or 1) // (count * workers.cpus)))
    at_once = min(here, budget.concurrent or here)
    total = budget.trials * minutes / at_once
    return [
        f"a trial    asks for {asks}; trains about {minutes:.2g} minutes "
        f"({rate:.0f} rows/s a worker on {device} here); is judged "
        + ("once" if budget.reports == 1 else f"{budget.reports} times"),
        f"the sweep  {spec.searcher.name} and {spec.scheduler.name}: {budget.trials} trials of "
        f"{budget.samples:,} samples, {budget.trials * budget.samples:,} at most{limit}",
        f"the cost   at most {total:.2g} minutes of training with {at_once} at once, as many as this machine "
        "holds, beside what judging takes; a cluster runs as many as it holds",
    ]
