"""A local folder and its copy in storage: uploaded in the background, fetched on another machine.

The folder lies in a cache: `MMDIFF_CACHE`, else `mmdiff_ray` in `XDG_CACHE_HOME` or `~/.cache`. Two folders
in it survive the process. `.unsent` holds a note for every `send` whose upload has not ended. `.seen` holds
the version that storage had of a file when this machine last uploaded or fetched it: if it has another one
later, another machine has uploaded the file since.
"""

import functools
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from pyarrow.fs import FileInfo, FileType

from mmdiff_ray.config import RunError, UnreachableError
from mmdiff_ray.storage.filesystem import (
    CHUNK_BYTES,
    download,
    filesystem,
    is_inside,
    is_uri,
    join,
    list_files,
    parent,
    read_bytes,
    remove,
    version,
    write_atomic,
)
from mmdiff_ray.storage.upload import Upload, UploadQueue

CACHE_VARIABLE = "MMDIFF_CACHE"
FILES = "files.json"
"""Lists the files of a folder in storage with their sizes; written last."""
UNSENT = ".unsent"
SEEN = ".seen"


def cached(uri: str) -> Path:
    """Return the folder of this machine for what lies at a URI, or the folder at a path itself."""
    if not is_uri(uri):
        return Path(uri).absolute()
    parts = urlsplit(uri)
    server = parse_qs(parts.query).get("endpoint_override", [""])[0]
    first = f"{parts.scheme}@{server}" if server else parts.scheme
    names = [first, parts.netloc.rpartition("@")[2], *unquote(parts.path).split("/")]
    if named := os.environ.get(CACHE_VARIABLE):
        cache = Path(named).absolute()
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmdiff_ray"
    return cache.joinpath(*(quote(name, safe="@ ") for name in names if name not in ("", ".", "..")))


