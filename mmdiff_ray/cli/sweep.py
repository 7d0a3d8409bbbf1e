"""`mmdiff sweep`: run a sweep, resume it, report on it, or only check its file."""

import argparse

from mmdiff_ray.cli.common import Commands, command
from mmdiff_ray.config import ConfigError

MAY_CHANGE = ("budget.trials", "budget.hours", "budget.concurrent", "budget.retries")
"""Keys that a resumed sweep may change. With other samples or reports, trials would not be comparable."""


def add(commands: Commands) -> None:
    """Add `sweep`."""
    sweep = command(
        commands,
        "sweep",
        "search a space of settings with Ray Tune",
        "mmdiff sweep sweeps/quickstart.yaml budget.trials=8",
        _run,
        _check,
    )
    sweep.add_argument("file", nargs="?", help="YAML file or name of a shipped sweep; or `report`")
    sweep.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="values of budget.*, searcher.*, scheduler.*, seed, or of the base configuration",
    )
    sweep.add_argument(
        "--dry-run", action="store_true", help="check the sweep and print space and cost; do not start it"
    )
    sweep.add_argument("--resume", metavar="SWEEP", help="resume a sweep that was interrupted")
    sweep.add_argument("--runs", default="runs", help="folder of all runs")


def _check(given: argparse.Namespace) -> None:
    if given.file == "report":
        if len(given.overrides) != 1:
            raise ConfigError("sweep report needs the name or MLflow run id of a sweep")
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
    from mmdiff_ray.datasets.build import build_missing
    from mmdiff_ray.sweeps.spec import load_sweep

    if given.file == "report":
        return report(given.overrides[0], given.runs)
    if given.resume:
        return resume(given.resume, given.runs, given.overrides)
    spec = load_sweep(given.file, given.overrides)
    build_missing(spec.data)
    return (dry_run if given.dry_run else sweep)(spec, given.file, given.overrides, given.runs)
