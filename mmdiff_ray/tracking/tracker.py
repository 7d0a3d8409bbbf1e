"""Record a run while it trains: every call writes to disk and returns, a thread sends to MLflow."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mmdiff_ray.tracking import store
from mmdiff_ray.tracking.recorder import Recorder
from mmdiff_ray.tracking.sender import Sender, reason
from mmdiff_ray.tracking.spool import Spool, waiting

POLL_S = 1.0
LONGEST_PAUSE_S = 30.0
CLOSING_PAUSE_S = 0.5
LONGEST_CLOSING_PAUSE_S = 5.0
GIVE_UP_FAILURES = 3
"""Failed attempts in a row after which one that closes no longer waits for a store that is away."""
END_WAIT_S = 180.0
"""How long the end of a run waits for a store that is away and takes nothing."""
AGAIN_S = 8.0
"""The same where this process has waited for that store in vain before."""
UNBEGUN_WAIT_S = 30.0
"""The same where the store has never been there for this run."""
_log = logging.getLogger(__name__)
_missed: set[str] = set()
"""The stores that an end of this process has waited for in vain, until they answer again."""

Say = Callable[[str], None]
"""Takes a sentence for the person who runs this."""


class Tracker(Recorder):
    """A recorder whose spool is sent to one run of MLflow by a daemon thread.

    A store that is away costs nothing but disk: the thread tries again with growing pauses, and what is
    unsent when the process ends is sent by the next tracker under the same root, or by `replay`.
    Raises OSError only where the spool itself cannot be written.
    """

    def __init__(self, uri: str, run_id: str, root: str | Path):
        """Begin to record. root: the folder of the run's spools, on a disk that outlives the process."""
        store.prepare(uri)
        self.problem: Exception | None = None
        self._root = Path(root)
        self._sender = Sender(uri, run_id)
        self._adopted: list[tuple[Spool, Sender]] = []
        self._changed = threading.Condition()
        self._hurry = self._closing = self._discarded = False
        self._failures, self._away = 0, False
        self._moved = time.monotonic()
        super().__init__(Spool.create(root, {"uri": store.shown(uri), "run_id": run_id}))
        self._adopt()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """The id of the run in MLflow; asks the store where the run was begun without it."""
        return self._sender.run_id

    @property
    def error(self) -> str | None:
        """What went wrong when records were last sent, in one line; None if nothing did."""
        return None if self.problem is None else reason(self.problem)

    @property
    def waiting(self) -> int:
        """The number of records that have not been sent."""
        return len(self._spool) + sum(len(spool) for spool, _ in self._adopted)

    def flush(self, timeout_s: float, failures: int = GIVE_UP_FAILURES) -> int:
        """Wait until everything is sent, at most `timeout_s`, and return how many records are not.

        failures: after so many failed attempts in a row it gives up; `problem` holds the last error.
        """
        self._begin_flush()
        with self._changed:
            self._changed.wait_for(lambda: not self.waiting or self._failures >= failures, timeout_s)
            self._hurry = False
        return self.waiting

    def close(self, timeout_s: float = 10.0) -> int:
        """Send what is left, for at most `timeout_s`, stop, and return how many records wait on disk.

        A few failed attempts end it: others send what is left, or tell of it. The last one is `finish`.
        """
        self.flush(timeout_s)
        self._stop()
        return self._told()

    def finish(self, wait_s: float | None = None, say: Say = _log.warning) -> int:
        """Send what is left, stop, and return how many records wait on disk, as the last one who can send.

        A store that is away is waited for, until it has taken nothing for `wait_s` (None: END_WAIT_S, once in
        a process), and `say` is told. Where a run began without its store, which has not come since, a few
        failed attempts are enough. KeyboardInterrupt ends the wait at once.
        """
        uri = self._sender.uri
        if wait_s is None:
            wait_s = min(END_WAIT_S, AGAIN_S) if uri in _missed else END_WAIT_S
        self._begin_flush()
        try:
            with self._changed:
                self._await_store(wait_s, say)
        finally:
            self._stop()
        if self.waiting:
            _missed.add(uri)
        return self._told()

    def _told(self) -> int:
        """Return how many records wait on disk, and tell the log of them."""
        left = self.waiting
        if left:
            _log.warning("%d records of the run wait in %s for MLflow (%s)", left, self._root, self.error)
        return left

    def _begin_flush(self) -> None:
        self._adopt()
        with self._changed:
            self.problem = None
            self._failures = 0
            self._hurry = True
            self._moved = time.monotonic()
            self._changed.notify_all()

    def _await_store(self, wait_s: float, say: Say) -> None:
        """Wait until all is sent or nothing has moved for `wait_s`; say so at the first failure."""
        told = False
        while self.waiting and not (self._hopeless and self._failures >= GIVE_UP_FAILURES):
            longest = min(wait_s, UNBEGUN_WAIT_S) if self._sender.unbegun else wait_s
            left_s = self._moved + longest - time.monotonic()
            if left_s <= 0:
                return
            if self._failures and not told and not self._hopeless:
                told = True
                until = time.strftime("%H:%M:%S", time.localtime(time.time() + left_s))
                say(
                    f"MLflow at {store.shown(self._sender.uri)}: {self.error}; {self.waiting} records wait. "
                    f"Trying again until {until}; Ctrl-C ends that, and they stay in {self._root}"
                )
            self._changed.wait(left_s)

    @property
    def _hopeless(self) -> bool:
        """Whether the run began without its store, which has not come yet, or the store does not know it."""
        return self._sender.unbegun or getattr(self.problem, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"

    def discard(self) -> None:
        """Stop and forget what this tracker has not sent."""
        self._discarded = True
        self._stop()

    def _stop(self) -> None:
        """End the thread; inside a request it ends later, and gives its spools up then."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(POLL_S)

    def _work(self) -> None:
        while not self._closing:
            try:
                if self._hurry:  # others of this run may have ended since
                    self._adopt()
                self._send_all()
                self._note(None)
            except Exception as problem:
                self._note(problem)
            self._pause(self._failures)
        for spool, _ in self._adopted:
            spool.close()
        self._spool.close(keep=not self._discarded)

    def _adopt(self) -> None:
        """Take over the spools that ended processes of this run have left."""
        for folder in waiting(self._root):
            if folder != self._spool.folder and (spool := Spool.adopt(folder)) is not None:
                target = spool.target
                sender = Sender(store.full(target["uri"], self._sender.uri), target["run_id"])
                with self._changed:
                    self._adopted = [*self._adopted, (spool, sender)]

    def _send_all(self) -> None:
        """Send everything, ended processes' records first; raise the last error after all had their turn."""
        problem: Exception | None = None
        for spool, sender in [*self._adopted, (self._spool, self._sender)]:
            try:
                while not self._closing and sender.send_next(spool):
                    self._note_move()
            except Exception as error:
                problem = error
        self._give_up_empty()
        if problem is not None:
            raise problem

    def _give_up_empty(self) -> None:
        with self._changed:
            done = [spool for spool, _ in self._adopted if not len(spool)]
            self._adopted = [pair for pair in self._adopted if len(pair[0])]
        for spool in done:
            spool.close()

    def _note(self, problem: Exception | None) -> None:
        uri = store.shown(self._sender.uri)
        if problem and not self._away:
            _log.warning(
                "MLflow at %s: %s; the run goes on, records wait in %s", uri, reason(problem), self._root
            )
        elif not problem and self._away:
            _log.info("MLflow at %s answers again; nothing was lost", uri)
        self._away = problem is not None
        with self._changed:
            self.problem = problem
            self._failures = self._failures + 1 if problem else 0
            self._changed.notify_all()

    def _note_move(self) -> None:
        _missed.discard(self._sender.uri)
        with self._changed:
            self._moved = time.monotonic()
            self._changed.notify_all()

    def _pause(self, failures: int) -> None:
        pause = min(LONGEST_PAUSE_S, POLL_S * 2**failures) if failures else POLL_S
        with self._changed:
            if self._closing:
                return
            if self._hurry:
                growing = min(LONGEST_CLOSING_PAUSE_S, CLOSING_PAUSE_S * 2 ** max(0, failures - 1))
                self._changed.wait(growing if failures else 0.01)
            else:
                self._changed.wait_for(lambda: self._hurry or self._closing, pause)
