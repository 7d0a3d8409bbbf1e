"""The log of one run: an append-only JSONL file that any process of the run writes, and one at a time sends.

tracking/
    log.jsonl         one record a line, oldest first; it stays after it was sent
    sent.json         the offset in log.jsonl up to which MLflow has everything
    target.json       the MLflow run that the records go to: {"uri", "run_id"}
    files/<id>/       the files of a record, in place before its line is written, removed once they are sent
    refused.jsonl     lines that can never be sent, each with the reason
    sending.lock      held with flock by the process that sends
    <digits>-*/       records of another machine, or of mmdiff_ray 0.1: absorbed when the log is opened

Lines are handed to the operating system at once and not forced to the disk: they survive the process, not a
power cut. Where the disk takes nothing, lines wait in memory and are sent from there.
"""

import contextlib
import itertools
import json
import logging
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmdiff_ray.tracking.files import append_line, lines_of, locked, read_json, write_json

UNWRITTEN_RECORDS = 10_000
"""How many records wait in memory for a disk that takes nothing; beyond that the oldest is dropped."""
KINDS = {
    "start": {"experiment", "name"},
    "params": {"values"},
    "tags": {"values"},
    "metrics": {"values", "step"},
    "datasets": {"datasets"},
    "image": {"key", "step"},
    "artifact": {"name", "folder"},
    "model": {"name", "step"},
    "status": {"status"},
}
"""The kinds of records -> what the body of one must have."""
WITH_FILES = ("image", "artifact", "model")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One thing to be recorded. time_ms: when it was recorded, in milliseconds since 1970."""

    id: str
    kind: str
    time_ms: int
    body: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A line of a log. record: None if the line cannot be read, for the reason in `problem`.

    end: the offset behind the line; None for a line that waits in memory.
    """

    line: bytes
    record: Record | None
    problem: str
    end: int | None


