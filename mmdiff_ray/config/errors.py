"""What the package raises for mistakes of the person who uses it."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A mistake in a configuration, in words for the person who wrote it."""


class UnreachableError(ConfigError):
    """Data that could not be looked at: the store did not answer, or not to this person."""


class RunError(RuntimeError):
    """A run that failed once it had started, in words for the person who runs it."""


class OutageError(RunError):
    """Storage that did not answer for minutes: what needs it may go on later, from its last checkpoint."""


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put what a mistake is in before the words of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
