"""A folder of this machine with its copy in storage: what is made here is brought there, and back elsewhere.

The folder lies in a cache: `MMDIFF_CACHE`, else `mmdiff_ray` in `XDG_CACHE_HOME` or `~/.cache`. What is not
brought to storage yet is noted in its folder `.unsent`, and so survives the process: by a note for each time
that it was sent, so that the end of one upload takes no other's note away. In `.seen` is what
storage told of each file when it was last sent or fetched: if it tells something else later, another machine
has brought the file.
"""

import contextlib
import functools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from pyarrow.fs import FileInfo, FileSystem, FileType

from mmdiff_ray.config import RunError, UnreachableError
from mmdiff_ray.storage.filesystem import (
    CHUNK_BYTES,
    PART,
    filesystem,
    frugal,
    join,
    parent,
    read_bytes,
    read_chunks,
    remove,
    sizes_under,
    write_atomic,
    write_bytes_atomic,
)
from mmdiff_ray.storage.upload import Errand, Uploader

CACHE_VARIABLE = "MMDIFF_CACHE"
FILES = "files.json"
"""Lists the files of a folder in storage with their sizes; written last: what has none is no whole."""
UNSENT = ".unsent"
SEEN = ".seen"

Went = Callable[[int], None]


def cached(uri: str) -> Path:
    """Return the folder of this machine for what lies at a URI."""
    parts = urlsplit(uri)
    server = parse_qs(parts.query).get("endpoint_override", [""])[0]
    first = f"{parts.scheme}@{server}" if server else parts.scheme
    names = [first, parts.netloc.rpartition("@")[2], *unquote(parts.path).split("/")]
    return _cache().joinpath(*(quote(name, safe="@ ") for name in names if name not in ("", ".", "..")))


def _cache() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).absolute()
    above = os.environ.get("XDG_CACHE_HOME")
    return (Path(above) if above else Path("~/.cache").expanduser()) / "mmdiff_ray"


