"""Select the files of a job and pack them into the zip that Ray uploads as its working directory.

Ray's own packing follows symbolic links out of the folder, uploads keys, ignores `.gitignore` files of parent
folders, and applies `excludes` to `py_modules` too (`/data` would exclude `mmdiff_ray/data`).
"""

import argparse
import os
import shlex
import subprocess
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import mmdiff_ray
from mmdiff_ray.config import ConfigError, shipped
from mmdiff_ray.sweeps.spec import standalone_yaml

CODE = ("mmdiff_ray", "pipelines", "sweeps")
NOT_AT_TOP = (
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
"""Top-level folders that no job needs."""
NOWHERE = (".*", "__pycache__", "node_modules", "*.pyc", "*.egg-info")
KEYS = (
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "*.env"),
    *("credentials", "credentials.json", "*_credentials.json", "service[-_]account*.json"),
)
"""Patterns of files with keys and passwords."""
LIMIT_BYTES = 50 * 2**20


def code_folder() -> Path:
    """Return the folder that contains the imported package."""
    return Path(mmdiff_ray.__file__).parents[1]


def select(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files to send (name in the package -> file), and those withheld because they may be keys.

    Sends the imported code and the folder's files that git does not ignore (without git: all files). Omits
    hidden files, data, runs, virtual environments, and links to folders.
    """
    names = [*(_listed_by_git(folder) or _walk(folder, NOT_AT_TOP))]
    names = [name for name in names if name.split("/")[0] not in NOT_AT_TOP]
    found = {name: folder / name for name in names if (folder / name).is_file()}
    found |= {
        f"{part}/{name}": code_folder() / part / name for part in CODE for name in _walk(code_folder() / part)
    }
    environments = tuple(name.removesuffix("pyvenv.cfg") for name in found if name.endswith("/pyvenv.cfg"))
    found = {
        name: file
        for name, file in sorted(found.items())
        if not name.startswith(environments) and not any(_matches(part, NOWHERE) for part in name.split("/"))
    }
    keys = [name for name in found if _matches(name.rpartition("/")[2].lower(), KEYS)]
    return {name: file for name, file in found.items() if name not in keys}, keys


def with_named_files(
    words: Sequence[str], known: argparse.Namespace, folder: str | None, stage: Path
) -> tuple[str, dict[str, Path]]:
    """Return a job's shell command and the files that it refers to (name in the package -> file).

    The job starts in the package and changes to `folder`. `exec` replaces the shell, so that Ray's SIGTERM
    reaches the process. stage: a folder for files that must be rewritten.
    """
    shell, sent = [], {}
    for number, word in enumerate(words):
        prefix, file = "", Path(word)
        if word in getattr(known, "given", []):
            name, _, value = word.partition("=")
            prefix, file = f"{name}=", Path(value)
        elif known.command == "experiment" and word == known.name:
            file = file if word.endswith(".yaml") else Path(shipped.EXPERIMENTS) / f"{word}.yaml"
        elif word not in (getattr(known, "config", None), getattr(known, "file", None)):
            file = Path()
        if not file.is_file():
            shell.append(shlex.quote(word))
            continue
        path = Path(os.path.abspath(file))
        inside = path.is_relative_to(Path.cwd())
        place = path.relative_to(Path.cwd()).as_posix() if inside else f".sent/{number}/{path.name}"
        if known.command == "sweep":  # it may refer to files relative to this folder
            path = stage / "sweep.yaml"
            path.write_text(standalone_yaml(file), encoding="utf8")
        sent[place] = path
        shell.append(f'{shlex.quote(prefix) if prefix else ""}"$PWD"/{shlex.quote(place)}')
    change_folder = ["-C", shlex.quote(folder)] if folder else []
    return " ".join(["exec python -m mmdiff_ray.cli", *change_folder, *shell]), sent


def pack(files: Mapping[str, Path], target: Path) -> int:
    """Write files to a zip and return their total size in bytes. Raises ConfigError above LIMIT_BYTES."""
    sizes = {name: file.stat().st_size for name, file in files.items()}
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        raise ConfigError(
            f"{total / 2**20:.1f} MiB to send exceed {LIMIT_BYTES / 2**20:.0f} MiB; the largest files: "
            f"{', '.join(f'{name} ({sizes[name] / 2**20:.1f} MiB)' for name in largest)}; add what the "
            "cluster does not need to .gitignore, or submit from a smaller folder"
        )
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name, file in files.items():
            archive.write(file, name)
    return total


def _listed_by_git(folder: Path) -> list[str]:
    """Return the files that git tracks or would add; empty outside a repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [os.fsdecode(name) for name in result.stdout.split(b"\0") if name]


def _walk(root: Path, skip: Collection[str] = ()) -> Iterator[str]:
    """Yield the relative paths of a folder's files. skip: top-level folders to skip; they can be huge."""
    for path, folders, names in os.walk(root):
        unwanted = (*NOWHERE, *skip) if Path(path) == root else NOWHERE
        folders[:] = [name for name in folders if not _matches(name, unwanted)]
        yield from ((Path(path) / name).relative_to(root).as_posix() for name in names)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
