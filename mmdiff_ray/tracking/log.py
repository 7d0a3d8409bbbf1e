"""The log of one run: an append-only JSONL file. All processes of the run append; one at a time sends.

tracking/
    log.jsonl         one record per line, oldest first; the file stays after sending
    sent.json         the offset in log.jsonl up to which MLflow has every record
    target.json       the MLflow run of the records: {"uri", "run_id"}
    files/<id>/       the files of a record, written before its line, removed after sending
    refused.jsonl     records that MLflow rejects for good, each with the reason
    sending.lock      flock of the process that sends
    <digits>-*/       records of another machine or of mmdiff_ray 0.1, merged when the log is opened

Lines are written without fsync: they survive the process, not a power cut. If the disk is full, lines stay
in memory and are sent from there.
"""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY_RECORDS = 10_000
"""Limit of records in memory while the disk is full; beyond it, the oldest is dropped."""
KINDS = ("start", "params", "tags", "metrics", "datasets", "image", "artifact", "model", "status")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A line of the log. end: offset after it; 0 if it is in memory. An invalid line has a problem, no id."""

    line: bytes
    end: int
    id: str = ""
    kind: str = ""
    time_ms: int = 0
    body: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


class Log:
    """The log in a folder. Any thread or process may append. A full disk raises no error."""

    def __init__(self, root: str | Path, target: dict[str, str] | None = None):
        """Open the log, which need not exist. target: the MLflow run of later records."""
        self.root = Path(root)
        self.dropped = 0
        self._file = self.root / "log.jsonl"
        self._writing = threading.Lock()
        self._memory: deque[bytes] = deque()
        self._warned = False
        self._sent = 0
        if target not in (None, self.target):
            self._write_json("target.json", target)
        if self.sent > (self._file.stat().st_size if self._file.exists() else 0):  # a user removed the log
            self._sent = 0
            (self.root / "sent.json").unlink()
        for folder in sorted(self.root.glob("[0-9]*-*/")):
            self._merge(folder)

    @property
    def target(self) -> dict[str, str]:
        """The MLflow run of the records; empty if unknown."""
        return _read_json(self.root / "target.json", {})

    @property
    def sent(self) -> int:
        """The offset up to which all records are sent, by any process."""
        self._sent = max(self._sent, _read_json(self.root / "sent.json", {}).get("offset", 0))
        return self._sent

    @property
    def all_sent(self) -> bool:
        """Whether no record is unsent. Reads at most one line, unlike `waiting`."""
        return not self._memory and next(_lines(self._file, self.sent), None) is None

    @property
    def waiting(self) -> int:
        """The number of unsent records."""
        return len(self._memory) + sum(1 for _ in _lines(self._file, self.sent))

    @property
    def refused(self) -> int:
        """The number of records that MLflow rejected for good."""
        return sum(1 for _ in _lines(self.root / "refused.jsonl"))

    def files(self, record_id: str) -> Path:
        """Return the folder of a record's files."""
        return self.root / "files" / record_id

    def append(self, kind: str, body: dict[str, Any], write: Callable[[Path], Any] | None = None) -> None:
        """Append a record. write: writes its files to a folder; a full disk drops the record."""
        record_id = str(uuid.uuid4())
        record = {"id": record_id, "kind": kind, "time_ms": time.time_ns() // 1_000_000, "body": body}
        if write is not None:
            files = self.files(record_id)
            try:
                files.mkdir(parents=True)
                write(files)
            except FileNotFoundError:  # the source is missing
                raise
            except OSError as error:
                shutil.rmtree(files, ignore_errors=True)
                self.dropped += 1
                return self._warn(error, "images and files are dropped")
        self.extend([json.dumps(record, allow_nan=False).encode() + b"\n"])

    def extend(self, lines: Sequence[bytes]) -> bool:
        """Append lines; return whether all are on disk. If the disk is full, the rest stays in memory."""
        with self._writing:
            self._memory.extend(lines)
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                while self._memory:
                    _append(self._file, self._memory[0])
                    self._memory.popleft()
            except OSError as error:
                self._warn(error, f"up to {MEMORY_RECORDS:,} records stay in memory")
            while len(self._memory) > MEMORY_RECORDS:
                self._memory.popleft()
                self.dropped += 1
            return not self._memory

    def read(self, limit: int) -> list[Record]:
        """Return the oldest unsent records, at most `limit`; those in memory come last."""
        lines = list(itertools.islice(_lines(self._file, self.sent), limit))
        with self._writing:
            lines += [(line, 0) for line in itertools.islice(self._memory, limit - len(lines))]
        return [_parse(*line) for line in lines]

    def mark_sent(self, records: Sequence[Record]) -> None:
        """Mark the oldest records as sent or refused and remove their files."""
        self._sent = max(self._sent, *(record.end for record in records))
        self._write_json("sent.json", {"offset": self._sent})
        for record in records:
            with self._writing:
                if self._memory and self._memory[0] is record.line:
                    self._memory.popleft()
            if record.id:
                shutil.rmtree(self.files(record.id), ignore_errors=True)

    def refuse(self, record: Record, reason: str) -> None:
        """Write a record that MLflow rejected for good to `refused.jsonl`, with the reason."""
        line = record.line.decode(errors="replace")
        known = {**json.loads(line), "body": record.body} if record.id else {"line": line}
        _log.warning("MLflow rejected a record, see %s/refused.jsonl: %s", self.root, reason)
        with contextlib.suppress(OSError):
            _append(self.root / "refused.jsonl", json.dumps({"reason": reason, **known}).encode() + b"\n")

    def sending(self) -> contextlib.AbstractContextManager[bool]:
        """Hold the sender's lock for the block; yield False if another process or thread holds it."""
        return _locked(self.root / "sending.lock")

    def move_unsent(self, folder: Path) -> bool:
        """Move unsent records to a folder for another machine's log; False if another process is sending."""
        with self.sending() as locked:
            if locked and (records := [_parse(*line) for line in _lines(self._file, self.sent)]):
                folder.mkdir(parents=True)
                shutil.copyfile(self.root / "target.json", folder / "target.json")
                _append(folder / "00000.jsonl", b"".join(record.line for record in records))
                _move([self.files(record.id) for record in records if record.id], folder / "files")
                self.mark_sent(records)
            return locked

    def rotate(self) -> list[bytes]:
        """Rename the log to `log-<run id>.jsonl`; return its metrics and unsent files for a new run."""
        records = [_parse(*line) for line in _lines(self._file)]
        if records:
            self._file.rename(self.root / f"log-{self.target.get('run_id', 'before')}.jsonl")
        self.remove(files=False)
        unsent = [one for one in records if one.id and (one.kind == "metrics" or self.files(one.id).is_dir())]
        return [record.line for record in unsent]

    def remove(self, files: bool = True) -> None:
        """Delete the log."""
        self._sent = 0
        for name in ("log.jsonl", "sent.json", "target.json", "sending.lock"):
            (self.root / name).unlink(missing_ok=True)
        if files:
            shutil.rmtree(self.root / "files", ignore_errors=True)

    def _merge(self, folder: Path) -> None:
        """Append the records of a folder that `move_unsent` or mmdiff_ray 0.1 wrote, and delete it."""
        with _locked(folder / "lock") as locked:
            if not locked:  # a running process of 0.1 sends them
                return
            segment, offset = _read_json(folder / "sent.json", [0, 0])
            lines = [
                line
                for file in sorted(folder.glob("[0-9]*.jsonl"))
                if int(file.stem) >= segment
                for line, _ in _lines(file, offset if int(file.stem) == segment else 0)
            ]
            _move(folder.glob("files/*/"), self.root / "files")
            if not self.target and (target := _read_json(folder / "target.json", {})):
                self._write_json("target.json", target)
            if self.extend(lines):
                shutil.rmtree(folder, ignore_errors=True)

    def _write_json(self, name: str, content: Any) -> None:
        """Replace a small JSON file atomically."""
        temporary = self.root / f".{name}-{uuid.uuid4().hex[:6]}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with temporary.open("w") as stream:
                json.dump(content, stream)
                stream.flush()
                os.fsync(stream.fileno())  # after a power cut, an empty file would lose the offset or the run
            temporary.replace(self.root / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self._warn(error, "records may be sent twice, which MLflow ignores")

    def _warn(self, error: OSError, consequence: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("cannot write to %s: %s; %s", self.root, error.strerror or error, consequence)


def _parse(line: bytes, end: int) -> Record:
    try:
        record = Record(line, end, **json.loads(line))
    except (ValueError, TypeError) as error:
        return Record(line, end, problem=f"unreadable line: {error}")
    known = record.id and record.kind in KINDS
    return record if known else Record(line, end, problem=f"unknown kind of record {record.kind!r}")


def _move(folders: Iterable[Path], to: Path) -> None:
    """Move folders into another folder. Skips missing ones and those already moved."""
    for folder in folders:
        if folder.is_dir() and not (to / folder.name).exists():
            to.mkdir(parents=True, exist_ok=True)
            folder.rename(to / folder.name)


def _append(path: Path, data: bytes) -> None:
    """Append all lines or none. First ends a partial last line of a killed process."""
    with path.open("ab+", buffering=0) as file:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file.fileno()).st_size
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock file for the block; yield False if another process or thread holds it."""
    with contextlib.ExitStack() as stack:
        held = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:  # a full disk, or a file system without locks: sending twice is harmless
            pass
        yield held


def _lines(file: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield the complete lines of a file from an offset, each with the offset after it."""
    with contextlib.suppress(FileNotFoundError), file.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield line, offset


def _read_json(file: Path, default: Any) -> Any:
    """Read a small JSON file; return `default` if it is missing or truncated by a power cut."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return default
