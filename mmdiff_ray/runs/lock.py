"""One driver at a time of a run or a sweep: on this machine by a lock, in storage by a lease.

Storage has no operation that only one of two can win. A driver leaves a note there, renews it, and removes it
at its end; whoever finds another's note that is still renewed goes away. A note whose driver is seen to be
gone, or that is older than `QUIET_S`, is removed: that driver has died; or it is asleep or cut off from
storage, finds its note missing when it is back, and ends.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmdiff_ray.config import ConfigError, UnreachableError
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs.exclusive import alone
from mmdiff_ray.runs.processes import find, known
from mmdiff_ray.storage.filesystem import (
    PART,
    exists,
    filesystem,
    is_uri,
    read_bytes,
    remove,
    times_in,
    within,
    write_bytes_atomic,
)
from mmdiff_ray.storage.retry import patiently

RENEW_S = 20.0
QUIET_S = 120.0
"""How old a lease is, by the clock of the storage, whose driver is taken to be gone."""
LOOK_S = 2.0
ANSWER_S = 20.0

_log = logging.getLogger(__name__)

Say = Callable[[str], None]


@contextmanager
def only_driver(folder: Path, say: Say, new: bool = False) -> Iterator[None]:
    """Hold a run or a sweep, by its folder on this machine, while it is worked on.

    say: told what is waited for, and what is lost. new: whether it has just begun, so that no other can have
    it. Raises ConfigError, naming the process, where another one works on it, here or anywhere; OutageError
    where storage does not answer.
    """
    with alone(folder):
        where = runs.address(folder)
        if not is_uri(where):
            yield
            return
        lease = Lease(where, say)
        lease.take(new)
        try:
            yield
        finally:
            lease.give_back()


class Lease:
    """What says in storage who drives the run or the sweep at a URI."""

    def __init__(self, uri: str, say: Say) -> None:
        self.uri, self._say = uri, say
        self._fs, self._root = filesystem(uri)
        self._folder, self._name = f"{self._root}/{runs.DRIVERS}", secrets.token_hex(8)
        self._note = f"{self._folder}/{self._name}"
        self._ended = threading.Event()
        self._renewed, self._is_written = time.time(), False
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def take(self, new: bool = False) -> None:
        """Be the driver, as soon as no other one is left that may be alive.

        new: as of `only_driver`. Raises ConfigError where another one is alive, or begins at the same moment;
        OutageError.
        """
        if not new:
            try:
                self._wait_for_others()
                self._renewed = time.time()
                patiently(self._write, f"write to {self.uri}")
                if alive := self._others():
                    raise self._refusal(*alive.values())
            except BaseException as error:
                self._remove(self._note)
                if isinstance(error, OSError):  # of the kind that time does not mend
                    raise ConfigError(f"{self.uri}: cannot be worked on: {error}") from None
                raise
        self._thread.start()

    def give_back(self) -> None:
        """Be no driver any more."""
        self._ended.set()
        self._thread.join(ANSWER_S)
        with suppress(UnreachableError):
            within(ANSWER_S, lambda: self._remove(self._note), f"{self.uri} does not answer")

    def _wait_for_others(self) -> None:
        first: dict[str, Note] = {}
        while others := self._others():
            for name, note in others.items():
                seen = first.setdefault(name, note)
                if note.is_here or note.renewed > seen.renewed:
                    raise self._refusal(note)
                if note is seen:
                    self._say(
                        f"{note.who} drove {self.uri} {note.age_s:.0f} s ago and may be gone; waiting to see "
                        f"whether it is, {QUIET_S - note.age_s:.0f} s at most"
                    )
            time.sleep(LOOK_S)

    def _refusal(self, *notes: "Note") -> ConfigError:
        who = " and ".join(note.who for note in notes)
        return ConfigError(f"{self.uri}: {who} works on it; wait until that has ended, or stop it")

    def _others(self) -> "dict[str, Note]":
        """Return the notes of other drivers that may be alive; remove those of drivers that are not."""
        return patiently(self._look, f"look into {self.uri}")

    def _look(self) -> "dict[str, Note]":
        probe = f"{self._folder}/.{self._name}"
        write_bytes_atomic(self._fs, probe, b"what time is it there?")
        times = times_in(self._fs, self._folder)
        now, found = times[os.path.basename(probe)], {}
        self._remove(probe)
        for name in self._notes(times) - {self._name}:
            path = f"{self._folder}/{name}"
            with suppress(FileNotFoundError):
                note = Note(read_bytes(self._fs, path), times[name], now - times[name])
                if note.is_gone:
                    self._remove(path)
                else:
                    found[name] = note
        return found

    def _notes(self, names: Iterable[str] | None = None) -> set[str]:
        """Return which of the names are those of notes; by default of all that are there."""
        there = times_in(self._fs, self._folder) if names is None else names
        return {name for name in there if not name.startswith(".") and not name.endswith(PART)}

    def _write(self) -> None:
        write_bytes_atomic(self._fs, self._note, json.dumps(me()).encode())
        self._is_written = True

    def _remove(self, path: str) -> None:
        with suppress(OSError):  # it grows old
            remove(self._fs, path)

    def _keep(self) -> None:
        """Renew the note until the end; without it, or with another's after a long time, end this process."""
        pause = 0.0
        while not self._ended.wait(pause):
            try:
                pause = RENEW_S if self._is_written or self._has_begun() else LOOK_S
                if pause == RENEW_S and self._is_lost():
                    self._end_process()
            except Exception as error:  # storage that is away ends no run
                _log.info("the lease of %s is not renewed: %s", self.uri, error)

    def _has_begun(self) -> bool:
        """Return whether what is driven is known in storage: until then, its name may be given back."""
        return any(exists(self._fs, f"{self._root}/{marker}") for marker in (runs.RUN, runs.SWEEP))

    def _is_lost(self) -> bool:
        """Renew the note; return whether another driver has removed it, or may not have seen it in time."""
        begun = time.time()
        was_away = begun - self._renewed > QUIET_S
        if self._is_written and not exists(self._fs, self._note):
            return not self._ended.is_set()
        if self._ended.is_set():
            return False
        self._write()
        if was_away and self._notes() - {self._name}:
            return not self._ended.is_set()
        self._renewed = begun
        return False

    def _end_process(self) -> None:
        """End at once: whatever this process still wrote would be written over what the other one makes."""
        line = f"another process has taken {self.uri} over, which this one did not reach; this one ends"
        saying = threading.Thread(target=self._say, args=(line,), daemon=True)
        try:
            saying.start()
            saying.join(1.0)
        finally:
            os._exit(1)


