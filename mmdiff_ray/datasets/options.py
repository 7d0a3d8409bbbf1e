"""The options of pipelines: read from the command line, and told to a person who asks for help."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.base import Options

WIDTH, INDENT = 100, 18


def pipeline_options(words: Sequence[str]) -> dict[str, str]:
    """Return options from `key=value`, `--key value` and `--key=value` words. Raises ConfigError for
    others."""
    options: dict[str, str] = {}
    left, mapped = list(words), False
    while left:
        word = left.pop(0)
        if mapped and not word.startswith("--") and "=" in word:
            options["map"] += f",{word}"  # --map pixels=image label=label
            continue
        key, separator, value = word.removeprefix("--").partition("=")
        if not separator:
            if not word.startswith("--") or not left:
                raise ConfigError(f"option {word!r} must have the form key=value or --key value")
            value = left.pop(0)
        options[key.replace("-", "_")] = value
        mapped = word == "--map"
    return options


def describe(name: str | None = None) -> str:
    """Return the options of a pipeline, or where there is none of that name, of each, for a terminal."""
    known = registry.names("pipeline")
    parts = [_described(one) for one in ([name] if name in known else known)]
    return "\n\n".join([*parts, "\n".join(["options of all pipelines:", *_lines(Options)])])


def meanings(options: type) -> dict[str, str]:
    """Return option -> what it means, as the docstrings of a dataclass and of what it is made from say.

    There, an option is a name and a colon at the beginning or after a full stop or a semicolon.
    """
    found: dict[str, str] = {}
    for kind in reversed(options.__mro__):
        text = " ".join((inspect.cleandoc(kind.__doc__ or "")).split())
        names = "|".join(field.name for field in dataclasses.fields(kind)) if _is_own(kind) else ""
        parts = re.split(rf"(?:^|(?<=[.;] ))({names}): ", text) if names else []
        for option, meaning in zip(parts[1::2], parts[2::2], strict=True):
            found[option] = meaning.strip().rstrip(".;")
    return found


def _is_own(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) and "__doc__" in vars(kind)


def _described(name: str) -> str:
    pipeline = registry.look_up("pipeline", name)
    first = " ".join(inspect.cleandoc(pipeline.__doc__ or "").split("\n\n")[0].split())
    head = _filled(f"options of {name} ({first.rstrip('.')}):", "", "    ")
    return "\n".join([head, *_lines(pipeline.Options, Options)])


def _lines(options: type, base: type | None = None) -> Iterator[str]:
    """Yield the lines of options that the base lacks or has other defaults for."""
    common = {field.name: field.default for field in dataclasses.fields(base)} if base else {}
    told, count = meanings(options), 0
    for field in dataclasses.fields(options):
        if field.name in common and common[field.name] == field.default:
            continue
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        text = f"{field.name:<{INDENT - 3}} {told.get(field.name, '')}{default}"
        yield _filled(text, "  ", " " * INDENT)
        count += 1
    if not count:
        yield "  none of its own"


def _filled(text: str, first: str, later: str) -> str:
    """Return a text in lines of the width, indented as told; no word is cut."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_on_hyphens=False,
        break_long_words=False,
    )
