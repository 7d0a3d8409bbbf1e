"""Record a run while it trains: every call writes to the run's log and returns, a thread sends to MLflow."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mmdiff_ray.tracking import store
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.recorder import Recorder
from mmdiff_ray.tracking.sender import RunMissing, Sender, reason

POLL_S = 1.0
LONGEST_PAUSE_S = 30.0
CLOSING_PAUSE_S = 0.5
LONGEST_CLOSING_PAUSE_S = 5.0
GIVE_UP_FAILURES = 3
"""Failed attempts in a row after which `flush` no longer waits for a store that is away."""
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
    """A recorder whose log is sent to one run of MLflow by a daemon thread.

    A store that is away costs nothing but disk: the thread tries again with growing pauses. What is unsent
    when the process ends is sent by the next tracker of the run, in any process, or by `replay`.
    """

    def __init__(self, uri: str, run_id: str, root: str | Path):
        """Begin to record. root: the folder of the run's log, on a disk that outlives the process."""
        store.prepare(uri)
        super().__init__(Log(root, {"uri": store.shown(uri), "run_id": run_id}))
        self.problem: Exception | None = None
        self._sender = Sender(uri, run_id)
        self._changed = threading.Condition()
        self._hurry = self._closing = self._away = False
        self._failures, self._seen = 0, self._log.sent
        self._moved = time.monotonic()
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
        return self._log.waiting

    def flush(self, timeout_s: float, failures: int = GIVE_UP_FAILURES) -> int:
        """Wait until everything is sent, at most `timeout_s`, and return how many records are not.

        failures: after so many failed attempts in a row it gives up; `problem` holds the last error.
        """
        end = self._begin_flush()
        with self._changed:
            self._changed.wait_for(lambda: self._log.has_sent(end) or self._failures >= failures, timeout_s)
            self._hurry = False
            return 0 if self._log.has_sent(end) else self.waiting

    def close(self, timeout_s: float = 10.0) -> int:
        """Send what is left, for at most `timeout_s`, stop, and return how many records wait on disk.

        A few failed attempts end it: another process sends what is left, or reports it. The last one of a run
        calls `finish`.
        """
        left = self.flush(timeout_s)
        self._stop()
        return self._report(left)

    def finish(self, wait_s: float | None = None, say: Say = _log.warning) -> int:
        """Send what is left, stop, and return how many records wait on disk, as the last one who can send.

        A store that is away is waited for, until it has taken nothing for `wait_s` (None: END_WAIT_S, once in
        a process), and `say` gets a line about it. Where a run began without its store, which has not come
        since, a few failed attempts are enough. KeyboardInterrupt ends the wait at once.
        """
        uri = self._sender.uri
        if wait_s is None:
            wait_s = min(END_WAIT_S, AGAIN_S) if uri in _missed else END_WAIT_S
        try:
            self._await_store(self._begin_flush(), wait_s, say)
        finally:
            self._stop()
        if refused := self._log.refused:
            say(f"MLflow refused {refused} records; reasons in {self._log.root}/refused.jsonl")
        if left := self.waiting:
            _missed.add(uri)
        return self._report(left)

    def discard(self) -> None:
        """Stop and forget a log that nothing was sent from."""
        self._stop()
        self._log.remove()

    def _report(self, left: int) -> int:
        """Log how many records wait on disk and how many were lost; return the former."""
        root = self._log.root
        if left:
            _log.warning("%d records of the run wait in %s for MLflow (%s)", left, root, self.error)
        if self._log.lost:
            _log.warning("%d records of the run are lost: %s took nothing", self._log.lost, root)
        return left

    def _begin_flush(self) -> int:
        """Have the thread send without pauses; return the end of what is to be sent."""
        with self._changed:
            self.problem, self._failures, self._moved = None, 0, time.monotonic()
            self._hurry = True
            self._changed.notify_all()
        return self._log.end

    def _await_store(self, end: int, wait_s: float, say: Say) -> None:
        """Wait until all is sent or nothing has moved for `wait_s`; say so at the first failure."""
        told = False
        with self._changed:
            while not self._log.has_sent(end) and not (self._hopeless and self._failures >= GIVE_UP_FAILURES):
                longest = min(wait_s, UNBEGUN_WAIT_S) if self._sender.unbegun else wait_s
                left_s = self._moved + longest - time.monotonic()
                if left_s <= 0:
                    return
                if self._failures and not told and not self._hopeless:
                    told = True
                    until = time.strftime("%H:%M:%S", time.localtime(time.time() + left_s))
                    say(
                        f"MLflow at {store.shown(self._sender.uri)}: {self.error}; {self.waiting} records "
                        f"wait. Trying again until {until}; Ctrl-C ends that, and they stay in "
                        f"{self._log.root}"
                    )
                self._changed.wait(left_s)

    @property
    def _hopeless(self) -> bool:
        """Whether the run began without its store, which has not come yet, or the store has no such run."""
        missing = isinstance(self.problem, RunMissing)
        return self._sender.unbegun or missing or store.is_unknown(self.problem)

    def _stop(self) -> None:
        """End the thread; inside a request it ends later, and lets others send then."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(POLL_S)

    def _work(self) -> None:
        while not self._closing:
            problem = None
            try:
                with self._log.sending() as ours:
                    while ours and not self._closing and self._sender.send_next(self._log):
                        self._note_move()
            except Exception as error:
                problem = error
            self._note(problem)
            self._pause()

    def _note(self, problem: Exception | None) -> None:
        uri, root = store.shown(self._sender.uri), self._log.root
        if problem and not self._away:
            _log.warning("MLflow at %s: %s; the run goes on, records wait in %s", uri, reason(problem), root)
        elif not problem and self._away:
            _log.info("MLflow at %s answers again; nothing was lost", uri)
        self._away = problem is not None
        if self._log.sent > self._seen:  # by this process or another
            self._note_move()
        with self._changed:
            self.problem = problem
            self._failures = self._failures + 1 if problem else 0
            self._changed.notify_all()

    def _note_move(self) -> None:
        _missed.discard(self._sender.uri)
        with self._changed:
            self._seen, self._moved = self._log.sent, time.monotonic()
            self._changed.notify_all()

    def _pause(self) -> None:
        failures = self._failures
        with self._changed:
            if self._closing:
                return
            if self._hurry:
                growing = min(LONGEST_CLOSING_PAUSE_S, CLOSING_PAUSE_S * 2 ** max(0, failures - 1))
                self._changed.wait(growing if failures else 0.01)
            else:
                pause = min(LONGEST_PAUSE_S, POLL_S * 2**failures)
                self._changed.wait_for(lambda: self._hurry or self._closing, pause)
