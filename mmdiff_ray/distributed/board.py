"""What driver and workers tell each other. The actor's process imports nothing but this."""

from collections.abc import Mapping
from typing import Any


class Board:
    """The actor between driver and workers: events one way, the wish to stop the other, and why no restart
    would help."""

    def __init__(self, bad_rows: Mapping[str, str] | None = None) -> None:
        self._bad_rows = dict(bad_rows or {})
        self._events: list[dict[str, Any]] = []
        self._stop = False
        self._failures = 0
        self._failure: Exception | None = None

    def post(self, event: dict[str, Any]) -> None:
        """Take an event from a worker. A new checkpoint is progress: failures are counted anew."""
        if event["kind"] == "saved":
            self._failures = 0
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def bad_rows(self, rows: Mapping[str, str]) -> dict[str, str]:
        """Take rows that a worker could not read, place -> why; return those of all workers."""
        if not rows.keys() <= self._bad_rows.keys():
            self._bad_rows |= {place: why for place, why in rows.items() if place not in self._bad_rows}
            self._events.append({"kind": "bad_rows", "rows": self._bad_rows})
        return self._bad_rows

    def fail(self, failure: Exception) -> None:
        """Note a failure that a restart would only repeat; the first one counts."""
        self._failure = self._failure or failure

    def failed(self, failure: Exception, most: int) -> bool:
        """Count a failure of the workers; return whether the run ends: it is one of more than `most` in a row
        with no new checkpoint between, or a restart would only repeat it."""
        self._failures += 1
        if self._failures > most:
            self.fail(failure)
        return self._failure is not None

    def failure(self) -> Exception | None:
        """Return the failure that ends the run, if there was one."""
        return self._failure

    def ask_to_stop(self) -> None:
        """Ask the workers to save and end."""
        self._stop = True

    def stop_asked(self) -> bool:
        """Return whether the workers should end."""
        return self._stop
