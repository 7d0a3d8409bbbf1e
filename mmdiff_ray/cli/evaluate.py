"""`mmdiff evaluate`: measure a trained model on held-out rows."""

import argparse

from mmdiff_ray.cli.common import Commands, add_model, check_workers, command, model_of
from mmdiff_ray.config import ConfigError, check_overrides


def add(commands: Commands) -> None:
    """Add `evaluate`."""
    evaluate = command(
        commands,
        "evaluate",
        "measure a trained model, and baselines without a model, on held-out rows",
        "mmdiff evaluate demo evaluate.rows=64",
        _run,
        _check,
    )
    add_model(evaluate)
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="values of evaluate.* and data.*")
    evaluate.add_argument("--workers", type=int, default=0, help="models at once on Ray; 0: in this process")


def _check(given: argparse.Namespace) -> None:
    check_workers(given)
    check_overrides(given.overrides)


def _run(given: argparse.Namespace) -> int:
    from mmdiff_ray.cli.training import exit_code
    from mmdiff_ray.distributed.display import make_console
    from mmdiff_ray.distributed.evaluate import evaluate_model, evaluate_run
    from mmdiff_ray.evaluation.run import tables
    from mmdiff_ray.runs.folder import display_path

    console = make_console()
    model = model_of(given)
    folder = model.run
    if folder is None:
        if given.workers:
            raise ConfigError("--workers needs a run, without --checkpoint")
        findings, place = evaluate_model(model, given.overrides)
    else:
        findings, place = evaluate_run(folder, given.overrides, pool=given.workers, progress=True)
    for table in tables(findings.figures):
        console.print(table)
    for what, name in (("figures   ", "evaluation.json"), ("pictures  ", "pictures")):
        console.print(f"{what}{display_path(folder or place, place / name)}", soft_wrap=True)
    return 0 if folder is None else exit_code(console, folder)
