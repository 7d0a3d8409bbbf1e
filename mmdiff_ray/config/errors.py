"""What the package raises for mistakes of the person who uses it."""


class ConfigError(ValueError):
    """A mistake in a configuration, in words for the person who wrote it."""


class RunError(RuntimeError):
    """A run that failed once it had started, in words for the person who runs it."""
