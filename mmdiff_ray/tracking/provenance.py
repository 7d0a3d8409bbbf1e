"""What made a run: the revision of the code and the versions of what it stands on."""

import getpass
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import mmdiff_ray
from mmdiff_ray.tracking.jobs import JOB_TAG, JOB_VARIABLE, REVISION_VARIABLE

PACKAGES = ("mmdiff-ray", "torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")


def tags(git_folder: str | Path | None = None) -> dict[str, str]:
    """Return the tags of a run that say where it comes from. git_folder: of the code, else this package's."""
    found = {f"version.{name}": version for name, version in versions().items()}
    found |= {"mlflow.source.name": "mmdiff", "mlflow.user": _user()}
    if revision := _sent_revision() or git_revision(git_folder or Path(mmdiff_ray.__file__).parent):
        found |= {"mlflow.source.git.commit": revision[0], "git.changed_files": str(revision[1])}
    if job := os.environ.get(JOB_VARIABLE):
        found[JOB_TAG] = job
    return found


def _sent_revision() -> tuple[str, int] | None:
    """Return the revision of a submitted job's code, which lies outside any checkout on the cluster."""
    commit, _, changed = os.environ.get(REVISION_VARIABLE, "").partition(" ")
    return (commit, int(changed or 0)) if commit else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide a run's result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: str | Path) -> tuple[str, int] | None:
    """Return the commit that a folder's files are checked out from, and how many files differ from it.

    None outside a checkout, without git, before the first commit, and where the folder is not part of the
    checkout around it (an installed package inside a project's virtual environment).
    """
    revision = _git(folder, "rev-parse", "HEAD")
    tracked = _git(folder, "ls-files", "--", ".")
    changed = _git(folder, "status", "--porcelain")
    if not revision or not tracked or changed is None:
        return None
    return revision.strip(), len(changed.splitlines())


def _git(folder: str | Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
