"""Processes that were started before, by another command: found again for certain, and ended."""

import contextlib
import os
from collections.abc import Iterable, Sequence

import psutil

Known = tuple[int, float]
"""A process id and when its process began: the id alone may belong to another process by now."""
SAME_S = 1.0


def known(pid: int) -> Known:
    """Return what tells a running process for ever."""
    return pid, psutil.Process(pid).create_time()


def find(wanted: Known) -> psutil.Process | None:
    """Return a known process if it still runs."""
    try:
        process = psutil.Process(wanted[0])
        same = abs(process.create_time() - wanted[1]) < SAME_S
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Return what a process started, and what that started; nothing where it has ended."""
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def family(roots: Iterable[Known], variable: str, value: str) -> list[psutil.Process]:
    """Return the known processes, all that they started, and all that have the value in their environment.

    Some processes lose their environment (those that rename themselves), some their parents.
    """
    found: set[psutil.Process] = set()
    for root in roots:
        if process := find(root):
            found |= {process, *descendants(process)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(variable) == value:
                found.add(process)
    return [process for process in found if process.pid != os.getpid()]


def end(processes: Sequence[psutil.Process], patience_s: float) -> None:
    """Ask processes to end, and after a while make them. One whose id has passed on is left alone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=patience_s)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=patience_s)
