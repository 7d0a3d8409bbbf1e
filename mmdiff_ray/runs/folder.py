"""Where runs lie: in a folder, or in storage, with a folder of this machine for each run.

A run in storage is worked on in a cache folder (`mmdiff_ray.storage.mirror`); `ORIGIN` in it holds its URI.
"""

import contextlib
import secrets
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmdiff_ray.config import ConfigError, RunError, UnreachableError
from mmdiff_ray.storage.filesystem import (
    exists,
    filesystem,
    folders_in,
    is_uri,
    join,
    parent,
    remove,
    within,
    write_bytes_atomic,
)
from mmdiff_ray.storage.mirror import Mirror, cached, fetched, mirror

ORIGIN = ".origin"
CLAIMS, DRIVERS = "claims", "drivers"
"""Who reserves the name of a run in storage, and who drives it."""
RUN, SWEEP = "run.json", "sweep.json"
"""What every run has beside it, and every sweep."""
BAD_ROWS = "bad_rows.json"
"""The rows that a run could not read, where there are any."""
SMALL = (RUN, "config.yaml", "evaluation.json", "export/facts.json", BAD_ROWS)
"""What every command that names a run brings to this machine."""
ANSWER_S = 20.0
RESEND_S = 8.0
BRING_S = 60.0
LOOKS = 16
"""How many runs of a storage are looked at at once."""


def check_runs(runs: str) -> None:
    """Raise ConfigError unless runs can be kept in storage: try a small object, and remove it."""
    probe = f".mmdiff-{secrets.token_hex(4)}"

    def attempt() -> None:
        fs, root = opened(runs)
        write_bytes_atomic(fs, f"{root}/{probe}", b"mmdiff tries whether it can write here")
        remove(fs, f"{root}/{probe}")

    try:
        within(ANSWER_S, attempt, f"runs: {runs} does not answer")
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


def names_in(runs: str) -> list[str]:
    """Return the names that are taken in a folder or in storage, by a run or what may become one.

    Raises UnreachableError where storage does not answer.
    """
    if not is_uri(runs):
        folder = Path(runs)
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    fs, root = opened(runs)
    try:
        found = within(ANSWER_S, lambda: folders_in(fs, root), f"runs: {runs} does not answer")
    except OSError as error:
        raise UnreachableError(f"runs: cannot look into {runs}: {error}") from None
    here = cached(runs)
    return sorted({*found, *(path.name for path in here.iterdir())} if here.is_dir() else found)


def runs_in(where: str, marked_by: str = RUN) -> list[str]:
    """Return the names of the runs in storage, or of the sweeps.

    Raises UnreachableError where it does not answer.
    """
    fs, root = opened(where)

    def look() -> list[str]:
        names = folders_in(fs, root)
        with ThreadPoolExecutor(LOOKS) as pool:
            marked = pool.map(lambda name: exists(fs, f"{root}/{name}/{marked_by}"), names)
            return [name for name, has in zip(names, marked, strict=True) if has]

    try:
        return within(ANSWER_S, look, f"runs: {where} does not answer")
    except OSError as error:
        raise UnreachableError(f"runs: cannot look into {where}: {error}") from None


def addresses(where: str) -> list[str]:
    """Return the URI of the run in storage, those of a sweep and its trials, or all in a folder there.

    Raises UnreachableError where storage does not answer, ConfigError where there is no run.
    """
    fs, root = opened(where)

    def look() -> set[str]:
        return {name for name in (RUN, SWEEP) if exists(fs, f"{root}/{name}")}

    try:
        found = within(ANSWER_S, look, f"runs: {where} does not answer")
    except OSError as error:
        raise UnreachableError(f"runs: cannot look into {where}: {error}") from None
    if RUN in found:
        return [where]
    if SWEEP in found:
        trials = join(where, "trials")
        return [where, *(join(trials, name) for name in runs_in(trials))]
    sweeps = join(where, "sweeps")
    inside = [join(where, name) for name in runs_in(where)]
    inside += [one for name in runs_in(sweeps, SWEEP) for one in addresses(join(sweeps, name))]
    if not inside:
        raise ConfigError(f"there is no run in {where}; give the URI of a run, a sweep, or of all runs")
    return inside


def folder_of(runs: str, name: str) -> Path:
    """Return the folder of this machine for a run."""
    return cached(join(runs, name)) if is_uri(runs) else Path(runs).absolute() / name