class Mirror:
    """A local folder and its copy at a URI. Processes have one for each folder: `mirror`."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri
        self.folder = folder
        self.fs, self.root = filesystem(uri)
        self.uploads = UploadQueue(uri)
        self._furthest: dict[str, int] = {}

    def path(self, name: str) -> str:
        """Return the path in the file system of a name inside the folder."""
        return f"{self.root}/{name}" if name else self.root

    def files(self, below: str = "") -> dict[str, int]:
        """Return the files in storage: name inside `below` -> bytes. Raises OSError."""
        return {name: info.size for name, info in list_files(self.fs, self.path(below)).items()}

    def send(self, *names: str) -> None:
        """Upload files, or folders as wholes, in the background; top-level files in this order."""
        for name in names:
            note = self.folder / UNSENT / f"{quote(name, safe='')}@{secrets.token_hex(4)}"
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
            self._queue(name)

    def send_file(self, name: str, label: str = "") -> Upload:
        """Upload one file in the background, without a note that outlives the process.

        label: its name for the user.
        """
        return self.uploads.add(label or name, functools.partial(self._upload, name), self._lane(name))

    def _queue(self, name: str) -> None:
        self.uploads.add(name, functools.partial(self._send, name), self._lane(name))

    def _lane(self, name: str) -> str:
        """Return the lane of a name: its top folder, or one for all top-level files."""
        top = name.partition("/")[0]
        return top if (self.folder / top).is_dir() else ""

    def resend(self) -> None:
        """Send what another process could not, unless another machine has sent it since. Raises OSError."""
        for name in self.unsent():
            if self._is_outdated(name):
                _unlink(self._notes(name))
            else:
                self._queue(name)

    def flush(self, stall_s: float | None = None) -> list[str]:
        """Wait for the uploads while bytes move, as `UploadQueue.flush`; return what is not in storage."""
        self.uploads.flush(stall_s)
        return self.unsent()

    def unsent(self) -> list[str]:
        """Return the names that this process or another was to send and that are not in storage yet."""
        return sorted({_name_of(note) for note in self._notes()})

    def fetch(self, name: str) -> bool:
        """Fetch a file from storage, or remove it here where storage has none; return whether it exists.

        A file that is still to be sent stays. Raises UnreachableError.
        """
        if any(name == unsent or name.startswith(f"{unsent}/") for unsent in self.unsent()):
            return (self.folder / name).is_file()
        with _reading(self.uri):
            info = self._info(name)
            if info.type != FileType.File:
                (self.folder / name).unlink(missing_ok=True)
                return False
            download(self.fs, self.path(name), self.folder / name)
            self._saw(name, info)
        return True

    def fetch_folder(self, name: str) -> bool:
        """Fetch a folder that was sent as a whole, unless it is here; return whether it is.

        Raises UnreachableError; RunError where the folder changes while it is read.
        """
        here = self.folder / name
        try:
            if name in self.unsent() and not self._is_outdated(name):
                return here.is_dir()
        except OSError:
            return here.is_dir()
        with _reading(self.uri):
            info = self._info(f"{name}/{FILES}")
            if info.type != FileType.File:
                return False
            listed = read_bytes(self.fs, self.path(f"{name}/{FILES}"))
            if not _is_complete(here, listed):
                self._download_folder(name, listed)
            self._saw(name, info)
        return True

    def _download_folder(self, name: str, listed: bytes) -> None:
        here = self.folder / name
        partial = here.with_name(f"{here.name}.{secrets.token_hex(4)}.partial")
        try:
            for file, size in json.loads(listed)["files"].items():
                if not is_inside(file):
                    raise RunError(f"{join(self.uri, name, FILES)} names {file!r}, which lies outside")
                download(self.fs, self.path(f"{name}/{file}"), partial / file, size)
            (partial / FILES).write_bytes(listed)
            if read_bytes(self.fs, self.path(f"{name}/{FILES}")) != listed:
                raise RunError(f"{join(self.uri, name)} changed while it was read; try again")
            shutil.rmtree(here, ignore_errors=True)
            partial.rename(here)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def take(self, name: str, place: Path) -> bool:
        """Move a folder that was sent as a whole out of storage to a place here; return whether it was there.

        An incomplete folder stays where it is. Raises as `fetch_folder`.
        """
        if name in self.unsent() or not self.fetch_folder(name):
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).rename(place)
        with _reading(self.uri):
            remove(self.fs, self.path(f"{name}/{FILES}"))
            self.fs.delete_dir(self.path(name))
        return True

    def _send(self, name: str) -> None:
        notes = self._notes(name)  # a `send` during the upload adds another
        is_folder = (self.folder / name).is_dir()
        if is_folder:
            self._upload_folder(name)
        else:
            self._upload(name)
        self._saw(name, self._info(f"{name}/{FILES}" if is_folder else name))
        _unlink(notes)

    def _upload_folder(self, name: str) -> None:
        """Upload a folder: remove the list, upload the files, write the list."""
        here = self.folder / name
        files = sorted(path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file())
        files = [file for file in files if file != FILES]
        remove(self.fs, self.path(f"{name}/{FILES}"))
        for file in files:
            self._upload(f"{name}/{file}")
        sizes = {file: (here / file).stat().st_size for file in files}
        data = json.dumps({"mark": secrets.token_hex(8), "files": sizes}, indent=1).encode()
        write_atomic(self.fs, self.path(f"{name}/{FILES}"), data)
        (here / FILES).write_bytes(data)

    def _upload(self, name: str) -> None:
        """Upload a file unless it is gone."""
        if (self.folder / name).is_file():
            write_atomic(self.fs, self.path(name), self._chunks(name))
            self._furthest.pop(name, None)

    def _chunks(self, name: str) -> Iterator[bytes]:
        sent = 0
        with (self.folder / name).open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
                sent += len(chunk)
                if sent > self._furthest.get(name, 0):  # a retry makes progress beyond the attempts before
                    self._furthest[name] = sent
                    self.uploads.progress()

    def _info(self, name: str) -> FileInfo:
        return self.fs.get_file_info(self.path(name))

    def _saw(self, name: str, info: FileInfo) -> None:
        """Keep the version in storage that is the same as what is here."""
        seen = self.folder / SEEN / quote(name, safe="")
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.write_text(version(info))

    def _is_outdated(self, name: str) -> bool:
        """Return whether another machine has uploaded since what is unsent here. Raises OSError.

        Storage has a clock of its own: times decide only where this machine has not seen the file there.
        """
        info = self._info(f"{name}/{FILES}" if (self.folder / name).is_dir() else name)
        if info.type != FileType.File:
            return False
        seen = self.folder / SEEN / quote(name, safe="")
        if seen.is_file():
            return seen.read_text() != version(info)
        return all(info.mtime_ns > note.stat().st_mtime_ns for note in self._notes(name))

    def _notes(self, name: str | None = None) -> list[Path]:
        """Return the notes about a file or folder that is unsent, or all of them."""
        folder = self.folder / UNSENT
        notes = sorted(folder.iterdir()) if folder.is_dir() else []
        return [note for note in notes if name is None or _name_of(note) == name]


@functools.cache
def mirror(uri: str, folder: Path) -> Mirror:
    """Return this process's mirror of a folder at a URI."""
    return Mirror(uri, folder)


def fetched(uri: str) -> Path:
    """Return the folder of this machine with what lies at a URI, fetched as by `Mirror.fetch_folder`, or the
    folder at a path itself."""
    place = cached(uri)
    if is_uri(uri):
        above, name = parent(uri)
        mirror(above, place.parent).fetch_folder(name)
    return place


def _name_of(note: Path) -> str:
    """Return what a note says is unsent; notes of before 0.2 have no "@"."""
    return unquote(note.name.partition("@")[0])


def _unlink(notes: list[Path]) -> None:
    for note in notes:
        note.unlink(missing_ok=True)


def _is_complete(here: Path, listed: bytes) -> bool:
    """Return whether a folder of this machine has the files that a list names, and the same list."""
    if not (here / FILES).is_file() or (here / FILES).read_bytes() != listed:
        return False
    files = json.loads(listed)["files"]
    return all((here / file).is_file() and (here / file).stat().st_size == files[file] for file in files)


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnreachableError(f"cannot read from {uri}: {error}") from None
