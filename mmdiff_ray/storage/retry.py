"""Try again while storage does not answer: an outage of a minute costs a minute, not a run."""

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from mmdiff_ray.config import OutageError, UnreachableError
from mmdiff_ray.storage.upload import FIRST_PAUSE_S, LONGEST_PAUSE_S

OUTAGE_S = 180.0
"""For how many seconds storage that does not answer is tried again."""
LASTING = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
LASTING_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_log = logging.getLogger(__name__)
_told: set[str] = set()

T = TypeVar("T")


def patiently(
    action: Callable[[], T],
    doing: str,
    ended: threading.Event | None = None,
    longest_s: float | None = None,
) -> T:
    """Return what an action on storage returns; where storage does not answer, try again with growing pauses.

    doing: what the action does and where, as in "read s3://...". ended: set where nobody waits any more.
    longest_s: how long to try, `OUTAGE_S` by default. Raises OutageError after that, and at once what time
    does not mend: an OSError of `LASTING`, or what is no OSError.
    """
    patience_s = OUTAGE_S if longest_s is None else longest_s
    begun, pause = 0.0, FIRST_PAUSE_S
    while True:
        try:
            result = action()
        except (OSError, UnreachableError) as error:
            if isinstance(error, LASTING) or getattr(error, "errno", None) in LASTING_NUMBERS:
                raise
            begun = begun or time.monotonic()
            _tell(f"cannot {doing}, which is tried again for {patience_s:g} s", error)
            over = time.monotonic() - begun >= patience_s
            if over or (ended or threading.Event()).wait(pause):
                raise OutageError(f"cannot {doing}, tried for {patience_s:g} s: {error}") from None
            pause = min(2 * pause, LONGEST_PAUSE_S)
        else:
            if begun:
                _told.clear()
            return result


def _tell(words: str, error: Exception) -> None:
    """Warn of an outage once, however many threads meet it."""
    if words not in _told:
        _told.add(words)
        _log.warning("%s: %s", words, error)
