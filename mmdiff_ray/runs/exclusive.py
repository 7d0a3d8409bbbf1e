"""One process at a time in the folder of a run, a sweep or a cell of an experiment."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmdiff_ray.config import ConfigError


@contextmanager
def alone(folder: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a folder while its work is done; however the process ends, it lets go of it.

    patience_s: how long one that holds it already is waited for, who may be about to end. Raises ConfigError,
    naming the process, where it still does. A disk that knows no locks has none.
    """
    try:
        held = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be worked on: {error.strerror}") from None
    until = time.monotonic() + patience_s
    try:
        while not _locked(held):
            if time.monotonic() >= until:
                owner = os.pread(held, 1000, 0).decode() or "another process"
                raise ConfigError(f"{folder}: {owner} works on it; wait until that has ended, or stop it")
            time.sleep(0.2)
        with suppress(OSError):  # what it says is for people alone
            os.ftruncate(held, 0)
            os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(held)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    return True
