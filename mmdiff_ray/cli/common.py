"""What the commands share: the form of their parsers, and arguments that several of them have."""

import argparse
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from mmdiff_ray.config import ConfigError, RunError, without_passwords

RUNS = "where runs lie: a folder, or any URI of pyarrow (s3://bucket/runs)"
MODEL = "a run's name, folder or URI; a folder that `mmdiff export` wrote; or pretrained:NAME"
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

    run: carries the command out and returns its exit code. check: raises ConfigError for arguments that
    could not work on any machine; it imports nothing heavy. more: of argparse's `add_parser`.
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


def check_workers(given: argparse.Namespace) -> None:
    """Raise ConfigError for a number of workers below 0."""
    if given.workers < 0:
        raise ConfigError(
            f"--workers ({given.workers}) must be at least 0; 0 works in this process, without Ray"
        )


def report_unexpected(error: Exception) -> RunError:
    """Write the traceback of an error that no code foresaw to a file, without keys in addresses; return the
    message that names the file."""
    handle, file = tempfile.mkstemp(prefix="mmdiff-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf8", errors="backslashreplace") as log:
        log.write(without_passwords("".join(traceback.format_exception(error))))
    words = without_passwords(str(error)).strip().partition("\n")[0]
    return RunError(
        f"unexpected {type(error).__name__}{f': {words}' * bool(words)}; its traceback is in {file}"
    )
