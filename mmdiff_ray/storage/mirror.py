"""A local folder and its copy in object storage: uploaded in the background, downloaded on other machines.

The local folder is in a cache: `MMDIFF_CACHE`, else `mmdiff_ray` in `XDG_CACHE_HOME` or `~/.cache`. Two
subfolders keep state between processes. `.unsent` contains a marker file for every `send` that is not
complete. `.seen` contains each file's version in storage when this machine last uploaded or downloaded it; if
storage later has a different version, another machine has uploaded the file.
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
"""Index of a folder in storage: its files and their sizes. Written last, so it marks a complete upload."""
UNSENT = ".unsent"
SEEN = ".seen"


def cached(uri: str) -> Path:
    """Return this machine's cache folder for a URI; for a path, the path itself."""
    if not is_uri(uri):
        return Path(uri).absolute()
    parts = urlsplit(uri)
    server = parse_qs(parts.query).get("endpoint_override", [""])[0]
    first = f"{parts.scheme}@{server}" if server else parts.scheme
    names = [first, parts.netloc.rpartition("@")[2], *unquote(parts.path).split("/")]
    if override := os.environ.get(CACHE_VARIABLE):
        cache = Path(override).absolute()
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmdiff_ray"
    return cache.joinpath(*(quote(name, safe="@ ") for name in names if name not in ("", ".", "..")))


