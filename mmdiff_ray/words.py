"""What can be wrong with the words of a command alone: told before it runs here or is sent to a cluster."""

import argparse
from collections.abc import Callable, Sequence

from mmdiff_ray.config import ConfigError, check_overrides


def check(given: argparse.Namespace) -> None:
    """Raise ConfigError for a command that could not run on any machine: wrong names, options, keys,
    numbers."""
    if given.run in CHECKS:
        CHECKS[given.run](given)


def check_to_send(given: argparse.Namespace) -> None:
    """Raise ConfigError as `check` does, and for a command that is of no use, or surely fails, on a
    cluster."""
    check(given)
    if getattr(given, "dry_run", False):
        raise ConfigError(
            "--dry-run starts nothing and is for this machine; submit checks a command before it is sent"
        )
    if given.run == "sweep" and given.file is not None and given.file != "report":
        from mmdiff_ray.sweeps.spec import any_config, load_sweep

        any_config(load_sweep(given.file, given.overrides))


def labels_of(words: Sequence[str]) -> dict[str, str]:
    """Return the labels of `--label KEY=VALUE`. Raises ConfigError for another form."""
    labels = {key: value for key, _, value in (word.partition("=") for word in words)}
    if not all(labels.values()):
        raise ConfigError(f"--label ({', '.join(words)}) wants KEY=VALUE")
    return labels


def _data_build(given: argparse.Namespace) -> None:
    from pipelines.base import check_options
    from pipelines.options import pipeline_options

    labels_of(given.label)
    _check_workers(given)
    check_options(given.pipeline, pipeline_options([*given.options, *given.extra]))


def _data_embed(given: argparse.Namespace) -> None:
    from pipelines.embedders import check_embedding

    check_embedding(given.embedder, given.out)


def _train(given: argparse.Namespace) -> None:
    if given.go_on and (given.resume or given.dry_run):
        raise ConfigError(
            "--continue begins a run or goes on with it; it goes with no --resume, no --dry-run"
        )
    if given.new_mlflow_run and not given.resume:
        raise ConfigError(
            "--new-mlflow-run needs --resume RUN; a run that begins has a new MLflow run anyway"
        )
    if given.resume and given.dry_run:
        raise ConfigError("--dry-run checks a config file; it does not go with --resume")
    if given.resume:
        check_overrides(given.overrides)
    elif given.config is None:
        raise ConfigError(
            "train needs a config file, for example pipelines/configs/demo.yaml, or --resume RUN"
        )


def _sample(given: argparse.Namespace) -> None:
    from mmdiff_ray.evaluation.gallery import split_given
    from mmdiff_ray.training.inference import check_sampler

    for option in ("num", "steps"):
        value = getattr(given, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} ({value}) must be at least 1")
    if given.sampler is not None:
        check_sampler(given.sampler)
    if not given.guidance >= 0:
        raise ConfigError(f"--guidance ({given.guidance:g}) must be at least 0; 1 is none, above 1 more")
    for text in given.given:
        split_given(text)


def _generate(given: argparse.Namespace) -> None:
    _check_workers(given)
    _sample(given)


def _evaluate(given: argparse.Namespace) -> None:
    _check_workers(given)
    check_overrides(given.overrides)


def _experiment(given: argparse.Namespace) -> None:
    from mmdiff_ray.experiments.spec import load_experiment

    if "://" in given.runs:
        raise ConfigError(
            f"--runs ({given.runs}): an experiment needs a folder there, on a disk that all nodes share"
        )
    load_experiment(given.name, given.preset).matching(given.cells)


def _sweep(given: argparse.Namespace) -> None:
    if given.file == "report":
        if len(given.overrides) != 1:
            raise ConfigError("sweep report needs the name or the id of a sweep's run in MLflow")
    elif given.resume:
        from mmdiff_ray.distributed.sweep_commands import check_changed

        if given.dry_run:
            raise ConfigError("--dry-run checks a sweep's file; it does not go with --resume")
        check_changed(given.overrides)
    elif given.file is None:
        raise ConfigError("sweep needs a file, for example sweeps/quickstart.yaml, or --resume SWEEP")


def _check_workers(given: argparse.Namespace) -> None:
    if given.workers < 0:
        raise ConfigError(
            f"--workers ({given.workers}) must be at least 0; 0 works in this process, without Ray"
        )


CHECKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "data_build": _data_build,
    "data_embed": _data_embed,
    "train": _train,
    "sample": _sample,
    "generate": _generate,
    "evaluate": _evaluate,
    "experiment": _experiment,
    "sweep": _sweep,
}
"""What checks each command (`run` of its parser) that has something to check."""
