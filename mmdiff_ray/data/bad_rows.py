"""Rows that could not be read: each counts once in a run, on whichever rank and in whichever epoch."""

import logging
from collections.abc import Callable, Mapping

import numpy as np

from mmdiff_ray.config import ConfigError

Rows = Mapping[str, str]
"""place of a row -> why it could not be read."""


class BadRowsError(ConfigError):
    """More rows than `data.bad_row_limit` could not be read."""


class BadRows:
    """The rows that this process could not read, counted with those of the whole run.

    limit: `data.bad_row_limit`. tell: takes this process's rows and returns the run's, which other ranks and
    earlier processes have found too; asked where there are new ones.
    """

    def __init__(self, limit: int, tell: Callable[[Rows], Rows] = dict) -> None:
        self.of_run: Rows = {}
        self._limit, self._tell = limit, tell
        self._own: dict[str, str] = {}

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Count what a reader returned. Raises BadRowsError where the run has more than the limit."""
        bad = ~arrays["real"]
        if not bad.any():
            return
        found = dict(zip(arrays["place"][bad].tolist(), arrays["error"][bad].tolist(), strict=True))
        if found.keys() <= self._own.keys():
            return
        self._own = found | self._own
        self.ask()
        if len(self.of_run) > self._limit:
            raise BadRowsError(
                f"{len(self.of_run)} rows could not be read, more than data.bad_row_limit ({self._limit}). "
                f"The first: {next(iter(self.of_run.values()))}"
            )
        logging.getLogger(__name__).warning(
            "%d rows could not be read so far; now: %s", len(self.of_run), next(iter(found.values()))
        )

    def ask(self) -> None:
        """Bring `of_run` up to date."""
        self.of_run = self._tell(self._own)
