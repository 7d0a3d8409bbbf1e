"""`mmdiff train`: start a run, resume it, or only check its config."""

import argparse
from pathlib import Path

from mmdiff_ray import config as configuration
from mmdiff_ray.cli.common import RUNS, Commands, command
from mmdiff_ray.config import ConfigError, check_overrides


def add(commands: Commands) -> None:
    """Add `train`."""
    train = command(
        commands,
        "train",
        "train a model",
        "mmdiff train pipelines/configs/openmoji.yaml train.samples=500000 workers.count=2",
        _run,
        _check,
    )
    train.add_argument(
        "config", nargs="?", help="YAML file or name of a shipped config, such as demo or sprites"
    )
    train.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config")
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, print sizes and cost; do not start"
    )
    train.add_argument(
        "--continue",
        action="store_true",
        dest="resume_or_start",
        help="resume the run of this name if it exists, else start it; for jobs that may be restarted",
    )
    train.add_argument("--resume", metavar="RUN", help="resume a run, by its name, folder or URI")
    train.add_argument(
        "--new-mlflow-run",
        action="store_true",
        help="with --resume: log to a new MLflow run, for example because the old one was deleted",
    )
    train.add_argument("--runs", default="runs", help=f"{RUNS} (for --resume)")


def _check(given: argparse.Namespace) -> None:
    if given.resume_or_start and (given.resume or given.dry_run):
        raise ConfigError("--continue cannot be combined with --resume or --dry-run")
    if given.new_mlflow_run and not given.resume:
        raise ConfigError("--new-mlflow-run needs --resume RUN; new runs always have a new MLflow run")
    if given.resume and given.dry_run:
        raise ConfigError("--dry-run cannot be combined with --resume")
    if given.resume:
        check_overrides(given.overrides)
    elif given.config is None:
        raise ConfigError(
            "train needs a config file, for example pipelines/configs/demo.yaml, or --resume RUN"
        )


def _run(given: argparse.Namespace) -> int:
    from mmdiff_ray.cli.training import dry_run, train_and_evaluate
    from mmdiff_ray.runs.job import existing_run

    if given.resume:
        return train_and_evaluate(None, given.resume, given.runs, given.overrides, given.new_mlflow_run)
    config = configuration.load([given.config], given.overrides, {"name": Path(given.config).stem})
    if given.resume_or_start and (folder := existing_run(config)):
        return train_and_evaluate(None, str(folder), config.runs, given.overrides)
    return dry_run(config) if given.dry_run else train_and_evaluate(config, None, config.runs, [])
