"""Retry and time out actions on storage: an outage of a minute costs a minute, not a run."""

import errno
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mmdiff_ray.config import OutageError, UnreachableError

OUTAGE_S = 180.0
"""How long an action on storage that does not answer is retried."""
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
    """Return what an action returns; while it fails with an OSError, retry it with growing pauses.

    what: describes the action for the user, as in "read s3://...". cancelled: ends the retries early.
    timeout_s: `OUTAGE_S` by default. Raises OutageError after that; a permanent OSError, and any other
    exception, at once.
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
            if what not in _warned:  # once, however many threads meet the outage
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
    """Return what a function returns or raise what it raises; UnreachableError if that takes too long."""
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
        if future.done():  # the function's own
            raise
        raise UnreachableError(f"{message} within {seconds:g} s") from None
