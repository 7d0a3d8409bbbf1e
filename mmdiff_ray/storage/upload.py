"""Upload in a thread: oldest first. What fails is retried until it succeeds, and holds up nothing else."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
ONE_OUTAGE_S = 60.0
AGAIN_S = 8.0
"""Enough for one more attempt at a storage that has not answered for long."""

_log = logging.getLogger(__name__)

Say = Callable[[str], None]
"""Takes a sentence for the person who runs this; called from another thread."""


@dataclass(eq=False)
class Errand:
    """One piece of work. name: what it brings. action: gets a function that takes how many bytes have gone.

    lane: errands of one lane are done in order. due: when the next attempt may begin. most: the most bytes
    that any attempt has sent. error: why the last attempt failed. failed: when the first of those did.
    """

    name: str
    action: Callable[[Callable[[int], None]], None]
    lane: str
    due: float = field(default_factory=time.monotonic)
    pause: float = FIRST_PAUSE_S
    most: int = 0
    error: str = ""
    failed: float = 0.0
    done: bool = False


class Uploader:
    """A queue of errands and the thread that does them. where: the storage, as it is named to people."""

    def __init__(self, where: str, say: Say = _log.warning) -> None:
        self.where = where
        self.say = say
        self._errands: list[Errand] = []
        self._changed = threading.Condition()
        self._moved = time.monotonic()
        self._thread: threading.Thread | None = None

    def add(self, name: str, action: Callable[[Callable[[int], None]], None], lane: str = "") -> Errand:
        """Queue an errand and return it. lane: its name by default."""
        errand = Errand(name, action, lane or name)
        with self._changed:
            if not self._errands:
                self._moved = time.monotonic()
            self._errands.append(errand)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="storage", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return errand

    def waiting(self) -> list[str]:
        """Return the names of what is not done, in order, each once."""
        with self._changed:
            return list(dict.fromkeys(errand.name for errand in self._errands))

    @property
    def trouble(self) -> str:
        """Return why an attempt failed at something that is still not done; nothing while all goes well."""
        with self._changed:
            return next((errand.error for errand in self._errands if errand.error), "")

    def still_for(self) -> float:
        """Return for how many seconds nothing has moved."""
        return time.monotonic() - self._moved

    def patience(self, still_s: float) -> float:
        """Return for how many seconds to wait for a move: fewer where nothing moved for so long."""
        return min(still_s, AGAIN_S) if self.trouble and self.still_for() > still_s else still_s

    def flush(self, still_s: float, longest_s: float = float("inf")) -> list[str]:
        """Wait until all is done, as long as something moves; return the names of what is not done.

        still_s: how many seconds nothing may move; longest_s: how many to wait in all.
        """
        begun, still_s = time.monotonic(), self.patience(still_s)
        with self._changed:
            for errand in self._errands:  # no pause before the next attempt
                errand.due = min(errand.due, begun)
            self._changed.notify_all()
            while self._errands:
                now = time.monotonic()
                left = min(max(begun, self._moved) + still_s, begun + longest_s) - now
                if left <= 0:
                    break
                self._changed.wait(left)
        return self.waiting()

    def _work(self) -> None:
        while True:
            errand = self._next()
            try:
                errand.action(lambda sent, errand=errand: self._went(errand, sent))  # type: ignore[misc]
            except Exception as error:  # whatever it is: storage may be well again later
                self._failed(errand, str(error) or type(error).__name__)
            else:
                with self._changed:
                    self._errands.remove(errand)
                    errand.done, self._moved = True, time.monotonic()
                    self._changed.notify_all()

    def _next(self) -> Errand:
        """Wait for the errand that is due first among the first of all lanes."""
        with self._changed:
            while True:
                lanes: dict[str, Errand] = {}
                for errand in self._errands:
                    lanes.setdefault(errand.lane, errand)
                first = min(lanes.values(), key=lambda errand: errand.due, default=None)
                wait_s = None if first is None else first.due - time.monotonic()
                if first is not None and wait_s is not None and wait_s <= 0:
                    return first
                self._changed.wait(wait_s)

    def _failed(self, errand: Errand, error: str) -> None:
        """Put the next attempt off. Warn once per top folder until all of it has arrived, and once for all
        that fails within ONE_OUTAGE_S."""
        folder, now = errand.name.partition("/")[0], time.monotonic()
        with self._changed:
            failing = [other for other in self._errands if other.error]
            is_known = any(
                other.name.partition("/")[0] == folder or now - other.failed < ONE_OUTAGE_S
                for other in failing
            )
            errand.failed = errand.failed if errand.error else now
            errand.error, errand.due = error, now + errand.pause
            errand.pause = min(2 * errand.pause, LONGEST_PAUSE_S)
        if not is_known:
            self._tell(f"{errand.name} does not reach {self.where}, which is tried again: {error}")

    def _tell(self, text: str) -> None:
        try:
            self.say(text)
        except Exception:  # whoever listened is gone
            _log.warning(text)

    def _went(self, errand: Errand, sent: int) -> None:
        if sent > errand.most:
            errand.most, self._moved = sent, time.monotonic()
