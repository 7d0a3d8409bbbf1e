"""Shared parts of the commands: parsers, common arguments, and reports of unexpected errors."""

import argparse
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmdiff_ray.config import ConfigError, RunError, without_passwords

if TYPE_CHECKING:
    from mmdiff_ray.runs.find import Model

RUNS = "folder of all runs, or a URI that pyarrow supports (s3://bucket/runs)"
MODEL = "name, folder or URI of a run; a folder from `mmdiff export`; or pretrained:NAME"
Commands = Any
"""argparse's group of subparsers, whose class is private."""


def command(
    commands: Commands,
    name: str,
    text: str,
    example: str,
    run: Callable[[argparse.Namespace], int],
    check: Callable[[argparse.Namespace], None] = lambda given: None,
    **more: Any,
) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    run: runs the command and returns its exit code. check: raises ConfigError for arguments that are invalid
    on any machine, without heavy imports. more: arguments of argparse's `add_parser`.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )
    parser.set_defaults(command=parser.prog.removeprefix("mmdiff "), run=run, check=check)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a trained model."""
    parser.add_argument("model", metavar="RUN", help=MODEL)
    parser.add_argument(
        "--checkpoint", metavar="WHICH", help="best, last, or its samples: in place of the run's final model"
    )
    parser.add_argument("--runs", default="runs", help=RUNS)


def model_of(given: argparse.Namespace) -> "Model":
    """Return the model that the arguments name. Raises ConfigError."""
    from mmdiff_ray.runs.find import find_model

    model = find_model(given.model, given.runs)
    if given.checkpoint is None:
        return model
    from mmdiff_ray.runs.checkpoints import of_checkpoint

    return of_checkpoint(model, given.checkpoint)


def check_workers(given: argparse.Namespace) -> None:
    """Raise ConfigError for a negative number of workers."""
    if given.workers < 0:
        raise ConfigError(
            f"--workers ({given.workers}) must be at least 0; 0 runs in this process, without Ray"
        )


def report_unexpected(error: Exception) -> RunError:
    """Save the traceback of an unexpected error, without passwords; return an error with the file's name."""
    handle, file = tempfile.mkstemp(prefix="mmdiff-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf8", errors="backslashreplace") as log:
        log.write(without_passwords("".join(traceback.format_exception(error))))
    words = without_passwords(str(error)).strip().partition("\n")[0]
    return RunError(
        f"unexpected {type(error).__name__}{f': {words}' * bool(words)}; its traceback is in {file}"
    )
