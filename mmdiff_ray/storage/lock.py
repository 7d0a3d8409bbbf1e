"""Locks: one process at a time in a local folder (flock), one driver at a time per run in storage (a lease).

Some object stores cannot create an object only if it is absent. So a driver writes its own lease and then
lists all leases: of two drivers that start together, at least one sees the other and gives up. It renews its
lease and removes it at the end. The next driver removes a lease that is older than `EXPIRY_S` or whose
process has ended. If that process was only asleep or cut off from storage, it ends when it misses its lease.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff_ray.config import ConfigError, UnreachableError
from mmdiff_ray.storage.filesystem import (
    PART,
    exists,
    filesystem,
    list_files,
    read_bytes,
    remove,
    write_atomic,
)
from mmdiff_ray.storage.retry import retry, with_timeout

DRIVERS = "drivers"
"""Subfolder of a run that contains its leases."""
RENEW_S = 20.0
EXPIRY_S = 120.0
"""Age after which a lease's driver counts as dead, by the clock of the storage."""
POLL_S = 2.0
ANSWER_S = 20.0
SAME_PROCESS_S = 1.0

_log = logging.getLogger(__name__)


@contextmanager
def lock_folder(folder: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder. The operating system releases it when the process ends.

    timeout_s: how long to wait for another process; then raises ConfigError with its id. Does nothing on file
    systems without locks.
    """
    try:
        file = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be locked: {error.strerror}") from None
    deadline = time.monotonic() + timeout_s
    try:
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                raise _held(str(folder), os.pread(file, 1000, 0).decode() or "another process")
            time.sleep(0.2)
        with suppress(OSError):  # used only in the message above
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return True
    return True


def _held(where: str, holder: str) -> ConfigError:
    return ConfigError(f"{where}: {holder} works on it; wait until that has ended, or stop it")


class Lease:
    """This process's lease on a run or sweep at a URI, as a context manager.

    say: prints a line for the user. On entry, raises ConfigError with the other process if another driver is
    alive, and OutageError if storage does not answer.
    """

    def __init__(self, uri: str, say: Callable[[str], None]) -> None:
        self.uri = uri
        self._say = say
        self._fs, root = filesystem(uri)
        self._folder, self._name = f"{root}/{DRIVERS}", secrets.token_hex(8)
        self._path = f"{self._folder}/{self._name}"
        self._ended = threading.Event()
        self._renewed = 0.0
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> None:
        first: dict[str, Driver] = {}
        try:
            while others := retry(self._others, f"list {self.uri}"):
                for name, driver in others.items():
                    seen = first.setdefault(name, driver)
                    if driver.is_alive or driver.renewed > seen.renewed:
                        raise _held(self.uri, driver.label)
                    if driver is seen:
                        self._say(
                            f"{driver.label} used {self.uri} {driver.age_s:.0f} s ago and may have died; "
                            f"waiting up to {EXPIRY_S - driver.age_s:.0f} s for its lease to expire"
                        )
                time.sleep(POLL_S)
        except BaseException as error:
            self._remove(self._path)
            if isinstance(error, OSError):  # permanent, not an outage
                raise ConfigError(f"{self.uri}: cannot be locked: {error}") from None
            raise
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(ANSWER_S)
        with suppress(UnreachableError):
            with_timeout(ANSWER_S, lambda: self._remove(self._path), f"{self.uri} does not answer")

    def _write(self) -> None:
        started = time.time()
        write_atomic(self._fs, self._path, json.dumps(_this_process()).encode())
        self._renewed = started

    def _remove(self, path: str) -> None:
        with suppress(OSError):  # else it expires
            remove(self._fs, path)

    def _list(self) -> dict[str, float]:
        """Return the leases: name -> time of renewal in seconds, by the clock of the storage."""
        files = list_files(self._fs, self._folder, recursive=False)
        return {
            name: info.mtime_ns / 1e9
            for name, info in files.items()
            if not name.startswith(".") and not name.endswith(PART)
        }

    def _others(self) -> "dict[str, Driver]":
        """Renew our lease and remove the leases of dead drivers; return the other drivers."""
        self._write()
        renewed, found = self._list(), {}
        now = renewed.pop(self._name)
        for name, time_s in renewed.items():
            path = f"{self._folder}/{name}"
            with suppress(FileNotFoundError):
                driver = _read_driver(read_bytes(self._fs, path), time_s, now - time_s)
                if driver.age_s > EXPIRY_S or driver.is_alive is False:
                    self._remove(path)
                else:
                    found[name] = driver
        return found

    def _keep(self) -> None:
        """Renew the lease until exit; if another driver has taken over, end this process."""
        while not self._ended.wait(RENEW_S):
            try:
                if self._is_lost():
                    self._end_process()
            except Exception as error:  # the run continues through an outage of storage
                _log.info("cannot renew the lease of %s: %s", self.uri, error)

    def _is_lost(self) -> bool:
        """Renew the lease; return whether another driver has removed it or may have taken over."""
        if not exists(self._fs, self._path):
            return not self._ended.is_set()
        was_late = time.time() - self._renewed > EXPIRY_S  # the monotonic clock stops while a machine sleeps
        self._write()
        return was_late and bool(self._list().keys() - {self._name}) and not self._ended.is_set()

    def _end_process(self) -> None:
        """End at once: this process would overwrite the other driver's files."""
        line = f"another process has taken over {self.uri} while this one could not reach it; exiting"
        thread = threading.Thread(target=self._say, args=(line,), daemon=True)
        try:
            thread.start()
            thread.join(1.0)  # `say` may block
        finally:
            os._exit(1)


@dataclass(frozen=True)
class Driver:
    """The process of a lease. renewed: time, by the clock of the storage. is_alive: None if unknown."""

    label: str
    renewed: float
    age_s: float
    is_alive: bool | None


def _read_driver(lease: bytes, renewed: float, age_s: float) -> Driver:
    label, is_alive = "another process", None
    with suppress(ValueError, KeyError, TypeError):  # an unreadable lease is valid until it expires
        facts = json.loads(lease)
        pid, begun = facts["process"]
        label = f"process {pid} on {facts['host']}"
        if facts["system"] == _this_process()["system"]:
            is_alive = _is_running(pid, begun)
    return Driver(label, renewed, age_s, is_alive)


def _is_running(pid: int, begun: float) -> bool:
    """Return whether the process runs. Compares start times, since the id may be reused."""
    import psutil  # not installed for the jobs of an experiment

    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - begun) < SAME_PROCESS_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _this_process() -> dict[str, Any]:
    """Return a dict that identifies this process among all machines.

    process: id and start time. host: for messages. system: equal for processes that can see each other.
    """
    import psutil

    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")  # containers of one host number processes separately
        system = f"{boot} {namespace} user {os.getuid()}"
    except OSError:
        system = secrets.token_hex(8)  # equal to none
    begun = psutil.Process().create_time()
    return {"process": [os.getpid(), begun], "host": socket.gethostname(), "system": system}
