"""Find and end processes that an earlier command started."""

import contextlib
from collections.abc import Sequence

import psutil


def marked(variable: str, prefix: str) -> list[psutil.Process]:
    """Return the processes whose environment variable starts with `prefix`, without their children."""
    found = {
        process.pid: process
        for process in psutil.process_iter(["environ", "ppid"])
        if (process.info["environ"] or {}).get(variable, "").startswith(prefix)
    }
    return [process for process in found.values() if process.info["ppid"] not in found]


def end(processes: Sequence[psutil.Process], grace_s: float) -> None:
    """Send processes SIGTERM; after at most `grace_s`, SIGKILL them and their descendants."""
    family = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            family += process.children(recursive=True)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(processes, timeout=grace_s)
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family, timeout=grace_s)
