"""Work for storage, done in a thread: in order, each piece again and again until it succeeds."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
AGAIN_S = 8.0
"""Enough for one more attempt at a storage that has not answered for long."""

_log = logging.getLogger(__name__)

Say = Callable[[str], None]
"""Takes a sentence for the person who runs this; called from another thread."""


@dataclass(eq=False)
class Errand:
    """One piece of work. name: what it brings. action: gets a function that takes how many bytes have gone.

    most: the most bytes that any attempt has brought on its way.
    """

    name: str
    action: Callable[[Callable[[int], None]], None]
    done: bool = False
    most: int = 0


class Uploader:
    """A queue of errands and the thread that does them. where: the storage, as it is named to people."""

    def __init__(self, where: str, say: Say = _log.warning) -> None:
        self.where = where
        self.say = say
        self._errands: deque[Errand] = deque()
        self._changed = threading.Condition()
        self._moved = time.monotonic()
        self._thread: threading.Thread | None = None
        self._trouble = ""

    def add(self, name: str, action: Callable[[Callable[[int], None]], None]) -> Errand:
        """Put an errand behind the others and return it."""
        errand = Errand(name, action)
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

    def count(self, name: str) -> int:
        """Return how many errands of a name are not done."""
        with self._changed:
            return sum(errand.name == name for errand in self._errands)

    @property
    def trouble(self) -> str:
        """Return why the last attempt failed; nothing while all goes well."""
        return self._trouble

    def still_for(self) -> float:
        """Return for how many seconds nothing has moved."""
        return time.monotonic() - self._moved

    def patience(self, still_s: float) -> float:
        """Return for how many seconds to wait for a move: fewer where nothing moved for so long."""
        return min(still_s, AGAIN_S) if self._trouble and self.still_for() > still_s else still_s

    def flush(self, still_s: float, longest_s: float = float("inf")) -> list[str]:
        """Wait until all is done, as long as something moves; return the names of what is not done.

        still_s: how many seconds nothing may move; longest_s: how many to wait in all.
        """
        begun, still_s = time.monotonic(), self.patience(still_s)
        with self._changed:
            self._changed.notify_all()  # no pause before the next attempt
            while self._errands:
                now = time.monotonic()
                left = min(max(begun, self._moved) + still_s, begun + longest_s) - now
                if left <= 0:
                    break
                self._changed.wait(left)
        return self.waiting()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._errands:
                    self._changed.wait()
                errand = self._errands[0]
            self._do(errand)
            with self._changed:
                self._errands.popleft()
                errand.done, self._moved, self._trouble = True, time.monotonic(), ""
                self._changed.notify_all()

    def _do(self, errand: Errand) -> None:
        pause = FIRST_PAUSE_S
        while True:
            try:
                return errand.action(lambda sent: self._went(errand, sent))
            except Exception as error:  # whatever it is: storage may be well again later
                if not self._trouble:
                    self._tell(f"{errand.name} does not reach {self.where}, which is tried again: {error}")
                self._trouble = str(error) or type(error).__name__
            with self._changed:
                self._changed.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _tell(self, text: str) -> None:
        try:
            self.say(text)
        except Exception:  # whoever listened is gone
            _log.warning(text)

    def _went(self, errand: Errand, sent: int) -> None:
        if sent > errand.most:
            errand.most, self._moved = sent, time.monotonic()
