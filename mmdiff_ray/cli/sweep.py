"""`mmdiff sweep`: run a sweep, resume it, report on it, or only check its file."""

import argparse

from mmdiff_ray.cli.common import Commands, command
from mmdiff_ray.config import ConfigError

MAY_CHANGE = ("budget.trials", "budget.hours", "budget.concurrent", "budget.retries")
"""What a resumed sweep may change; trials of other samples or reports would not compare."""


def add(commands: Commands) -> None:
    """Add `sweep`."""
    sweep = command(
        commands,
        "sweep",
        "search a space of settings by Ray Tune; resumes where it stopped",
        "mmdiff sweep sweeps/quickstart.yaml budget.trials=8",
        _run,
        _check,
    )
    sweep.add_argument("file", nargs="?", help="a YAML file, or the name of a shipped one; or: report")
    sweep.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="values of budget.*, searcher.*, scheduler.*, seed, or of the configuration",
    )
    sweep.add_argument("--dry-run", action="store_true", help="check it, print space and cost, start nothing")
    sweep.add_argument("--resume", metavar="SWEEP", help="resume a sweep that was interrupted")
    sweep.add_argument("--runs", default="runs", help="the folder where runs lie")


def _check(given: argparse.Namespace) -> None:
    if given.file == "report":
        if len(given.overrides) != 1:
            raise ConfigError("sweep report needs the name or the id of a sweep's run in MLflow")
    elif given.resume:
        if given.dry_run:
            raise ConfigError("--dry-run cannot be combined with --resume")
        for word in given.overrides:
            if word.partition("=")[0] not in MAY_CHANGE:
                raise ConfigError(f"{word}: a resumed sweep may change only {', '.join(MAY_CHANGE)}")
    elif given.file is None:
        raise ConfigError("sweep needs a file, for example sweeps/quickstart.yaml, or --resume SWEEP")


def _run(given: argparse.Namespace) -> int:
    from mmdiff_ray.cli.sweeping import dry_run, report, resume, sweep
    from mmdiff_ray.datasets.base import build_missing
    from mmdiff_ray.sweeps.spec import load_sweep

    if given.file == "report":
        return report(given.overrides[0], given.runs)
    if given.resume:
        return resume(given.resume, given.runs, given.overrides)
    spec = load_sweep(given.file, given.overrides)
    build_missing(spec.data)
    return (dry_run if given.dry_run else sweep)(spec, given.file, given.overrides, given.runs)