class Note:
    """What a driver has left in storage.

    said: by itself, as of `me`; what cannot be read says nothing. renewed, age_s: in seconds.
    """

    def __init__(self, said: bytes, renewed: float, age_s: float) -> None:
        self.renewed, self.age_s = renewed, age_s
        self.who, self._process, self._system = "another process", (0, 0.0), ""
        with suppress(ValueError, KeyError, TypeError):
            facts = json.loads(said)
            number, begun = facts["process"]
            self.who = f"process {number} on {facts['host']}"
            self._process, self._system = (number, begun), facts["system"]

    @property
    def is_here(self) -> bool:
        """Return whether its process can be looked at from here, and runs."""
        return self._is_near and find(self._process) is not None

    @property
    def is_gone(self) -> bool:
        """Return whether its process has ended, as far as can be known."""
        return self.age_s > QUIET_S or (self._is_near and not self.is_here)

    @property
    def _is_near(self) -> bool:
        return self._system == me()["system"]


def me() -> dict[str, object]:
    """Return what tells this process from all others, on all machines.

    process: its number and when it began. host: the machine's name, for people. system: the same for all
    processes that can be looked at from here, and for no others.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        numbers = os.readlink("/proc/self/ns/pid")  # containers of one host count processes apart
        system = f"{boot} {numbers} user {os.getuid()}"
    except OSError:
        system = secrets.token_hex(8)  # is nobody else's
    return {"process": known(os.getpid()), "host": socket.gethostname(), "system": system}
