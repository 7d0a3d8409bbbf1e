"""The commands on submitted jobs: list them, look at one, read its output, stop it."""

import asyncio
import re
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mmdiff_ray.config import ConfigError, RunError, without_passwords
from mmdiff_ray.distributed.display import duration
from mmdiff_ray.distributed.job_server import Place, connect, find_place, server_errors
from mmdiff_ray.distributed.submit import STOP_S, STOP_VARIABLE
from mmdiff_ray.tracking.jobs import runs_of_job

POLL_S = 0.5
AGAIN_S = 5.0
SPARE_S = 30.0
EXIT = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 130}
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASS|CREDENTIAL", re.IGNORECASE)
"""What the name of a variable with a secret has in it."""
PASSWORD_IN_URI = re.compile(r"://[^/@]*:([^/@]+)@")
TOKEN_IN_URI = re.compile(r"://([^/@:\s]+)@")


def list_jobs(address: str | None, console: Console) -> int:
    """Print all jobs that were submitted to a cluster, the newest first."""
    place = find_place(address)
    client = connect(place)
    with server_errors(place):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    if not jobs:
        console.print(f"no jobs at {place} yet; mmdiff submit -- train CONFIG")
        return 0
    table = Table(box=SIMPLE, title=f"jobs at {place}", title_justify="left")
    for heading in ("job", "status", "began", "took", "command"):
        table.add_column(heading, overflow="fold")
    for job in sorted(jobs, key=lambda job: -(job.start_time or 0)):
        table.add_row(job.submission_id, job.status.value, _began(job), _took(job), _command(job))
    console.print(table)
    return 0


def show_job(address: str | None, job_id: str, console: Console) -> int:
    """Print what is known of a job, and its runs in MLflow where that answers."""
    place = find_place(address)
    client = connect(place)
    job = _info(client, place, job_id)
    lines = {"job": job_id, "status": job.status.value, "began": _began(job), "took": _took(job)}
    if job.driver_exit_code is not None:
        lines["exit code"] = str(job.driver_exit_code)
    lines["command"] = _command(job)
    if job.status.value == "FAILED":
        lines["reason"] = without_secrets(job.message or "", job).strip()
    for run in runs_of_job((job.metadata or {}).get("mmdiff.tracking_uri", ""), job_id):
        lines[f"run {run.name}"] = f"{run.status}, {run.page}"
    width = max(map(len, lines)) + 2
    for key, value in lines.items():
        console.print(f"{key:{width}}{value}", soft_wrap=True)
    return 0


def show_logs(address: str | None, job_id: str, follow: bool, console: Console) -> int:
    """Print a job's output; with `follow` until it ends, and return how it ended as an exit code."""
    place = find_place(address)
    client = connect(place)
    job = _info(client, place, job_id)
    if follow:
        return follow_job(client, place, job_id, console)
    with server_errors(place, job_id):
        console.out(without_secrets(client.get_job_logs(job_id), job), end="", highlight=False)
    return 0


def follow_job(client: Any, place: Place, job_id: str, console: Console) -> int:
    """Print a job's output as it comes. Interrupting this leaves the job alone."""
    try:
        job = _when(client, place, job_id, lambda status: status != "PENDING")
        job = _follow(client, place, job_id, job, console)
    except KeyboardInterrupt:
        console.print(f"\nthe job goes on; end it with: mmdiff jobs stop {job_id}")
        return 130
    except ConfigError as error:
        again = f"mmdiff jobs logs --follow {job_id}"
        raise RunError(f"{error}; the job goes on if its cluster does, see: {again}") from None
    console.print(f"{job_id}: {job.status.value} after {_took(job)}")
    return EXIT[job.status.value]


def stop_job(address: str | None, job_id: str, wait: bool, console: Console) -> int:
    """Ask a job to save a checkpoint and end; wait until it has."""
    place = find_place(address)
    client = connect(place)
    job = _info(client, place, job_id)
    if job.status.value in EXIT:
        console.print(f"{job_id} has ended already: {job.status.value}")
        return 0
    with server_errors(place, job_id):
        client.stop_job(job_id)
    limit_s = _stop_s(job)
    console.print(f"asked {job_id} to save and end; Ray kills it if that takes more than {limit_s:g} s")
    if not wait:
        return 0
    job = _when(client, place, job_id, lambda status: status in EXIT, limit_s + SPARE_S)
    console.print(f"{job_id}: {job.status.value}")
    return 0 if job.status.value in EXIT else 1