class Mirror:
    """A local folder and its copy at a URI. Create it with `mirror`: one per folder and process."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri
        self.folder = folder
        self.fs, self.root = filesystem(uri)
        self.uploads = UploadQueue(uri)
        self._furthest: dict[str, int] = {}

    def path(self, name: str) -> str:
        """Return the path in `fs` of a file or subfolder."""
        return f"{self.root}/{name}" if name else self.root

    def files(self, below: str = "") -> dict[str, int]:
        """Return the files in storage: name relative to `below` -> bytes. Raises OSError."""
        return {name: info.size for name, info in list_files(self.fs, self.path(below)).items()}

    def send(self, *names: str) -> None:
        """Upload files or whole folders in the background; top-level files in the given order."""
        for name in names:
            marker = self.folder / UNSENT / f"{quote(name, safe='')}@{secrets.token_hex(4)}"
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
            self._queue(name)

    def send_file(self, name: str, label: str = "") -> Upload:
        """Upload one file in the background. Unlike `send`, a later process does not resend it.

        label: the file's name in messages.
        """
        return self.uploads.add(label or name, functools.partial(self._upload, name), self._lane(name))

    def _queue(self, name: str) -> None:
        self.uploads.add(name, functools.partial(self._send, name), self._lane(name))

    def _lane(self, name: str) -> str:
        """Return the upload lane of a name: its top folder, or "" for top-level files."""
        top = name.partition("/")[0]
        return top if (self.folder / top).is_dir() else ""

    def resend(self) -> None:
        """Upload what an earlier process could not, unless another machine has since. Raises OSError."""
        for name in self.unsent():
            if self._is_outdated(name):
                _unlink(self._markers(name))
            else:
                self._queue(name)

    def flush(self, stall_s: float | None = None) -> list[str]:
        """Wait for uploads as `UploadQueue.flush` does; return the names still not in storage."""
        self.uploads.flush(stall_s)
        return self.unsent()

    def unsent(self) -> list[str]:
        """Return the names that this or an earlier process sent and that are not in storage yet."""
        return sorted({_name_of(marker) for marker in self._markers()})

    def fetch(self, name: str) -> bool:
        """Download a file, or delete the local one if storage has none; return whether the file exists.

        An unsent local file is kept. Raises UnreachableError.
        """
        if any(name == unsent or name.startswith(f"{unsent}/") for unsent in self.unsent()):
            return (self.folder / name).is_file()
        with _reading(self.uri):
            info = self._info(name)
            if info.type != FileType.File:
                (self.folder / name).unlink(missing_ok=True)
                return False
            download(self.fs, self.path(name), self.folder / name)
            self._record_version(name, info)
        return True

    def fetch_folder(self, name: str) -> bool:
        """Download a folder that was sent as a whole, unless it is up to date; return whether it exists.

        Raises UnreachableError, or RunError if the folder changes during the download.
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
            index = read_bytes(self.fs, self.path(f"{name}/{FILES}"))
            if not _is_complete(here, index):
                self._download_folder(name, index)
            self._record_version(name, info)
        return True

    def _download_folder(self, name: str, index: bytes) -> None:
        here = self.folder / name
        partial = here.with_name(f"{here.name}.{secrets.token_hex(4)}.partial")
        try:
            for file, size in json.loads(index)["files"].items():
                if not is_inside(file):
                    raise RunError(
                        f"{join(self.uri, name, FILES)} contains {file!r}, a path outside the folder"
                    )
                download(self.fs, self.path(f"{name}/{file}"), partial / file, size)
            (partial / FILES).write_bytes(index)
            if read_bytes(self.fs, self.path(f"{name}/{FILES}")) != index:
                raise RunError(f"{join(self.uri, name)} changed during the download; try again")
            shutil.rmtree(here, ignore_errors=True)
            partial.rename(here)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def take(self, name: str, place: Path) -> bool:
        """Move a folder that was sent as a whole from storage to `place`; return whether it existed.

        Leaves an incomplete folder in storage. Raises as `fetch_folder`.
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
        markers = self._markers(name)  # a `send` during the upload adds a marker that must stay
        is_folder = (self.folder / name).is_dir()
        if is_folder:
            self._upload_folder(name)
        else:
            self._upload(name)
        self._record_version(name, self._info(f"{name}/{FILES}" if is_folder else name))
        _unlink(markers)

    def _upload_folder(self, name: str) -> None:
        """Upload a folder: delete its index, upload the files, write the index."""
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
        """Upload a file, if it exists."""
        if (self.folder / name).is_file():
            write_atomic(self.fs, self.path(name), self._chunks(name))
            self._furthest.pop(name, None)

    def _chunks(self, name: str) -> Iterator[bytes]:
        sent = 0
        with (self.folder / name).open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
                sent += len(chunk)
                if sent > self._furthest.get(
                    name, 0
                ):  # a retry counts as progress only past earlier attempts
                    self._furthest[name] = sent
                    self.uploads.progress()

    def _info(self, name: str) -> FileInfo:
        return self.fs.get_file_info(self.path(name))

    def _record_version(self, name: str, info: FileInfo) -> None:
        """Record that the local file equals this version in storage."""
        seen = self.folder / SEEN / quote(name, safe="")
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.write_text(version(info))

    def _is_outdated(self, name: str) -> bool:
        """Return whether another machine uploaded a newer version of an unsent file. Raises OSError.

        Compares times only if this machine has never seen the file in storage, whose clock may differ.
        """
        info = self._info(f"{name}/{FILES}" if (self.folder / name).is_dir() else name)
        if info.type != FileType.File:
            return False
        seen = self.folder / SEEN / quote(name, safe="")
        if seen.is_file():
            return seen.read_text() != version(info)
        return all(info.mtime_ns > marker.stat().st_mtime_ns for marker in self._markers(name))

    def _markers(self, name: str | None = None) -> list[Path]:
        """Return the marker files of an unsent file or folder, or all of them."""
        folder = self.folder / UNSENT
        markers = sorted(folder.iterdir()) if folder.is_dir() else []
        return [marker for marker in markers if name is None or _name_of(marker) == name]


@functools.cache
def mirror(uri: str, folder: Path) -> Mirror:
    """Return this process's mirror of a folder at a URI."""
    return Mirror(uri, folder)


def fetched(uri: str) -> Path:
    """Download the folder at a URI (`Mirror.fetch_folder`) and return its local path; return a path as is."""
    place = cached(uri)
    if is_uri(uri):
        above, name = parent(uri)
        mirror(above, place.parent).fetch_folder(name)
    return place


def _name_of(marker: Path) -> str:
    """Return the file or folder that a marker stands for. Markers of versions before 0.2 have no "@"."""
    return unquote(marker.name.partition("@")[0])


def _unlink(markers: list[Path]) -> None:
    for marker in markers:
        marker.unlink(missing_ok=True)


def _is_complete(here: Path, index: bytes) -> bool:
    """Return whether a local folder has the same index as storage and all its files."""
    if not (here / FILES).is_file() or (here / FILES).read_bytes() != index:
        return False
    files = json.loads(index)["files"]
    return all((here / file).is_file() and (here / file).stat().st_size == files[file] for file in files)


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnreachableError(f"cannot read from {uri}: {error}") from None
