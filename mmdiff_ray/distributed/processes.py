"""Processes that another command started: find them again, and end them."""

import contextlib
from collections.abc import Sequence

import psutil


def marked(variable: str, prefix: str) -> list[psutil.Process]:
    """Return the processes with a variable whose value begins so, without those that one of them started."""
    found = {
        process.pid: process
        for process in psutil.process_iter(["environ", "ppid"])
        if (process.info["environ"] or {}).get(variable, "").startswith(prefix)
    }
    return [process for process in found.values() if process.info["ppid"] not in found]


def end(processes: Sequence[psutil.Process], patience_s: float) -> None:
    """Send processes SIGTERM, and after a while SIGKILL to what is left of them and their descendants."""
    family = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            family += process.children(recursive=True)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(processes, timeout=patience_s)
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family, timeout=patience_s)