def stop_all(place: Place, console: Console) -> None:
    """Let every job of a cluster that is about to end save and end first."""
    client = connect(place)
    with server_errors(place):
        running = [job.submission_id for job in client.list_jobs() if job.status.value not in EXIT]
    for job_id in filter(None, running):
        stop_job(place.url, job_id, True, console)


def without_secrets(text: str, job: Any) -> str:
    """Return a text of Ray's without the secrets among a job's variables, which its errors may quote."""
    hidden = set()
    for name, value in _variables(job).items():
        hidden |= {value} if SECRET.search(name) else set(PASSWORD_IN_URI.findall(value))
        hidden |= {f"://{token}@" for token in TOKEN_IN_URI.findall(value)}  # may be a word, as a user's name
    for value in sorted(hidden - {""}, key=len, reverse=True):
        text = text.replace(value, "://***@" if value.startswith("://") else "***")
    return text


def _variables(job: Any) -> dict[str, str]:
    return (job.runtime_env or {}).get("env_vars") or {}


@dataclass
class _Output:
    """A job's output on the terminal: all of it once, however often it is read from its beginning."""

    job: Any
    console: Console
    shown: int = 0

    def show(self, text: str, start: int = 0) -> None:
        """Print what is new in a part of the output, which starts after so many characters."""
        new = text[max(0, self.shown - start) :]
        self.shown += len(new)
        self.console.out(without_secrets(new, self.job), end="", highlight=False)


def _follow(client: Any, place: Place, job_id: str, job: Any, console: Console) -> Any:
    """Print a job's output until it has ended, and return its facts then.

    Where the connection that sends the output breaks, or a proxy lets none through, the job's output is asked
    for and the connection is tried again, for as long as the job runs.
    """
    output, told = _Output(job, console), False
    while job.status.value not in EXIT:
        try:
            with server_errors(place, job_id):
                asyncio.run(_tail(client, job_id, output))
            pause_s = POLL_S
        except ConfigError as error:
            if not told:
                console.print(f"note: {error}; the output is asked for every {AGAIN_S:g} s", soft_wrap=True)
            told, pause_s = True, AGAIN_S
            _show_rest(client, place, job_id, output)
        time.sleep(pause_s)
        job = _info(client, place, job_id)
    _show_rest(client, place, job_id, output)
    return job


async def _tail(client: Any, job_id: str, output: _Output) -> None:
    start = 0
    async for text in client.tail_job_logs(job_id):
        output.show(text, start)
        start += len(text)


def _show_rest(client: Any, place: Place, job_id: str, output: _Output) -> None:
    with server_errors(place, job_id):
        output.show(client.get_job_logs(job_id))


def _info(client: Any, place: Place, job_id: str) -> Any:
    with server_errors(place, job_id):
        return client.get_job_info(job_id)


def _when(client: Any, place: Place, job_id: str, wanted: Any, limit_s: float = float("inf")) -> Any:
    """Return a job's facts once its status is a wanted one, or the time is over."""
    deadline = time.monotonic() + limit_s
    while True:
        job = _info(client, place, job_id)
        if wanted(job.status.value) or time.monotonic() > deadline:
            return job
        time.sleep(POLL_S)


def _stop_s(job: Any) -> float:
    return float(_variables(job).get(STOP_VARIABLE, STOP_S))


def _command(job: Any) -> str:
    return without_passwords((job.metadata or {}).get("mmdiff.command") or job.entrypoint)


def _began(job: Any) -> str:
    return f"{datetime.fromtimestamp(job.start_time / 1000):%Y-%m-%d %H:%M}" if job.start_time else ""


def _took(job: Any) -> str:
    if not job.start_time:
        return ""
    return duration((job.end_time or time.time() * 1000) / 1000 - job.start_time / 1000)