def address(folder: Path) -> str:
    """Return what names a run on every machine: the URI of one in storage, else the path of its folder."""
    origin = folder / ORIGIN
    return origin.read_text(encoding="utf8").strip() if origin.is_file() else str(folder)


def mirror_of(folder: Path) -> Mirror | None:
    """Return the mirror of a run in storage; None for one that is a folder alone."""
    where = address(folder)
    return mirror(where, folder) if is_uri(where) else None


def make(uri: str) -> Path:
    """Return the folder of this machine for a run in storage, made where it is not there."""
    folder = cached(uri)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ORIGIN).write_text(uri, encoding="utf8")
    except OSError as error:
        raise ConfigError(
            f"runs: {folder}, where this machine keeps what it works on, cannot be made: {error.strerror}; "
            "name another place by MMDIFF_CACHE"
        ) from None
    return folder


def claim(uri: str) -> None:
    """Reserve the name of a new run in storage. Raises ConfigError where another process has it.

    Storage has no operation that only one of two can win: each leaves a note and then looks who is there, so
    that of two at the same moment at least one goes away.
    """
    fs, root = filesystem(uri)
    note = f"{CLAIMS}/{secrets.token_hex(8)}"
    write_bytes_atomic(fs, f"{root}/{note}", b"a run begins")
    if set(mirror(uri, cached(uri)).names()) != {note}:
        remove(fs, f"{root}/{note}")
        raise ConfigError(f"name: {uri} was taken by another run in this moment; try again")


def begun(uri: str) -> Path | None:
    """Return the folder of this machine for the run at a URI; None where it has not begun.

    What a beginning that was cut short has left is removed. Raises ConfigError for what is no run's.
    """
    where, name = parent(uri)
    if name in runs_in(where):
        return open_run(uri)
    if name in names_in(where):
        if any(not file.startswith(f"{CLAIMS}/") for file in mirror(uri, cached(uri)).names()):
            raise ConfigError(f"name: {uri} is there and is no run; choose another name")
        release(uri)
    return None


def release(where: str) -> None:
    """Give the name of a run back that has not begun, and remove what is here and there of it, if it can
    be."""
    with contextlib.suppress(OSError):
        clear(where)


def clear(where: str) -> None:
    """Remove all that is here and in storage of a run. Raises OSError where storage does not answer."""
    here = cached(where) if is_uri(where) else Path(where)
    shutil.rmtree(here, ignore_errors=True)
    if is_uri(where):
        if mirror(where, here).uploader.flush(ANSWER_S):  # what is on its way would be there again
            raise OSError(f"{where} does not take what was begun to be sent")
        shutil.rmtree(here, ignore_errors=True)
    fs, root = filesystem(where)
    with contextlib.suppress(FileNotFoundError):
        fs.delete_dir(root)


def open_run(uri: str, small: Sequence[str] = SMALL) -> Path:
    """Return the folder of this machine for a run that is in storage, with its small files up to date.

    What an earlier command could not send is sent. Raises UnreachableError where storage does not answer.
    """
    run = mirror(uri, make(uri))

    def bring() -> None:
        run.resend()
        run.flush(RESEND_S)
        for name in small:
            run.fetch(name)

    try:
        within(BRING_S, bring, f"runs: {uri} does not answer")
    except (OSError, RunError, UnreachableError) as error:
        raise UnreachableError(f"runs: {error}") from None
    return run.folder


def with_export(where: str) -> Path:
    """Return the folder on this machine of a run at an address, with its exported model where it has one.

    Raises UnreachableError where storage does not answer.
    """
    return fetched(join(where, "export")).parent if is_uri(where) else Path(where)


def not_sent(
    where: str, folder: Path, names: Sequence[str], sender: str = "the next command that names this run"
) -> str:
    """Return the sentence about what did not reach storage. sender: who will bring it there."""
    return f"not in {where}: {', '.join(names)}. All is in {folder}; {sender} on the same machine sends it"


def shown(folder: Path, path: Path) -> str:
    """Return where a part of a run lies: its URI, or the path as it is seen from here."""
    where = address(folder)
    return join(where, *path.relative_to(folder).parts) if is_uri(where) else str(near(path))


def near(path: Path) -> Path:
    """Return a path as seen from the working folder, where it lies below."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
