"""What the package raises for mistakes of the person who uses it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class OneLine(Exception):
    """An error whose message is one printable line, whatever names, files and libraries bring into it."""

    def __str__(self) -> str:
        """Return the message in one line; control characters and lone surrogates as their escapes."""
        line = re.sub(r"\s*\n\s*", " ", super().__str__().strip())
        return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line)


class ConfigError(OneLine, ValueError):
    """A mistake in a configuration, in words for the person who wrote it."""


class UnreachableError(ConfigError):
    """Data that could not be looked at: the store did not answer, or not to this person."""


class RunError(OneLine, RuntimeError):
    """A run that failed once it had started, in words for the person who runs it."""


class OutageError(RunError):
    """Storage that did not answer for minutes: what needs it may go on later, from its last checkpoint."""


@contextmanager
def decoding() -> Iterator[None]:
    """Turn what a decoder raises for damaged or oversized content into ValueError; OSError stays.

    Decoders of pictures and arrays raise whatever their parsers do: SyntaxError, struct.error, KeyError,
    RecursionError, PIL's DecompressionBombError, ...
    """
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put what a mistake is in before the words of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
