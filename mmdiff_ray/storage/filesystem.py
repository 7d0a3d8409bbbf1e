"""Open files by local path or URI, with pyarrow's file systems (file://, s3://, gs://, hdfs://)."""

import contextlib
import functools
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, S3FileSystem

from mmdiff_ray.config import IN_STORAGE, ConfigError, UnreachableError, refuse_password

CHUNK_BYTES = 1 << 20
PART = ".part"


def filesystem(uri: str) -> tuple[FileSystem, str]:
    """Return the file system of a URI and the path inside it.

    An s3:// URI may have options, as in `s3://bucket/folder?endpoint_override=host:9000&scheme=http`.
    Raises ConfigError for an unknown scheme or option, and for a URI that contains a secret key.
    """
    if is_uri(uri):
        return _remote(uri)
    return LocalFileSystem(), absolute(uri)


@functools.lru_cache(maxsize=32)
def _remote(uri: str) -> tuple[FileSystem, str]:
    refuse_password(uri, IN_STORAGE)
    try:
        fs, path = FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError) as error:
        kind = UnreachableError if isinstance(error, OSError) else ConfigError
        raise kind(f"cannot open {uri}: {error}; want a path or file://, s3://, gs:// or hdfs://") from None
    if isinstance(fs, S3FileSystem):  # by default it buffers the whole file while writing
        fs = S3FileSystem(**{**fs.__reduce__()[1][0], "background_writes": False})
    return fs, path.rstrip("/")


def is_uri(place: str) -> bool:
    """Return whether a place is a URI, not a local path."""
    return "://" in place


def absolute(place: str) -> str:
    """Make a path absolute, for processes with other working directories. A URI is unchanged."""
    return place if is_uri(place) else os.path.abspath(os.path.expanduser(place))


def join(place: str, *names: str) -> str:
    """Join names to a path or URI. A URI keeps its options."""
    if not is_uri(place):
        return os.path.join(place, *names)
    parts = urlsplit(place)
    return parts._replace(path="/".join([parts.path.rstrip("/"), *names])).geturl()


def is_inside(name: str) -> bool:
    """Return whether a relative path stays inside its folder."""
    parts = name.replace("\\", "/").split("/")
    return "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def parent(uri: str) -> tuple[str, str]:
    """Split a URI into the URI of its parent folder and its name there."""
    parts = urlsplit(uri)
    above, _, name = parts.path.rstrip("/").rpartition("/")
    return parts._replace(path=above).geturl(), name


def read_bytes(fs: FileSystem, path: str) -> bytes:
    """Read a file that may be replaced meanwhile, in one version. Raises FileNotFoundError or OSError.

    pyarrow first requests the size. If a longer file then replaces this one, it reads only the beginning, so
    compare sizes and read again.
    """
    while True:
        with fs.open_input_file(path) as file:
            data = file.read()
        if isinstance(fs, LocalFileSystem) or fs.get_file_info(path).size == len(data):
            return data


def read_chunks(fs: FileSystem, path: str) -> Iterator[bytes]:
    """Yield a file in chunks. Raises FileNotFoundError or OSError."""
    with fs.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def write_atomic(fs: FileSystem, path: str, data: bytes | Iterable[bytes]) -> None:
    """Write a file so that readers never see a partial one. data: bytes or chunks.

    A local file is written under a temporary name and renamed. Object stores publish only complete objects.
    """
    is_local = isinstance(fs, LocalFileSystem)
    if is_local:
        fs.create_dir(os.path.dirname(path), recursive=True)
    with fs.open_output_stream(path + PART if is_local else path, compression=None) as stream:
        for chunk in [data] if isinstance(data, bytes) else data:
            stream.write(chunk)
    if is_local:
        fs.move(path + PART, path)


def version(info: FileInfo) -> str:
    """Return a string that identifies this version of a file: its time and size."""
    return f"{info.mtime_ns} {info.size}"


def download(fs: FileSystem, path: str, file: Path, size: int | None = None) -> None:
    """Download a file atomically; start over if it is replaced meanwhile.

    size: expected bytes, if known. Raises OSError, also for a different size.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PART}")
    copied = None
    try:
        while copied != (copied := version(fs.get_file_info(path))):
            with part.open("wb") as out:
                out.writelines(read_chunks(fs, path))
        if size is not None and part.stat().st_size != size:
            raise OSError(f"{path} has {part.stat().st_size} bytes, expected {size}")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def remove(fs: FileSystem, path: str) -> None:
    """Delete a file and the temporary file of an interrupted write, if they exist."""
    for name in (path, path + PART):
        if exists(fs, name):
            fs.delete_file(name)


def exists(fs: FileSystem, path: str) -> bool:
    """Return whether a file exists."""
    return fs.get_file_info(path).type == FileType.File


def list_files(fs: FileSystem, folder: str, recursive: bool = True) -> dict[str, FileInfo]:
    """Return the files in a folder, sorted: relative path -> info. Empty if the folder does not exist."""
    found = fs.get_file_info(FileSelector(folder, recursive=recursive, allow_not_found=True))
    files = {info.path[len(folder) + 1 :]: info for info in found if info.type == FileType.File}
    return dict(sorted(files.items()))


def folders_in(fs: FileSystem, path: str) -> list[str]:
    """Return the sorted names of the folders in a folder. Empty if the folder does not exist."""
    found = fs.get_file_info(FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == FileType.Directory)


def checksum(fs: FileSystem, path: str) -> tuple[int, str]:
    """Return a file's size in bytes and its sha256 in hexadecimal."""
    size, digest = 0, hashlib.sha256()
    for chunk in read_chunks(fs, path):
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def check_writable(uri: str) -> None:
    """Raise ConfigError if a local folder is not writable; leave nothing behind.

    Does nothing for other file systems: they show it only on a real write.
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
        for path in missing:  # deepest first
            with contextlib.suppress(OSError):
                path.rmdir()


def cannot_write(uri: str, error: OSError) -> ConfigError:
    """Return the error for an output folder that is not writable."""
    return ConfigError(f"out: cannot write to {uri}: {error.strerror or error}; want a writable folder")


def listed(pattern: str) -> list[str]:
    """Return the sorted files that match a path or URI with * (in a path also ?), or all files in a folder.

    Raises ConfigError if no file matches.
    """
    place, mark, options = pattern.partition("?") if is_uri(pattern) else (pattern, "", "")
    options = mark + options
    fixed = re.split(r"[*?\[]", place, maxsplit=1)[0]
    base = place if fixed == place else fixed.rpartition("/")[0] or "."
    fs, root = filesystem(base + options)
    if fixed == place and exists(fs, root):
        return [pattern]
    wanted = place.removeprefix(base).strip("/")
    chosen = [name for name in list_files(fs, root) if not wanted or fnmatch(name, wanted)]
    if not chosen:
        raise ConfigError(f"source: no file matches {pattern}")
    return [join(base + options, name) for name in chosen]
