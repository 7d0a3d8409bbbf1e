"""The origin of a run: revision of the code, versions of the packages, the submitted job."""

import contextlib
import getpass
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import mmdiff_ray

PACKAGES = ("mmdiff-ray", "torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")
JOB_TAG = "mmdiff.job_id"
JOB_VARIABLE = "MMDIFF_JOB_ID"
"""Environment variable with the id of the submitted job."""
REVISION_VARIABLE = "MMDIFF_REVISION"
"""Environment variable with the commit of a submitted job's code and the number of changed files."""


def tags(git_folder: str | Path | None = None) -> dict[str, str]:
    """Return the tags for a run's origin. git_folder: folder of the code; by default this package's."""
    found = {f"version.{name}": version for name, version in versions().items()}
    found |= {"mlflow.source.name": "mmdiff", "mlflow.user": _user()}
    # A submitted job's code lies outside any checkout on the cluster.
    commit, _, changed = os.environ.get(REVISION_VARIABLE, "").partition(" ")
    revision = (
        (commit, changed or 0) if commit else git_revision(git_folder or Path(mmdiff_ray.__file__).parent)
    )
    if revision:
        found |= {"mlflow.source.git.commit": revision[0], "git.changed_files": str(revision[1])}
    if job := os.environ.get(JOB_VARIABLE):
        found[JOB_TAG] = job
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a run's result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_revision(folder: str | Path) -> tuple[str, int] | None:
    """Return the commit of a folder's checkout and how many of its files differ from it.

    None outside a checkout, without git, before the first commit, and for a folder that the checkout does not
    track (an installed package inside a project's virtual environment).
    """
    commit, tracked = _git(folder, "rev-parse", "HEAD"), _git(folder, "ls-files", "--", ".")
    changed = _git(folder, "status", "--porcelain")
    return (commit.strip(), len(changed.splitlines())) if commit and tracked and changed is not None else None


def _git(folder: str | Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, in a container
        return "unknown"
