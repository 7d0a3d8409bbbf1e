"""What the package raises for mistakes of the person who uses it."""


class ConfigError(ValueError):
    """A mistake in a configuration, in words for the person who wrote it."""


class UnreachableError(ConfigError):
    """Data that could not be looked at: the store did not answer, or not to this person."""


class RunError(RuntimeError):
    """A run that failed once it had started, in words for the person who runs it."""
