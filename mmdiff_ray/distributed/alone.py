"""One process at a time in the folder of a run, a sweep or a cell of an experiment."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmdiff_ray.config import ConfigError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder while its work is done; however the process ends, it lets go of it.

    Raises ConfigError, naming the process, where another holds it. A disk that knows no locks has none.
    """
    held = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(held, 1000).decode() or "another process"
            raise ConfigError(
                f"{folder}: {owner} works on it; wait until that has ended, or stop it"
            ) from None
        except OSError:
            pass
        with suppress(OSError):  # what it says is for people alone
            os.ftruncate(held, 0)
            os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(held)
