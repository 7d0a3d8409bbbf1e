"""Open files by URI: a local path, or what pyarrow's file systems take (file://, s3://, gs://, hdfs://)."""

import contextlib
import functools
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, S3FileSystem

from mmdiff_ray.config import IN_STORAGE, ConfigError, UnreachableError, refuse_password

CHUNK_BYTES = 1 << 20
PART = ".part"


def filesystem(uri: str) -> tuple[FileSystem, str]:
    """Return the file system of a URI and the path inside it.

    An s3:// URI may carry options, as in `s3://bucket/folder?endpoint_override=host:9000&scheme=http`.
    Raises ConfigError for a scheme or option that pyarrow does not know, and for a key in it.
    """
    if is_uri(uri):
        return _remote(uri)
    return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))


def frugal(fs: FileSystem) -> FileSystem:
    """Return a file system that holds no more than a part of a file in memory while it writes.

    By itself S3's takes all of a file at once and sends it afterwards, whatever its size.
    """
    if not isinstance(fs, S3FileSystem):
        return fs
    options = fs.__reduce__()[1][0]
    return S3FileSystem(**{**options, "background_writes": False})


def absolute(uri: str) -> str:
    """Return a URI that means the same in a process with another working directory."""
    return uri if is_uri(uri) else filesystem(uri)[1]


def is_uri(place: str) -> bool:
    """Return whether a place is named by a URI rather than a path of this machine."""
    return "://" in place


def join(place: str, *names: str) -> str:
    """Return the path or URI of something inside a place; a URI's options stay behind it."""
    if not is_uri(place):
        return os.path.join(place, *names)
    parts = urlsplit(place)
    return parts._replace(path="/".join([parts.path.rstrip("/"), *names])).geturl()


def parent(uri: str) -> tuple[str, str]:
    """Return the URI of the folder that something lies in, and its name there."""
    parts = urlsplit(uri)
    above, _, name = parts.path.rstrip("/").rpartition("/")
    return parts._replace(path=above).geturl(), name


def read_bytes(fs: FileSystem, path: str) -> bytes:
    """Return the bytes of a file, those of one version of it. Raises FileNotFoundError or OSError.

    An object store is asked for the size first: of a file that a longer one replaces in between it would give
    the beginning.
    """
    while True:
        with fs.open_input_file(path) as file:
            data = file.read()
        if isinstance(fs, LocalFileSystem) or fs.get_file_info(path).size == len(data):
            return data


def write_bytes_atomic(fs: FileSystem, path: str, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it.

    Local files are written under a temporary name and renamed; an object store shows an object only when
    complete.
    """
    write_atomic(fs, path, [data])


def write_atomic(fs: FileSystem, path: str, chunks: Iterable[bytes]) -> None:
    """Write a file in pieces, as `write_bytes_atomic` does."""
    if not isinstance(fs, LocalFileSystem):
        _write(fs, path, chunks)
        return
    fs.create_dir(os.path.dirname(path), recursive=True)
    _write(fs, path + PART, chunks)
    fs.move(path + PART, path)


def read_chunks(fs: FileSystem, path: str) -> Iterator[bytes]:
    """Yield a file in pieces. Raises FileNotFoundError or OSError."""
    with fs.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def check_writable(uri: str) -> None:
    """Raise ConfigError unless files can be written into the local folder of a URI; leave nothing behind.

    Other file systems are not asked: there, only writing tells.
    """
    fs, root = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        return
    folder = Path(root)
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(uri, error) from None
    finally:
        for path in missing:  # the deepest first
            with contextlib.suppress(OSError):
                path.rmdir()


def cannot_write(uri: str, error: OSError) -> ConfigError:
    """Return the error for a URI that cannot be written to."""
    return ConfigError(
        f"out: cannot write to {uri}: {error.strerror or error}; want a folder that can be written to"
    )


def remove(fs: FileSystem, path: str) -> None:
    """Remove a file, and what an interrupted write of it left, if they are there."""
    for name in (path, path + PART):
        if exists(fs, name):
            fs.delete_file(name)


def exists(fs: FileSystem, path: str) -> bool:
    """Return whether a file is there."""
    return fs.get_file_info(path).type == FileType.File


def files_under(fs: FileSystem, path: str) -> list[str]:
    """Return the paths of all files in a folder and below, sorted; none if there is no such folder."""
    found = fs.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
    return sorted(info.path for info in found if info.type == FileType.File)


def sizes_under(fs: FileSystem, path: str) -> dict[str, int]:
    """Return the files in a folder and below: path inside it -> bytes; none if there is no such folder."""
    found = fs.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
    return {info.path[len(path) + 1 :]: info.size for info in found if info.type == FileType.File}


def times_in(fs: FileSystem, path: str) -> dict[str, float]:
    """Return the files in a folder: name -> when it was written, in seconds by the clock of the storage; none
    if there is no such folder."""
    found = fs.get_file_info(FileSelector(path, allow_not_found=True))
    return {info.base_name: (info.mtime_ns or 0) / 1e9 for info in found if info.type == FileType.File}


def folders_in(fs: FileSystem, path: str) -> list[str]:
    """Return the names of the folders in a folder; none if there is no such folder."""
    found = fs.get_file_info(FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == FileType.Directory)


def checksum(fs: FileSystem, path: str) -> tuple[int, str]:
    """Return a file's size in bytes and its sha256 in hexadecimal, read in pieces."""
    size, digest = 0, hashlib.sha256()
    for chunk in read_chunks(fs, path):
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def within(seconds: float, function: Callable[[], Any], words: str) -> Any:
    """Return what a function returns, or raise what it raises; UnreachableError if that takes too long."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, function()))
        except Exception as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise UnreachableError(f"{words} within {seconds:g} s")
    good, value = outcome[0]
    if not good:
        raise value
    return value


@functools.lru_cache(maxsize=32)
def _remote(uri: str) -> tuple[FileSystem, str]:
    refuse_password(uri, IN_STORAGE)
    try:
        fs, path = FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError) as error:
        kind = UnreachableError if isinstance(error, OSError) else ConfigError
        raise kind(f"cannot open {uri}: {error}; want a path or file://, s3://, gs:// or hdfs://") from None
    return fs, path.rstrip("/")


def _write(fs: FileSystem, path: str, chunks: Iterable[bytes]) -> None:
    with fs.open_output_stream(path, compression=None) as stream:
        for chunk in chunks:
            stream.write(chunk)


def listed(pattern: str) -> list[str]:
    """Return the files of a path or URI with * in it (a path: ? too), sorted; a folder's are all below it.

    Raises ConfigError where there is none.
    """
    place, mark, options = pattern.partition("?") if is_uri(pattern) else (pattern, "", "")
    options = mark + options
    fixed = re.split(r"[*?\[]", place, maxsplit=1)[0]
    base = place if fixed == place else fixed.rpartition("/")[0] or "."
    fs, root = filesystem(base + options)
    if fixed == place and fs.get_file_info(root).type == FileType.File:
        return [pattern]
    found = [
        info.path
        for info in fs.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
        if info.type == FileType.File
    ]
    names = sorted(path.removeprefix(root).strip("/") for path in found)
    wanted = place.removeprefix(base).strip("/")
    chosen = [name for name in names if not wanted or fnmatch(name, wanted)]
    if not chosen:
        raise ConfigError(f"source: no file matches {pattern}")
    return [join(base + options, name) for name in chosen]
