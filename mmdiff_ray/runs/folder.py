"""Run folders, local or in object storage. A run in storage has a cache folder on each machine.

The file `ORIGIN` in a cache folder contains the run's URI (see `mmdiff_ray.storage.mirror`).
"""

import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from mmdiff_ray.config import ConfigError, RunError, UnreachableError
from mmdiff_ray.storage.filesystem import (
    exists,
    filesystem,
    folders_in,
    is_uri,
    join,
    parent,
    remove,
    write_atomic,
)
from mmdiff_ray.storage.lock import DRIVERS, Lease, lock_folder
from mmdiff_ray.storage.mirror import Mirror, cached, mirror
from mmdiff_ray.storage.retry import with_timeout

ORIGIN = ".origin"
CLAIMS = "claims"
"""Subfolder of a run in storage whose files reserve its name."""
RUN, SWEEP = "run.json", "sweep.json"
"""The files that identify a run and a sweep."""
BAD_ROWS = "bad_rows.json"
"""Unreadable rows of a run, if any."""
SMALL = (RUN, "config.yaml", "evaluation.json", "export/facts.json", BAD_ROWS)
"""Files that every command on a run in storage downloads."""
ANSWER_S = 20.0
RESEND_S = 8.0
FETCH_S = 60.0
THREADS = 16

T = TypeVar("T")


@contextmanager
def lock_run(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lock a run or sweep against other drivers on this and other machines.

    folder: its folder on this machine. Raises as `lock_folder` and `Lease`.
    """
    where = address(folder)
    with lock_folder(folder), Lease(where, say) if is_uri(where) else nullcontext():
        yield


def check_runs(runs: str) -> None:
    """Raise ConfigError if the storage of runs is not writable. Writes and deletes a small object."""
    probe = f".mmdiff-{secrets.token_hex(4)}"

    def attempt() -> None:
        fs, root = open_storage(runs)
        write_atomic(fs, f"{root}/{probe}", b"mmdiff checks that it can write here")
        remove(fs, f"{root}/{probe}")

    try:
        with_timeout(ANSWER_S, attempt, f"runs: {runs} does not answer")
    except OSError as error:
        raise ConfigError(
            f"runs: cannot write to {runs}: {error}; want a bucket that exists, keys in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://) and permission to write and delete"
        ) from None


def open_storage(runs: str) -> tuple[Any, str]:
    """Return the file system of the storage of runs, and the path in it. Raises ConfigError."""
    try:
        fs, root = filesystem(runs)
    except ConfigError as error:
        raise type(error)(f"runs: {error}") from None
    if not root:
        raise ConfigError(f"runs ({runs}) has no bucket or folder; want s3://bucket/runs")
    return fs, root


def _query(runs: str, query: Callable[[Any, str], T]) -> T:
    """Call `query` with the storage's file system and path. Raises UnreachableError if it does not answer."""
    fs, root = open_storage(runs)
    try:
        return with_timeout(ANSWER_S, lambda: query(fs, root), f"runs: {runs} does not answer")
    except OSError as error:
        raise UnreachableError(f"runs: cannot list {runs}: {error}") from None


def names_in(runs: str) -> list[str]:
    """Return the names in a folder or in storage, of runs or anything else.

    Raises UnreachableError.
    """
    here = cached(runs)
    names = {path.name for path in here.iterdir()} if here.is_dir() else set()
    return sorted(names.union(_query(runs, folders_in) if is_uri(runs) else ()))


def runs_in(where: str, marker: str = RUN) -> list[str]:
    """Return the names of the runs in storage; with marker=SWEEP, of the sweeps. Raises UnreachableError."""

    def query(fs: Any, root: str) -> list[str]:
        names = folders_in(fs, root)
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda name: exists(fs, f"{root}/{name}/{marker}"), names)
            return [name for name, is_marked in zip(names, found, strict=True) if is_marked]

    return _query(where, query)


