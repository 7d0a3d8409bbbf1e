"""What a cluster gets of this folder: the code and the files that a command names; no data, runs, secrets."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import mmdiff_ray
from mmdiff_ray.config import ConfigError

CODE = ("mmdiff_ray", "pipelines")
LOCK = "requirements.lock"
NAMED = "submitted"
"""The folder of the package that holds files from outside the working folder."""
LEFT_OUT = (
    "data",
    "runs",
    "results",
    "samples",
    "outputs",
    "mlruns",
    "mlartifacts",
    "tests",
    "build",
    "dist",
)
"""Folders of the working folder that no command needs on the cluster."""
CACHES = ("__pycache__", "node_modules")
LIMIT_BYTES = 50 * 2**20
SHOWN_FILES = 5


def code_folder() -> Path:
    """Return the folder that this package is imported from."""
    return Path(mmdiff_ray.__file__).parents[1]


def contents(folder: Path, named: Iterable[Path] = ()) -> dict[str, Path]:
    """Return what goes into the package: path inside it -> file here.

    The code that runs here; of the working folder all that git does not ignore, without hidden files and the
    folders above; the named files, wherever they are. A later one takes the place of an earlier one.
    """
    found: dict[str, Path] = {}
    for part in CODE:
        found |= _under(code_folder(), code_folder() / part)
    if folder.resolve() != code_folder().resolve():
        found |= {name: file for name, file in _files(folder).items() if name.split("/")[0] not in CODE}
    else:
        found |= _files(folder)
    lock = code_folder() / LOCK
    found |= {LOCK: lock} if lock.is_file() and LOCK not in found else {}
    return found | {place(file, folder): file for file in named}


def place(file: Path, folder: Path) -> str:
    """Return where a named file lies in the package: where it is in the working folder, or beside it all."""
    file, folder = file.absolute(), folder.absolute()
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else f"{NAMED}/{file.name}"


def check_size(files: Mapping[str, Path], limit_bytes: int = LIMIT_BYTES) -> int:
    """Return the bytes of a package. Raises ConfigError naming its largest files if they are too many."""
    sizes = {name: file.stat().st_size for name, file in files.items()}
    total = sum(sizes.values())
    if total > limit_bytes:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:SHOWN_FILES]
        listed = ", ".join(f"{name} ({_mib(sizes[name])})" for name in largest)
        raise ConfigError(
            f"the package is {_mib(total)}, more than {_mib(limit_bytes)}; its largest files: {listed}; "
            "add what the cluster does not need to .gitignore, or submit from a smaller folder"
        )
    return total


def stage(files: Mapping[str, Path], target: Path) -> None:
    """Copy a package's files into an empty folder."""
    for name, file in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target / name)


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a working folder that may go: those that git knows or would add, else all."""
    listed = _listed_by_git(folder)
    if listed is None:
        return {name: file for name, file in _under(folder, folder).items() if _may_go(name)}
    return {name: folder / name for name in listed if _may_go(name) and (folder / name).is_file()}


def _listed_by_git(folder: Path) -> list[str] | None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _under(root: Path, folder: Path) -> dict[str, Path]:
    """Return the files of a folder without hidden ones and caches, by their paths under a root."""
    return {file.relative_to(root).as_posix(): file for file in _walk(root, folder)}


def _walk(root: Path, folder: Path) -> Iterator[Path]:
    for path, folders, names in os.walk(folder):
        where = Path(path)
        folders[:] = sorted(name for name in folders if _may_go((where / name).relative_to(root).as_posix()))
        yield from (
            where / name for name in sorted(names) if not name.startswith(".") and (where / name).is_file()
        )


def _may_go(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") or part in CACHES for part in parts)
    return not hidden and parts[0] not in LEFT_OUT and not name.endswith((".pyc", ".egg-info"))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
