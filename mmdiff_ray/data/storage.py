"""Open files by URI: a local path, or what pyarrow's file systems take (file://, s3://, gs://, hdfs://)."""

import contextlib
import functools
import hashlib
import os
import tempfile
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from mmdiff_ray.config import ConfigError, UnreachableError

CHUNK_BYTES = 1 << 20
PART = ".part"


def filesystem(uri: str) -> tuple[FileSystem, str]:
    """Return the file system of a URI and the path inside it.

    An s3:// URI may carry options, as in `s3://bucket/folder?endpoint_override=host:9000&scheme=http`.
    Raises ConfigError for a scheme or option that pyarrow does not know.
    """
    if "://" in uri:
        return _remote(uri)
    return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))


def absolute(uri: str) -> str:
    """Return a URI that means the same in a process with another working directory."""
    return uri if "://" in uri else filesystem(uri)[1]


def read_bytes(fs: FileSystem, path: str) -> bytes:
    """Return the bytes of a file. Raises FileNotFoundError or OSError."""
    with fs.open_input_stream(path, compression=None) as stream:
        return stream.read()


def write_bytes_atomic(fs: FileSystem, path: str, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it.

    Local files are written under a temporary name and renamed; an object store shows an object only when
    complete.
    """
    if not isinstance(fs, LocalFileSystem):
        _write(fs, path, data)
        return
    fs.create_dir(os.path.dirname(path), recursive=True)
    _write(fs, path + PART, data)
    fs.move(path + PART, path)


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


def checksum(fs: FileSystem, path: str) -> tuple[int, str]:
    """Return a file's size in bytes and its sha256 in hexadecimal, read in pieces."""
    size, digest = 0, hashlib.sha256()
    with fs.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            size += len(chunk)
            digest.update(chunk)
    return size, digest.hexdigest()


@functools.lru_cache(maxsize=32)
def _remote(uri: str) -> tuple[FileSystem, str]:
    try:
        fs, path = FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError) as error:
        kind = UnreachableError if isinstance(error, OSError) else ConfigError
        raise kind(f"cannot open {uri}: {error}; want a path or file://, s3://, gs:// or hdfs://") from None
    return fs, path.rstrip("/")


def _write(fs: FileSystem, path: str, data: bytes) -> None:
    with fs.open_output_stream(path, compression=None) as stream:
        stream.write(data)
