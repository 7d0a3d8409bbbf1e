"""Retries and timeouts for storage, so that a run survives a short outage."""

import errno
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mmdiff_ray.config import OutageError, UnreachableError

OUTAGE_S = 180.0
"""How long to retry while storage does not answer."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
PERMANENT = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
PERMANENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_log = logging.getLogger(__name__)
_warned: set[str] = set()

T = TypeVar("T")


def retry(
    action: Callable[[], T],
    what: str,
    cancelled: threading.Event | None = None,
    timeout_s: float | None = None,
) -> T:
    """Call an action; if it raises an OSError, retry it with growing pauses. Returns its result.

    what: the action, for messages, as in "read s3://...". cancelled: set it to end the retries early.
    timeout_s: `OUTAGE_S` by default; then raises OutageError. A permanent OSError or any other exception is
    raised at once.
    """
    timeout_s = OUTAGE_S if timeout_s is None else timeout_s
    failed_at, pause = 0.0, FIRST_PAUSE_S
    while True:
        try:
            result = action()
        except (OSError, UnreachableError) as error:
            if isinstance(error, PERMANENT) or getattr(error, "errno", None) in PERMANENT_ERRNOS:
                raise
            failed_at = failed_at or time.monotonic()
            if what not in _warned:  # once for all threads
                _warned.add(what)
                _log.warning("cannot %s, retrying for %g s: %s", what, timeout_s, error)
            is_over = time.monotonic() - failed_at >= timeout_s
            if is_over or (cancelled or threading.Event()).wait(pause):
                raise OutageError(f"cannot {what}, retried for {timeout_s:g} s: {error}") from None
            pause = min(2 * pause, LONGEST_PAUSE_S)
        else:
            if failed_at:
                _warned.clear()
            return result


def with_timeout(seconds: float, function: Callable[[], T], message: str) -> T:
    """Call a function in a thread; raise UnreachableError if it takes longer than `seconds`."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # raised by the function itself
            raise
        raise UnreachableError(f"{message} within {seconds:g} s") from None