class Log:
    """The log in a folder. Any thread and any process may append; who sends holds `sending`.

    Nothing here raises OSError for a full disk.
    """

    def __init__(self, root: str | Path, target: dict[str, str] | None = None):
        """Open the log, which need not exist. target: the run that its records go to from now on."""
        self.root = Path(root)
        self.lost = 0
        self._file = self.root / "log.jsonl"
        self._writing = threading.Lock()
        self._unwritten: deque[bytes] = deque()
        self._warned = False
        self._sent = 0
        if target is not None and target != self.target:
            self._replace("target.json", target)
        if self.sent > (self._file.stat().st_size if self._file.exists() else 0):  # somebody removed the log
            self._sent = 0
            (self.root / "sent.json").unlink()
        for folder in sorted(self.root.glob("[0-9]*-*/")):
            self._absorb(folder)

    @property
    def target(self) -> dict[str, str]:
        """The run that the records go to; empty if that is not known."""
        return read_json(self.root / "target.json", {})

    @property
    def sent(self) -> int:
        """The offset up to which everything was sent, by this process or another."""
        self._sent = max(self._sent, read_json(self.root / "sent.json", {}).get("offset", 0))
        return self._sent

    @property
    def end(self) -> int:
        """The offset behind the last whole line."""
        return max((end for _, end in lines_of(self._file, self.sent)), default=self._sent)

    @property
    def waiting(self) -> int:
        """The number of records that have not been sent."""
        return len(self._unwritten) + sum(1 for _ in lines_of(self._file, self.sent))

    @property
    def refused(self) -> int:
        """The number of records that can never be sent."""
        return sum(1 for _ in lines_of(self.root / "refused.jsonl"))

    def has_sent(self, end: int) -> bool:
        """Return whether everything up to an offset, and all that waits in memory, was sent."""
        return not self._unwritten and self.sent >= end

    def files(self, record_id: str) -> Path:
        """Return the folder of a record's files."""
        return self.root / "files" / record_id

    def append(self, kind: str, body: dict[str, Any], record_id: str | None = None) -> None:
        """Write a record behind all others. Raises ValueError for a number that JSON does not have."""
        record = Record(record_id or str(uuid.uuid4()), kind, time.time_ns() // 1_000_000, body)
        self.extend([json.dumps(asdict(record), allow_nan=False).encode() + b"\n"])

    def extend(self, lines: Sequence[bytes]) -> bool:
        """Write lines behind all others; return whether all are on disk, else they wait in memory."""
        with self._writing:
            self._unwritten.extend(lines)
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                while self._unwritten:
                    append_line(self._file, self._unwritten[0])
                    self._unwritten.popleft()
            except OSError as error:
                self._warn(error, f"up to {UNWRITTEN_RECORDS:,} records wait in memory")
            while len(self._unwritten) > UNWRITTEN_RECORDS:
                self._unwritten.popleft()
                self.lost += 1
            return not self._unwritten

    def lose(self, error: OSError) -> None:
        """Count a record that is dropped because the disk does not take its files."""
        self.lost += 1
        self._warn(error, "pictures and files are dropped")

    def read(self, limit: int) -> list[Entry]:
        """Return the oldest records that were not sent, at most `limit`; those in memory come last."""
        lines: list[tuple[bytes, int | None]] = [*itertools.islice(lines_of(self._file, self.sent), limit)]
        with self._writing:
            lines += [(line, None) for line in itertools.islice(self._unwritten, limit - len(lines))]
        return [_entry(line, end) for line, end in lines]

    def acknowledge(self, entries: Sequence[Entry]) -> None:
        """Note that the oldest records were sent, or set aside, and remove their files."""
        self._sent = max([self._sent, *(entry.end for entry in entries if entry.end is not None)])
        self._replace("sent.json", {"offset": self._sent})
        for entry in entries:
            with self._writing:
                if entry.end is None and self._unwritten and self._unwritten[0] is entry.line:
                    self._unwritten.popleft()
            if entry.record is not None:
                shutil.rmtree(self.files(entry.record.id), ignore_errors=True)

    def set_aside(self, what: Record | bytes, reason: str) -> None:
        """Keep a record that can never be sent, with the reason."""
        known = {"line": what.decode(errors="replace")} if isinstance(what, bytes) else asdict(what)
        _log.warning("a record cannot be sent, it is kept in %s/refused.jsonl: %s", self.root, reason)
        with contextlib.suppress(OSError):
            append_line(self.root / "refused.jsonl", json.dumps({"reason": reason, **known}).encode() + b"\n")

    @contextlib.contextmanager
    def sending(self) -> Iterator[bool]:
        """Yield whether this process may send, for the block: no other does."""
        with locked(self.root / "sending.lock") as free:
            yield free

    def pack(self, place: Path) -> bool:
        """Move all that waits into a folder, for the log of another machine to absorb.

        Returns False where another thread or process is sending.
        """
        with self.sending() as ours:
            if not ours:
                return False
            lines = list(lines_of(self._file, self.sent))
            if lines:
                place.mkdir(parents=True)
                shutil.copyfile(self.root / "target.json", place / "target.json")
                append_line(place / "00000.jsonl", b"".join(line for line, _ in lines))
                for entry in (_entry(*line) for line in lines):
                    if entry.record is not None and self.files(entry.record.id).is_dir():
                        (place / "files").mkdir(exist_ok=True)
                        self.files(entry.record.id).rename(place / "files" / entry.record.id)
                self.acknowledge([_entry(*lines[-1])])
            return True

    def begin_again(self) -> list[bytes]:
        """Set all lines aside in `log-<run id>.jsonl`; return those that a new MLflow run should get, too.

        These are the metrics, and pictures and files that were not sent. The log is empty then.
        """
        entries = [_entry(*line) for line in lines_of(self._file)]
        if entries:
            self._file.rename(self.root / f"log-{self.target.get('run_id', 'before')}.jsonl")
        for name in ("sent.json", "target.json"):
            (self.root / name).unlink(missing_ok=True)
        self._sent = 0
        return [
            entry.line
            for entry in entries
            if entry.record and (entry.record.kind == "metrics" or self.files(entry.record.id).is_dir())
        ]

    def remove(self) -> None:
        """Remove the log."""
        shutil.rmtree(self.root / "files", ignore_errors=True)
        for name in ("log.jsonl", "sent.json", "target.json", "sending.lock"):
            (self.root / name).unlink(missing_ok=True)

    def _absorb(self, folder: Path) -> None:
        """Take over the records in a folder that `pack` made on another machine, or mmdiff_ray 0.1 here."""
        with locked(folder / "lock") as free:
            if not free:  # its process still sends them
                return
            segment, offset = read_json(folder / "sent.json", [0, 0])
            lines = [
                line
                for file in sorted(folder.glob("[0-9]*.jsonl"))
                if int(file.stem) >= segment
                for line, _ in lines_of(file, offset if int(file.stem) == segment else 0)
            ]
            for files in folder.glob("files/*/"):
                if not self.files(files.name).exists():
                    self.files(files.name).parent.mkdir(parents=True, exist_ok=True)
                    files.rename(self.files(files.name))
            target = read_json(folder / "target.json", {})
            if target and not self.target:
                self._replace("target.json", target)
            if self.extend(lines):
                shutil.rmtree(folder, ignore_errors=True)

    def _replace(self, name: str, content: Any) -> None:
        try:
            write_json(self.root / name, content)
        except OSError as error:
            self._warn(error, "records may be sent a second time, which MLflow ignores")

    def _warn(self, error: OSError, consequence: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("cannot write to %s: %s; %s", self.root, error.strerror or error, consequence)


def waiting_in(root: str | Path) -> int:
    """Return how many records wait in a folder, which need not exist."""
    return Log(root).waiting if Path(root).is_dir() else 0


def _entry(line: bytes, end: int | None) -> Entry:
    """Return a line with its record, if it holds one that can be sent."""
    try:
        record = Record(**json.loads(line))
        if missing := KINDS[record.kind] - record.body.keys():
            raise ValueError(f"{record.kind} without {', '.join(sorted(missing))}")
    except KeyError as error:
        return Entry(line, None, f"unknown kind of record {error}", end)
    except (ValueError, TypeError, AttributeError) as error:
        return Entry(line, None, f"unreadable line: {error}", end)
    return Entry(line, record, "", end)
