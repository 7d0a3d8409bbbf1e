"""Messages between driver and workers.

This module imports no torch, so that the actor's process stays small.
"""

from collections.abc import Mapping
from typing import Any


class Board:
    """Pass events from workers to the driver, and stop requests and fatal errors to workers (a Ray actor).

    bad_rows: unreadable rows that the run already knows, place -> reason.
    """

    def __init__(self, bad_rows: Mapping[str, str] | None = None) -> None:
        self._bad_rows = dict(bad_rows or {})
        self._events: list[dict[str, Any]] = []
        self._stop = False
        self._failures = 0
        self._failure: Exception | None = None

    def post(self, event: dict[str, Any]) -> None:
        """Store an event of a worker. A new checkpoint resets the count of failures in a row."""
        if event["kind"] == "saved":
            self._failures = 0
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def bad_rows(self, rows: Mapping[str, str]) -> dict[str, str]:
        """Add rows that a worker could not read (place -> reason); return those of all workers."""
        if not rows.keys() <= self._bad_rows.keys():
            self._bad_rows |= {place: reason for place, reason in rows.items() if place not in self._bad_rows}
            self._events.append({"kind": "bad_rows", "rows": self._bad_rows})
        return self._bad_rows

    def fail(self, failure: Exception) -> None:
        """Record an error that a restart would repeat. The first one is kept."""
        self._failure = self._failure or failure

    def failed(self, failure: Exception, most: int) -> bool:
        """Count a failure of the workers and return whether the run must end.

        It ends after more than `most` failures in a row with no new checkpoint between them, or if a worker
        has recorded an error with `fail`.
        """
        self._failures += 1
        if self._failures > most:
            self.fail(failure)
        return self._failure is not None

    def failure(self) -> Exception | None:
        """Return the error that ends the run, if any."""
        return self._failure

    def request_stop(self) -> None:
        """Request that the workers save a checkpoint and end."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Return whether the driver has requested a stop."""
        return self._stop
