"""An ordered list of records on disk that survives a killed process and has one owner at a time.

root/<time>-<pid>-<hex>/        one spool: what one process recorded
    lock                        held with flock while the owner lives; a spool with a free lock may be adopted
    target.json                 where the records go
    00000.jsonl 00001.jsonl     the records, one a line; a last line without its end was never recorded
    sent.json                   [segment, offset]: everything before it has arrived
    files/<record id>/          the files of a record, in place before its line is written
root/refused.jsonl              records that the receiver will never take, with its reason

Lines are handed to the operating system at once, not forced to the disk: they survive the process, not a
power cut.
"""

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SEGMENT_BYTES = 1_000_000
_held: set[Path] = set()
"""The spools that this process owns."""


@dataclass(frozen=True)
class Record:
    """One thing to be recorded. time_ms: when it was said, in milliseconds since 1970."""

    id: str
    kind: str
    time_ms: int
    body: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A line of a spool: its record (None if the line cannot be read) and the place after it."""

    record: Record | None
    end: tuple[int, int]


class Spool:
    """A spool that this process owns; made by `create` or `adopt`."""

    def __init__(self, folder: Path, lock: int):
        self.folder = folder
        self._lock = lock
        _held.add(folder.resolve())
        self._writing = threading.Lock()
        self._file: Any = None
        self._segment = 0
        self._sent = _read_sent(folder)
        self._waiting = sum(1 for _ in _entries(self.folder, self._sent))

    @classmethod
    def create(cls, root: str | Path, target: dict[str, str]) -> "Spool":
        """Return a new, empty spool under the root, owned by this process."""
        name = f"{time.time_ns():020d}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        hidden = Path(root) / f".{name}"  # no other process can see it until it is locked
        (hidden / "files").mkdir(parents=True)
        lock = os.open(hidden / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(os.open(hidden / "target.json", os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            json.dump(target, file)
        return cls(hidden.rename(Path(root) / name), lock)

    @classmethod
    def adopt(cls, folder: Path) -> "Spool | None":
        """Return the spool of a process that has ended, now owned by this one; None while its owner lives."""
        try:
            lock = os.open(folder / "lock", os.O_RDWR)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            os.close(lock)
            return None
        return cls(folder, lock)

    @property
    def target(self) -> dict[str, str]:
        """Where the records go, as `create` was told."""
        return json.loads((self.folder / "target.json").read_text())

    def __len__(self) -> int:
        return self._waiting

    def files(self, record_id: str) -> Path:
        """Return the folder of a record's files."""
        return self.folder / "files" / record_id

    def append(self, kind: str, body: dict[str, Any], record_id: str | None = None) -> None:
        """Write a record behind all others. Any thread may call it."""
        record = Record(record_id or str(uuid.uuid4()), kind, time.time_ns() // 1_000_000, body)
        line = json.dumps(asdict(record), allow_nan=False) + "\n"
        with self._writing:
            file = self._open_segment()
            file.write(line.encode())
            file.flush()
            self._waiting += 1

    def read(self, limit: int) -> list[Entry]:
        """Return the oldest lines that have not arrived yet, at most `limit`."""
        entries = []
        for entry in _entries(self.folder, self._sent):
            entries.append(entry)
            if len(entries) == limit:
                break
        return entries

    def acknowledge(self, entries: Sequence[Entry]) -> None:
        """Note that the oldest lines have arrived (or never will), and drop their files and full segments."""
        self._sent = entries[-1].end
        hidden = self.folder / ".sent.json"
        hidden.write_text(json.dumps(self._sent))
        hidden.replace(self.folder / "sent.json")
        with self._writing:
            self._waiting -= len(entries)
        for entry in entries:
            if entry.record is not None:
                shutil.rmtree(self.files(entry.record.id), ignore_errors=True)
        for segment in range(self._sent[0] - 1, -1, -1):
            try:
                _segment(self.folder, segment).unlink()
            except FileNotFoundError:
                break

    def refuse(self, record: Record, reason: str) -> None:
        """Keep a record that the receiver will never take, with the reason, outside the queue."""
        with open(self.folder.parent / "refused.jsonl", "a") as file:
            file.write(json.dumps({"reason": reason, **asdict(record)}) + "\n")

    def close(self, keep: bool = True) -> None:
        """Give the spool up: with records it waits to be adopted; an empty or unwanted one is removed."""
        with self._writing:
            _held.discard(self.folder.resolve())
            if self._file is not None:
                self._file.close()
            if not (self._waiting and keep):
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)

    def _open_segment(self) -> Any:
        if self._file is not None and self._file.tell() >= SEGMENT_BYTES:
            self._file.close()
            self._file, self._segment = None, self._segment + 1
        if self._file is None:
            self._file = open(_segment(self.folder, self._segment), "ab")  # noqa: SIM115 (kept open between records)
        return self._file


def waiting(root: str | Path) -> list[Path]:
    """Return the folders of the spools under a root, oldest first."""
    return sorted(path.parent for path in Path(root).glob("[0-9]*/lock"))


def is_held(folder: Path) -> bool:
    """Return whether this process owns a spool."""
    return folder.resolve() in _held


def left_in(root: str | Path) -> int:
    """Return how many records wait under a root, without those that another living process sends itself."""
    left = 0
    for folder in waiting(root):
        spool = Spool.adopt(folder)
        if spool is not None:
            left += len(spool)
            spool.close()
        elif is_held(folder):  # by a thread that hangs in a request
            left += sum(1 for _ in _entries(folder, _read_sent(folder)))
    return left


def _entries(folder: Path, sent: tuple[int, int]) -> Iterator[Entry]:
    """Yield the lines of a spool behind a place."""
    segment, offset = sent
    while _segment(folder, segment).exists():
        full = _segment(folder, segment + 1).exists()  # asked before reading: lines may come while we read
        with open(_segment(folder, segment), "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield Entry(_parsed(line), (segment, offset))
        if not full:
            return
        segment, offset = segment + 1, 0


def _segment(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.jsonl"


def _parsed(line: bytes) -> Record | None:
    with contextlib.suppress(ValueError, TypeError):
        return Record(**json.loads(line))
    return None


def _read_sent(folder: Path) -> tuple[int, int]:
    try:
        segment, offset = json.loads((folder / "sent.json").read_text())
    except (
        FileNotFoundError,
        ValueError,
    ):  # nothing sent yet, or torn by a power cut: what is there is sent again
        return min((int(path.stem) for path in folder.glob("[0-9]*.jsonl")), default=0), 0
    return segment, offset
