"""What a cluster gets of this folder: the code, what git does not ignore, and the files that a command names.

No data and runs, no hidden files, and none that are called as keys are. Other secrets stay where git ignores
them, or they lie elsewhere.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
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
KEYS = (
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.env",
    "credentials",
    "credentials.json",
    "*_credentials.json",
    "service-account*.json",
    "service_account*.json",
)
"""Names of files that hold keys and passwords."""
LIMIT_BYTES = 50 * 2**20
SHOWN_FILES = 5


def code_folder() -> Path:
    """Return the folder that this package is imported from."""
    return Path(mmdiff_ray.__file__).parents[1]


def contents(folder: Path, named: Iterable[Path] = ()) -> dict[str, Path]:
    """Return what goes into the package: path inside it -> file here.

    The code that runs here; of the working folder all that git does not ignore, without hidden files, the
    folders above and what `left_keys` names; the named files, wherever they are and whatever they are called.
    A later one takes the place of an earlier one.
    """
    found = {name: file for name, file in _found(folder).items() if not _is_key(name)}
    return found | {place: file for file, place in places(named, folder).items()}


def left_keys(folder: Path, sent: Mapping[str, Path]) -> list[str]:
    """Return the files of a folder that are not sent since they are called as keys are, sorted."""
    return sorted(name for name in _found(folder) if _is_key(name) and name not in sent)


def places(named: Iterable[Path], folder: Path) -> dict[Path, str]:
    """Return where named files lie in the package: where they are in the working folder, or beside it all,
    those of one name apart."""
    found: dict[Path, str] = {}

    def is_taken(place: str) -> bool:
        return place in found.values() or (folder / place).exists()

    for file in named:
        if file in found:
            continue
        here = file.absolute()
        if here.is_relative_to(folder.absolute()):
            found[file] = here.relative_to(folder.absolute()).as_posix()
            continue
        folders = itertools.chain([NAMED], (f"{NAMED}/{number}" for number in itertools.count(2)))
        free = (place for where in folders if not is_taken(place := f"{where}/{file.name}"))
        found[file] = next(free)
    return found


def _found(folder: Path) -> dict[str, Path]:
    """Return the code and the files of the working folder that may go, whatever they are called."""
    found: dict[str, Path] = {}
    for part in CODE:
        found |= _under(code_folder(), code_folder() / part)
    if folder.resolve() != code_folder().resolve():
        found |= {name: file for name, file in _files(folder).items() if name.split("/")[0] not in CODE}
    else:
        found |= _files(folder)
    lock = code_folder() / LOCK
    found |= {LOCK: lock} if lock.is_file() and LOCK not in found else {}
    return found


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


def _is_key(name: str) -> bool:
    return any(fnmatch(name.rpartition("/")[2].lower(), pattern) for pattern in KEYS)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
