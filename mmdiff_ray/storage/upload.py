"""Background uploads, with one lane per folder. A failed upload is retried until it succeeds."""

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from mmdiff_ray.storage.retry import FIRST_PAUSE_S, LONGEST_PAUSE_S

STALL_S = 30.0
"""How long `flush` waits without progress."""
STALL_AGAIN_S = 8.0
"""The same if uploads have been failing for longer than that: enough for one more attempt."""
ONE_OUTAGE_S = 60.0
"""Failures within this time count as one outage, with one warning."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Upload:
    """An upload in a queue. name: for messages. action: may be called several times."""

    name: str
    action: Callable[[], None]
    done: bool = False


class UploadQueue:
    """Lanes of uploads. One thread per lane uploads in order, so a failing upload delays only its lane.

    uri: the storage, for messages. warn: called with each warning.
    """

    def __init__(self, uri: str, warn: Callable[[str], None] = _log.warning) -> None:
        self.uri = uri
        self.warn = warn
        self._lanes: dict[str, list[Upload]] = {}
        self._failing: dict[str, float] = {}  # lane -> time of the first failure since it was empty
        self._changed = threading.Condition()
        self._moved = time.monotonic()

    def add(self, name: str, action: Callable[[], None], lane: str) -> Upload:
        """Queue an upload and return it."""
        upload = Upload(name, action)
        with self._changed:
            if not self.waiting:
                self.progress()
            self._lanes.setdefault(lane, []).append(upload)
            if len(self._lanes[lane]) == 1:
                threading.Thread(target=self._work, args=(lane,), name="upload", daemon=True).start()
        return upload

    def progress(self) -> None:
        """Record that an upload made progress; called by actions."""
        self._moved = time.monotonic()

    @property
    def waiting(self) -> list[str]:
        """The names of unfinished uploads, without duplicates."""
        with self._changed:
            return list(dict.fromkeys(upload.name for lane in self._lanes.values() for upload in lane))

    def flush(self, stall_s: float | None = None, uploads: Collection[Upload] | None = None) -> list[str]:
        """Wait until uploads are done; give up after `stall_s` without progress.

        uploads: all by default. stall_s: `STALL_S` by default. Returns the names of unfinished uploads.
        """
        stall_s, started = STALL_S if stall_s is None else stall_s, time.monotonic()
        if self._failing and started - self._moved > stall_s:
            stall_s = min(stall_s, STALL_AGAIN_S)
        with self._changed:
            self._changed.notify_all()  # retry at once
            while self.waiting if uploads is None else not all(upload.done for upload in uploads):
                left_s = max(started, self._moved) + stall_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
        return self.waiting

    def _work(self, lane: str) -> None:
        """Upload the items of a lane until it is empty."""
        pause, upload = FIRST_PAUSE_S, self._lanes[lane][0]
        while True:
            try:
                upload.action()
            except Exception as error:  # any error: storage may recover
                self._failed(lane, upload, str(error) or type(error).__name__)
                with self._changed:
                    self._changed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            with self._changed:
                upload.done, pause = True, FIRST_PAUSE_S
                self._lanes[lane].remove(upload)
                self.progress()
                self._changed.notify_all()
                if not self._lanes[lane]:
                    self._failing.pop(lane, None)
                    return
                upload = self._lanes[lane][0]

    def _failed(self, lane: str, upload: Upload, error: str) -> None:
        """Warn about a failure, but once per outage and once per lane until that is empty."""
        now = time.monotonic()
        with self._changed:
            is_known = lane in self._failing or any(
                now - failed_at < ONE_OUTAGE_S for failed_at in self._failing.values()
            )
            self._failing.setdefault(lane, now)
        if is_known:
            return
        message = f"cannot upload {upload.name} to {self.uri}, retrying: {error}"
        try:
            self.warn(message)
        except Exception:  # e.g. the display has ended
            _log.warning(message)
