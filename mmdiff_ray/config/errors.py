"""Exceptions for errors that a user can cause or must handle."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class OneLine(Exception):
    """An error whose message is always one printable line, whatever text it quotes."""

    def __str__(self) -> str:
        """Return the message as one line, with control characters and lone surrogates escaped."""
        line = re.sub(r"\s*\n\s*", " ", super().__str__().strip())
        return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line)


class ConfigError(OneLine, ValueError):
    """A mistake in a configuration or command; the message is for the user."""


class UnreachableError(ConfigError):
    """Storage that did not respond or denied access, so its contents are unknown."""


class RunError(OneLine, RuntimeError):
    """A run that failed after its start; the message is for the user."""


class OutageError(RunError):
    """Storage was unavailable for minutes. The run can resume later from its last checkpoint."""


@contextmanager
def decoding() -> Iterator[None]:
    """Convert the exceptions of a decoder for damaged or oversized content to ValueError; keep OSError.

    Decoders of images and arrays raise arbitrary exceptions: SyntaxError, struct.error, KeyError,
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
    """Prefix the message of a ConfigError with `name`, such as a file or key."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
