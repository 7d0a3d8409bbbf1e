"""Where runs lie: in a local folder or in storage, where each run has a cache folder on every machine.

`ORIGIN` in the cache folder of a run holds its URI (`mmdiff_ray.storage.mirror`).
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
"""The folder of a run in storage whose files reserve its name."""
RUN, SWEEP = "run.json", "sweep.json"
"""What every run has in its folder, and every sweep."""
BAD_ROWS = "bad_rows.json"
"""The rows that a run could not read, if there are any."""
SMALL = (RUN, "config.yaml", "evaluation.json", "export/facts.json", BAD_ROWS)
"""The files that every command on a run in storage fetches."""
ANSWER_S = 20.0
RESEND_S = 8.0
FETCH_S = 60.0
THREADS = 16

T = TypeVar("T")


@contextmanager
def lock_run(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a run or a sweep, by its folder on this machine, against other drivers here and anywhere.

    Raises as `lock_folder` and `Lease`.
    """
    where = address(folder)
    with lock_folder(folder), Lease(where, say) if is_uri(where) else nullcontext():
        yield


def check_runs(runs: str) -> None:
    """Raise ConfigError unless runs can be kept in storage: write a small object and remove it."""
    probe = f".mmdiff-{secrets.token_hex(4)}"

    def attempt() -> None:
        fs, root = opened(runs)
        write_atomic(fs, f"{root}/{probe}", b"mmdiff checks that it can write here")
        remove(fs, f"{root}/{probe}")

    try:
        with_timeout(ANSWER_S, attempt, f"runs: {runs} does not answer")
    except OSError as error:
        raise ConfigError(
            f"runs: cannot write to {runs}: {error}; want a bucket that exists, keys in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://) and the right to write and remove"
        ) from None


def opened(runs: str) -> tuple[Any, str]:
    """Return the file system of the storage of runs and the path in it. Raises ConfigError."""
    try:
        fs, root = filesystem(runs)
    except ConfigError as error:
        raise type(error)(f"runs: {error}") from None
    if not root:
        raise ConfigError(f"runs ({runs}) names no bucket or folder; want s3://bucket/runs")
    return fs, root


def _look(runs: str, look: Callable[[Any, str], T]) -> T:
    """Return what a look into storage finds. Raises UnreachableError where it does not answer."""
    fs, root = opened(runs)
    try:
        return with_timeout(ANSWER_S, lambda: look(fs, root), f"runs: {runs} does not answer")
    except OSError as error:
        raise UnreachableError(f"runs: cannot look into {runs}: {error}") from None


def names_in(runs: str) -> list[str]:
    """Return the names that are taken in a folder or in storage, by a run or anything else.

    Raises UnreachableError.
    """
    here = cached(runs)
    names = {path.name for path in here.iterdir()} if here.is_dir() else set()
    return sorted(names.union(_look(runs, folders_in) if is_uri(runs) else ()))


def runs_in(where: str, marker: str = RUN) -> list[str]:
    """Return the names of the runs in storage, or with SWEEP of the sweeps. Raises UnreachableError."""

    def look(fs: Any, root: str) -> list[str]:
        names = folders_in(fs, root)
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda name: exists(fs, f"{root}/{name}/{marker}"), names)
            return [name for name, is_marked in zip(names, found, strict=True) if is_marked]

    return _look(where, look)


def addresses(where: str) -> list[str]:
    """Return the URI of the run in storage, those of a sweep and its trials, or all in a folder there.

    Raises UnreachableError; ConfigError where there is no run.
    """
    is_run, is_sweep = _look(where, lambda fs, root: [exists(fs, f"{root}/{name}") for name in (RUN, SWEEP)])
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
    """Return what names a run on every machine: the URI of one in storage, else the path of its folder."""
    origin = folder / ORIGIN
    return origin.read_text(encoding="utf8").strip() if origin.is_file() else str(folder)


def mirror_of(folder: Path) -> Mirror | None:
    """Return the mirror of a run in storage, None for a run in a local folder."""
    where = address(folder)
    return mirror(where, folder) if is_uri(where) else None


def make_cache(uri: str) -> Path:
    """Return the folder of this machine for a run in storage, made if it is missing."""
    folder = cached(uri)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ORIGIN).write_text(uri, encoding="utf8")
    except OSError as error:
        raise ConfigError(
            f"runs: cannot make the cache folder {folder}: {error.strerror}; choose another by MMDIFF_CACHE"
        ) from None
    return folder


def claim(uri: str) -> None:
    """Reserve the name of a new run in storage. Raises ConfigError where another process has it.

    Each process writes a file and then lists them all, so of two at the same moment at least one gives up.
    """
    fs, root = filesystem(uri)
    name = f"{CLAIMS}/{secrets.token_hex(8)}"
    write_atomic(fs, f"{root}/{name}", b"a run begins")
    if set(mirror(uri, cached(uri)).files()) != {name}:
        remove(fs, f"{root}/{name}")
        raise ConfigError(f"name: {uri} was taken by another run in this moment; try again")


def find_begun(uri: str) -> Path | None:
    """Return the folder of this machine for the run at a URI; None where it has not begun.

    Frees the name where a process reserved it and died. Raises ConfigError where something else has it.
    """
    where, name = parent(uri)
    if name in runs_in(where):
        return open_run(uri)
    if name in names_in(where):
        if any(file.partition("/")[0] not in (CLAIMS, DRIVERS) for file in mirror(uri, cached(uri)).files()):
            raise ConfigError(f"name: {uri} exists and is no run; choose another name")
        release(uri)
    return None


def release(where: str) -> None:
    """Free the name of a run that has not begun and remove its files, as far as storage answers."""
    with suppress(OSError):
        clear(where)


def clear(where: str) -> None:
    """Remove all files of a run, here and in storage. Raises OSError where storage does not answer."""
    here = cached(where)
    shutil.rmtree(here, ignore_errors=True)
    if is_uri(where):
        if mirror(where, here).uploads.flush(ANSWER_S):  # an upload would bring a file back
            raise OSError(f"{where} does not take the uploads that have begun")
        shutil.rmtree(here, ignore_errors=True)
    fs, root = filesystem(where)
    with suppress(FileNotFoundError):
        fs.delete_dir(root)


def open_run(uri: str, small: Sequence[str] = SMALL) -> Path:
    """Return the folder of this machine for a run in storage, with its small files up to date.

    Sends what an earlier command could not send. Raises UnreachableError.
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
    where: str, folder: Path, names: Sequence[str], sender: str = "the next command that names this run"
) -> str:
    """Return the message about files that are not in storage. sender: what will send them."""
    return f"not in {where}: {', '.join(names)}. All is in {folder}; {sender} on the same machine sends it"


def display_path(folder: Path, path: Path) -> str:
    """Return where a part of a run lies for the user: its URI, or its path from the working directory."""
    where = address(folder)
    if is_uri(where):
        return join(where, *path.relative_to(folder).parts)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
