"""Processes that another command started: find them again, and end them."""

import contextlib
from collections.abc import Sequence

import psutil

Known = tuple[int, float]
"""A process id and when its process began: the id alone may belong to another process by now."""
SAME_S = 1.0


def known(pid: int) -> Known:
    """Return what identifies a running process for ever."""
    return pid, psutil.Process(pid).create_time()


def find(wanted: Known) -> psutil.Process | None:
    """Return a known process if it still runs."""
    try:
        process = psutil.Process(wanted[0])
        same = abs(process.create_time() - wanted[1]) < SAME_S
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


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