def addresses(where: str) -> list[str]:
    """Return the URIs of a run, of a sweep and its trials, or of all runs and sweeps in a storage folder.

    Raises UnreachableError, or ConfigError if there is no run.
    """
    is_run, is_sweep = _query(where, lambda fs, root: [exists(fs, f"{root}/{name}") for name in (RUN, SWEEP)])
    if is_run:
        return [where]
    trials, sweeps = join(where, "trials"), join(where, "sweeps")
    if is_sweep:
        return [where, *(join(trials, name) for name in runs_in(trials))]
    found = [join(where, name) for name in runs_in(where)]
    found += [uri for name in runs_in(sweeps, SWEEP) for uri in addresses(join(sweeps, name))]
    if not found:
        raise ConfigError(f"there is no run in {where}; give the URI of a run, a sweep, or of all runs")
    return found


def address(folder: Path) -> str:
    """Return the address of a run: its URI if it is in storage, else its folder's path."""
    origin = folder / ORIGIN
    return origin.read_text(encoding="utf8").strip() if origin.is_file() else str(folder)


def mirror_of(folder: Path) -> Mirror | None:
    """Return the mirror of a run in storage; None for a local run."""
    where = address(folder)
    return mirror(where, folder) if is_uri(where) else None


def make_cache(uri: str) -> Path:
    """Create and return the cache folder on this machine for a run in storage."""
    folder = cached(uri)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ORIGIN).write_text(uri, encoding="utf8")
    except OSError as error:
        raise ConfigError(
            f"runs: cannot create the cache folder {folder}: {error.strerror}; set MMDIFF_CACHE to another"
        ) from None
    return folder


def claim(uri: str) -> None:
    """Reserve the name of a new run in storage. Raises ConfigError if another process has reserved it.

    Each process writes a claim and then lists all claims, so of two at the same time at least one gives up.
    """
    fs, root = filesystem(uri)
    name = f"{CLAIMS}/{secrets.token_hex(8)}"
    write_atomic(fs, f"{root}/{name}", b"a run begins")
    if set(mirror(uri, cached(uri)).files()) != {name}:
        remove(fs, f"{root}/{name}")
        raise ConfigError(f"name: {uri} was just taken by another run; try again")


def find_existing(uri: str) -> Path | None:
    """Open the run at a URI and return its local folder; None if there is none.

    Frees the name if a process reserved it and died. Raises ConfigError if something else is at the URI.
    """
    where, name = parent(uri)
    if name in runs_in(where):
        return open_run(uri)
    if name in names_in(where):
        if any(file.partition("/")[0] not in (CLAIMS, DRIVERS) for file in mirror(uri, cached(uri)).files()):
            raise ConfigError(f"name: {uri} exists but is not a run; choose another name")
        release(uri)
    return None


def release(where: str) -> None:
    """Delete a run that did not start, to free its name. Ignores errors of storage."""
    with suppress(OSError):
        clear(where)


def clear(where: str) -> None:
    """Delete all files of a run, local and in storage. Raises OSError if storage does not answer."""
    here = cached(where)
    shutil.rmtree(here, ignore_errors=True)
    if is_uri(where):
        if mirror(where, here).uploads.flush(ANSWER_S):  # a running upload would restore a file
            raise OSError(f"{where} does not accept pending uploads")
        shutil.rmtree(here, ignore_errors=True)
    fs, root = filesystem(where)
    with suppress(FileNotFoundError):
        fs.delete_dir(root)


def open_run(uri: str, small: Sequence[str] = SMALL) -> Path:
    """Return the local folder of a run in storage, after downloading its small files.

    Uploads what an earlier command could not. Raises UnreachableError.
    """
    run = mirror(uri, make_cache(uri))

    def fetch() -> None:
        run.resend()
        run.flush(RESEND_S)
        for name in small:
            run.fetch(name)

    try:
        with_timeout(FETCH_S, fetch, f"runs: {uri} does not answer")
    except (OSError, RunError, UnreachableError) as error:
        raise UnreachableError(f"runs: {error}") from None
    return run.folder


def not_sent(
    where: str, folder: Path, names: Sequence[str], sender: str = "the next command on this run"
) -> str:
    """Return the message about files that are not in storage. sender: the command that will upload them."""
    return f"not in {where}: {', '.join(names)}. They are in {folder}; {sender} on this machine uploads them"


def display_path(folder: Path, path: Path) -> str:
    """Return a file of a run for messages: its URI, or its path relative to the working directory."""
    where = address(folder)
    if is_uri(where):
        return join(where, *path.relative_to(folder).parts)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
