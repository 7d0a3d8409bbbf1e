"""`mmdiff`: one module per command, with its arguments and checks."""

import argparse
import os
import sys
from collections.abc import Sequence

from mmdiff_ray import __version__
from mmdiff_ray.cli import (
    cluster,
    compare,
    data,
    doctor,
    evaluate,
    experiment,
    export,
    jobs,
    sample,
    submit,
    sweep,
    train,
    try_run,
    ui,
)
from mmdiff_ray.cli.common import report_unexpected
from mmdiff_ray.config import ConfigError, RunError, without_passwords

COMMANDS = (
    data,
    train,
    sample,
    try_run,
    evaluate,
    export,
    compare,
    experiment,
    sweep,
    submit,
    jobs,
    cluster,
    ui,
    doctor,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 success, 1 failure, 2 wrong input, 130 interrupted."""
    given = parse(arguments)
    try:
        if given.working_folder:
            _change_folder(given.working_folder)
        given.check(given)
        return int(given.run(given))
    except (ConfigError, RunError) as error:
        print(f"mmdiff: {without_passwords(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("mmdiff: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        print(f"mmdiff: {report_unexpected(error)}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="mmdiff", description="Train multi-modal, multi-task diffusion models on Ray."
    )
    parser.add_argument("--version", action="version", version=f"mmdiff {__version__}")
    parser.add_argument("-C", dest="working_folder", metavar="DIR", help="work in this folder")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of a command. Exits with code 2 if they are invalid."""
    parser = make_parser()
    given, extra = parser.parse_known_args(arguments)
    given.extra = extra
    if hasattr(given, "overrides"):  # argparse does not accept positional arguments after an option
        given.overrides += [word for word in extra if not word.startswith("-")]
        extra = [word for word in extra if word.startswith("-")]
    if extra and given.command != "data build":
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if given.command in ("train", "sweep") and given.resume:
        _take_overrides(given)
    return given


def _take_overrides(given: argparse.Namespace) -> None:
    """Use all positional arguments as overrides if the command resumes, since it then has no file."""
    file = "config" if given.command == "train" else "file"
    if (word := getattr(given, file)) is not None:
        given.overrides.insert(0, word)
        setattr(given, file, None)
    if given.command == "train":
        named = [word for word in given.overrides if word.startswith("runs=")]
        given.overrides = [word for word in given.overrides if word not in named]
        given.runs = named[-1].partition("=")[2] if named else given.runs


def _change_folder(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(f"-C: cannot change to {folder}: {error.strerror}") from None
