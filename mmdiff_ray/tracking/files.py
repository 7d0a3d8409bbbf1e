"""Files that several processes append to, replace and lock, on disks that can be full."""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append_line(path: Path, data: bytes) -> None:
    """Append whole lines to a file, or nothing: a torn last line of a killed process is ended first."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock file for the block, if no other process or thread holds it; yield whether it is held."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError:  # a full disk has no place for a lock; to send twice does no harm
        yield True
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
    finally:
        os.close(file)


def lines_of(file: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield the whole lines of a file from an offset on, each with the offset behind it."""
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        return
    with stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield line, offset


def read_json(file: Path, otherwise: Any) -> Any:
    """Return what a small JSON file holds; `otherwise` if it is missing, or torn by a power cut."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return otherwise


def write_json(file: Path, content: Any) -> None:
    """Write a small JSON file, as a whole or not at all. Raises OSError."""
    hidden = file.with_name(f".{file.name}-{uuid.uuid4().hex[:6]}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(hidden, os.O_CREAT | os.O_WRONLY, 0o600), "w") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        hidden.replace(file)
    except OSError:
        hidden.unlink(missing_ok=True)
        raise
