"""Checks that this machine can start a Ray cluster: a short session path and enough shared memory."""

import os
import pwd
import shutil
import sys
from pathlib import Path

from mmdiff_ray.config import ConfigError

SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path of a Unix socket, in bytes."""
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_GIB = 1.0


def ray_folder() -> tuple[str, Path]:
    """Return Ray's session folder and the environment variable that sets it ("" for the default)."""
    for name in ("RAY_TMPDIR", "TMPDIR") if sys.platform.startswith("linux") else ("RAY_TMPDIR",):
        if name in os.environ:
            return name, Path(os.environ[name], "ray").absolute()
    return "", Path("/tmp/ray")


def check_ray_folder() -> Path:
    """Return Ray's session folder. Raises ConfigError if it is not writable or its socket paths too long."""
    variable, folder = ray_folder()
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    excess = len(os.fsencode(folder / session / "sockets" / "plasma_store")) - SOCKET_BYTES
    if excess > 0:
        raise ConfigError(
            f"{variable} ({folder.parent}) is {excess} bytes too long for Ray's sockets, whose paths have at "
            f"most {SOCKET_BYTES}; set RAY_TMPDIR to a shorter folder, such as /tmp"
        )
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{existing}, Ray's session folder, is not writable: it belongs to {_owner(existing)}; set "
            f"RAY_TMPDIR to a folder of yours, such as /tmp/{os.getuid()}"
        )
    return folder


def lack_of_shared_memory() -> str:
    """Return a message if shared memory is too small for Ray, else ""."""
    if not SHARED_MEMORY.is_dir():
        return ""
    free = shutil.disk_usage(SHARED_MEMORY).free / 2**30
    if free > LEAST_SHARED_GIB:
        return ""
    return (
        f"{free:.1f} GiB free in {SHARED_MEMORY}: Ray stores batches on disk, which is slow; give the "
        "container more, e.g. docker run --shm-size=4g"
    )


def _owner(path: Path) -> str:
    uid = path.stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