class Mirror:
    """A local folder and its copy at a URI. One for both in each process: `mirror`."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri
        self.folder = folder
        fs, self.root = filesystem(uri)
        self.fs = frugal(fs)
        self.uploader = Uploader(uri)

    def path(self, name: str) -> str:
        """Return the path in the file system of a name inside the folder."""
        return f"{self.root}/{name}" if name else self.root

    def send(self, *names: str) -> None:
        """Bring files, or folders as wholes, to storage in the background, in this order."""
        for name in names:
            note = self.folder / UNSENT / f"{quote(name, safe='')}@{secrets.token_hex(4)}"
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
            self._queue(name, lane=names[0])

    def resend(self) -> None:
        """Send what another process could not, but for what another machine has brought there since.

        Raises OSError where storage does not answer.
        """
        for name in self.unsent():
            notes = self._notes(name)
            if self._is_overtaken(name):
                _unlink(notes)
            else:
                self._queue(name)

    def _is_overtaken(self, name: str) -> bool:
        """Return whether another machine has brought since what is noted as unsent here.

        Times are compared only where this machine has neither sent nor fetched it before: storage has a clock
        of its own.
        """
        there, seen = self._in_storage(name), self.folder / SEEN / quote(name, safe="")
        if there.type != FileType.File:
            return False
        if seen.is_file():
            return seen.read_text() != _told_by(there)
        return all(there.mtime_ns > note.stat().st_mtime_ns for note in self._notes(name))

    def _is_surely_overtaken(self, name: str) -> bool:
        """Return whether storage says that another machine has brought since what is unsent here."""
        with contextlib.suppress(OSError):
            return self._is_overtaken(name)
        return False

    def _in_storage(self, name: str) -> FileInfo:
        """Return what storage tells of a file, or of the list of a folder."""
        listed = f"{name}/{FILES}" if (self.folder / name).is_dir() else name
        return self.fs.get_file_info(self.path(listed))

    def _see(self, name: str, there: FileInfo) -> None:
        """Keep what storage tells of what is the same there and here."""
        seen = self.folder / SEEN / quote(name, safe="")
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.write_text(_told_by(there))

    def _queue(self, name: str, lane: str = "") -> None:
        send = self._send_folder if (self.folder / name).is_dir() else self._send_file
        self.uploader.add(name, functools.partial(send, name), lane)

    def send_file(self, name: str, above: str = "") -> Errand:
        """Bring one file in the background, without a note that outlives the process.

        above: what it is a part of, whose parts are brought in order.
        """
        return self.uploader.add(above or name, functools.partial(self._upload, name))

    def flush(self, still_s: float) -> list[str]:
        """Wait for what is on its way, as long as something moves; return what is not in storage then."""
        self.uploader.flush(still_s)
        return self.unsent()

    def unsent(self) -> list[str]:
        """Return the names of what was to be sent, by this process or another, and is not in storage yet."""
        notes = self.folder / UNSENT
        return sorted({_noted_by(note) for note in notes.iterdir()}) if notes.is_dir() else []

    def names(self, below: str = "") -> dict[str, int]:
        """Return the files in storage: name inside `below` -> bytes. Raises OSError."""
        return sizes_under(self.fs, self.path(below))

    def fetch(self, name: str) -> bool:
        """Bring a file from storage, or remove it where storage has none; return whether it is here.

        A file here that storage does not have yet stays. Raises UnreachableError where storage does not
        answer.
        """
        if any(name == unsent or name.startswith(f"{unsent}/") for unsent in self.unsent()):
            return (self.folder / name).is_file()
        with _said(self.uri):
            there = self.fs.get_file_info(self.path(name))
            if there.type != FileType.File:
                (self.folder / name).unlink(missing_ok=True)
                return False
            download(self.fs, self.path(name), self.folder / name)
            self._see(name, there)
        return True

    def fetch_folder(self, name: str) -> bool:
        """Bring a folder that was sent as a whole, unless it is here; return whether it is.

        Raises UnreachableError where storage does not answer, RunError where the folder changes while it is
        read.
        """
        here = self.folder / name
        if name in self.unsent() and not self._is_surely_overtaken(name):
            return here.is_dir()
        with _said(self.uri):
            there = self.fs.get_file_info(self.path(f"{name}/{FILES}"))
            if there.type != FileType.File:
                return False
            listed = read_bytes(self.fs, self.path(f"{name}/{FILES}"))
            if not _is_whole(here, listed):
                self._fetch_files(name, listed)
            self._see(name, there)
        return True

    def take(self, name: str, place: Path) -> bool:
        """Move a folder that was sent as a whole to a place here, and out of storage; return whether it was
        there.

        What storage does not have as a whole, or not yet, stays where it is. Raises as `fetch_folder`.
        """
        if name in self.unsent() or not self.fetch_folder(name):
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).rename(place)
        with _said(self.uri):
            remove(self.fs, self.path(f"{name}/{FILES}"))
            self.fs.delete_dir(self.path(name))
        return True

    def _fetch_files(self, name: str, listed: bytes) -> None:
        here = self.folder / name
        partial = here.with_name(f"{here.name}.{secrets.token_hex(4)}.partial")
        try:
            for file, size in json.loads(listed)["files"].items():
                download(self.fs, self.path(f"{name}/{file}"), partial / file, size)
            (partial / FILES).write_bytes(listed)
            if read_bytes(self.fs, self.path(f"{name}/{FILES}")) != listed:
                raise RunError(f"{join(self.uri, name)} changed while it was read; try again")
            shutil.rmtree(here, ignore_errors=True)
            partial.rename(here)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _notes(self, name: str) -> list[Path]:
        """Return the notes that a file or a folder is unsent."""
        notes = self.folder / UNSENT
        return [note for note in notes.iterdir() if _noted_by(note) == name] if notes.is_dir() else []

    def _send_file(self, name: str, went: Went) -> None:
        notes = self._notes(name)  # those of now: what changes later has another
        self._upload(name, went)
        self._sent(name, notes)

    def _send_folder(self, name: str, went: Went) -> None:
        """Send the list last, and take an older one away first: what is between is no whole."""
        here, notes = self.folder / name, self._notes(name)
        files = sorted(path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file())
        files = [file for file in files if file != FILES]
        remove(self.fs, self.path(f"{name}/{FILES}"))
        gone = 0
        for file in files:
            self._upload(f"{name}/{file}", functools.partial(_behind, went, gone))
            gone += (here / file).stat().st_size
        sizes = {file: (here / file).stat().st_size for file in files}
        data = json.dumps({"mark": secrets.token_hex(8), "files": sizes}, indent=1).encode()
        write_bytes_atomic(self.fs, self.path(f"{name}/{FILES}"), data)
        (here / FILES).write_bytes(data)
        self._sent(name, notes)

    def _upload(self, name: str, went: Went) -> None:
        """Bring a file; one that is gone by now need not go."""
        file = self.folder / name
        if file.is_file():
            write_atomic(self.fs, self.path(name), _counted(file, went))

    def _sent(self, name: str, notes: Sequence[Path]) -> None:
        self._see(name, self._in_storage(name))
        _unlink(notes)


@functools.cache
def mirror(uri: str, folder: Path) -> Mirror:
    """Return this process's mirror of a folder at a URI."""
    return Mirror(uri, folder)


def fetched(uri: str) -> Path:
    """Return the folder of this machine with what lies at a URI, brought here where it is not.

    Raises as `Mirror.fetch_folder`.
    """
    place, (above, name) = cached(uri), parent(uri)
    mirror(above, place.parent).fetch_folder(name)
    return place


def download(fs: FileSystem, path: str, file: Path, size: int | None = None) -> None:
    """Write a file of storage to this machine, as a whole or not at all; again if it is replaced meanwhile.

    Raises OSError, also for one that has another size in bytes than the given one.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PART}")
    version = None
    try:
        while version != (version := _told_by(fs.get_file_info(path))):
            with part.open("wb") as out:
                for chunk in read_chunks(fs, path):
                    out.write(chunk)
        if size is not None and part.stat().st_size != size:
            raise OSError(f"{path} has {part.stat().st_size} bytes, {size} were written")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _counted(file: Path, went: Went) -> Iterator[bytes]:
    gone = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
            gone += len(chunk)
            went(gone)


def _behind(went: Went, before: int, sent: int) -> None:
    went(before + sent)


def _noted_by(note: Path) -> str:
    """Return what a note says is unsent; those of before 0.2 have no "@"."""
    return unquote(note.name.partition("@")[0])


def _unlink(notes: Sequence[Path]) -> None:
    for note in notes:
        note.unlink(missing_ok=True)


def _told_by(there: FileInfo) -> str:
    return f"{there.mtime_ns} {there.size}"


def _is_whole(here: Path, listed: bytes) -> bool:
    """Return whether a folder of this machine has what a list says, and is of the same making."""
    if not (here / FILES).is_file() or (here / FILES).read_bytes() != listed:
        return False
    files = json.loads(listed)["files"]
    return all((here / file).is_file() and (here / file).stat().st_size == files[file] for file in files)


@contextlib.contextmanager
def _said(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnreachableError(f"cannot read from {uri}: {error}") from None
