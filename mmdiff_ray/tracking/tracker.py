"""Send a run's log to MLflow during training. Calls append to the log and return; a thread sends."""

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mmdiff_ray.config import without_passwords
from mmdiff_ray.tracking import store
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.recorder import Recorder
from mmdiff_ray.tracking.sender import Sender, is_missing, reason

GIVE_UP_FAILURES = 3
"""Failed attempts in a row after which `close` stops waiting."""
END_WAIT_S = 180.0
"""How long `finish` waits without progress."""
SHORT_WAIT_S = 10.0
"""The same if the store never answered for this run, or not for an earlier run of this process."""
_log = logging.getLogger(__name__)
_unreachable: set[str] = set()
"""Stores that `finish` gave up on in this process; removed once they answer."""

Say = Callable[[str], None]
"""Show a message to the user."""


class Tracker(Recorder):
    """A recorder with a daemon thread that sends the log to one MLflow run.

    If the store does not answer, the thread retries with growing pauses. Records that are unsent when the
    process ends are sent by the run's next tracker, in any process, or by `replay`.
    """

    def __init__(self, uri: str, run_id: str, root: str | Path):
        """Start the thread. root: folder of the run's log, on a disk that outlives the process."""
        store.prepare(uri)
        super().__init__(Log(root, {"uri": without_passwords(uri), "run_id": run_id}))
        self.problem: Exception | None = None
        self._sender = Sender(uri, run_id)
        self._changed = threading.Condition()
        self._flushing = self._closing = False
        self._failures, self._sent_before, self._progress = 0, self._log.sent, time.monotonic()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """The run's id in MLflow. Queries the store if the run started offline."""
        return self._sender.run_id

    @property
    def error(self) -> str | None:
        """The error of the last failed attempt, in one line, or None."""
        return None if self.problem is None else reason(self.problem)

    def flush(self, timeout_s: float, failures: float = GIVE_UP_FAILURES, say: Say | None = None) -> int:
        """Wait until all records are sent; return the number of unsent ones.

        Gives up after `timeout_s` without progress, or after `failures` failures in a row (at most 3 if the
        store does not have the run). say: called once if the store does not answer.
        """
        uri = without_passwords(self._sender.uri)
        with self._changed:
            self._failures, self._progress, self._flushing = 0, time.monotonic(), True
            self._changed.notify_all()
            while not self._log.all_sent and (left_s := self._progress + timeout_s - time.monotonic()) > 0:
                missing = self._sender.found is None or is_missing(self.problem)
                if self._failures >= (min(failures, GIVE_UP_FAILURES) if missing else failures):
                    break
                if self._failures and not missing and say:
                    until = time.strftime("%H:%M:%S", time.localtime(time.time() + left_s))
                    say(
                        f"MLflow at {uri}: {self.error}; {self._log.waiting} records wait. Retrying until "
                        f"{until}; Ctrl-C stops retrying and keeps them in {self._log.root}"
                    )
                    say = None
                self._changed.wait(left_s)
            self._flushing = False
        return self._log.waiting

    def close(self, timeout_s: float = 10.0) -> int:
        """Flush and stop; return the number of records left to the process that calls `finish`."""
        self.flush(timeout_s)
        return self._stop()

    def finish(self, timeout_s: float | None = None, say: Say = _log.warning) -> int:
        """Flush and stop as the last process of the run; return the number of unsent records, kept on disk.

        timeout_s: None means END_WAIT_S or SHORT_WAIT_S. KeyboardInterrupt ends the wait.
        """
        if timeout_s is None:
            short = self._sender.found is None or self._sender.uri in _unreachable
            timeout_s = SHORT_WAIT_S if short else END_WAIT_S
        try:
            self.flush(timeout_s, math.inf, say)
        finally:
            left = self._stop()
        if left:
            _unreachable.add(self._sender.uri)
        if refused := self._log.refused:
            say(f"MLflow refused {refused} records; reasons in {self._log.root}/refused.jsonl")
        return left

    def discard(self) -> None:
        """Stop and delete the log."""
        self._stop()
        self._log.remove()

    def _stop(self) -> int:
        """Stop the thread, which may finish its last request later; return the number of unsent records."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(1.0)
        if left := self._log.waiting:
            _log.warning("%d records unsent to MLflow, kept in %s (%s)", left, self._log.root, self.error)
        if self._log.dropped:
            _log.warning("%d records are lost: %s is full", self._log.dropped, self._log.root)
        return left

    def _work(self) -> None:
        while not self._closing:
            problem = None
            try:
                with self._log.sending() as locked:
                    while locked and not self._closing and self._sender.send_next(self._log):
                        self._note(None)
            except Exception as error:
                problem = error
            self._note(problem)
            self._pause()

    def _pause(self) -> None:
        with self._changed:
            flushing, pause_s = self._flushing, retry_pause_s(self._failures, self._flushing)
            self._changed.wait_for(lambda: self._closing or self._flushing > flushing, pause_s)

    def _note(self, problem: Exception | None) -> None:
        """Update the state after an attempt to send. Progress by another process counts, too."""
        uri, root = without_passwords(self._sender.uri), self._log.root
        with self._changed:
            if problem and not self.problem:
                why = reason(problem)
                _log.warning("MLflow at %s: %s; the run continues, records are kept in %s", uri, why, root)
            elif self.problem and not problem:
                _log.info("MLflow at %s answers again", uri)
            if self._log.sent > self._sent_before:
                self._sent_before, self._progress = self._log.sent, time.monotonic()
                _unreachable.discard(self._sender.uri)
            self.problem, self._failures = problem, self._failures + 1 if problem else 0
            self._changed.notify_all()


def retry_pause_s(failures: int, flushing: bool) -> float:
    """Return the pause before the next attempt; doubles with each failure in a row, up to a limit."""
    doubled = 2.0 ** min(failures, 10)
    if flushing:
        return min(5.0, doubled / 4) if failures else 0.01
    return min(30.0, doubled)
