"""Jobs of a Ray cluster: list, show, follow, stop."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mmdiff_ray.config import ConfigError, RunError, without_passwords
from mmdiff_ray.distributed import local_cluster
from mmdiff_ray.distributed.display import duration
from mmdiff_ray.distributed.local_cluster import LocalCluster
from mmdiff_ray.tracking.queries import runs_of_job
from mmdiff_ray.tracking.store import ui_link

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
HOW_TO_TOKEN = "set RAY_AUTH_TOKEN_PATH to the file of the cluster's token, or RAY_AUTH_TOKEN to the token"
COMMAND_KEY, TRACKING_KEY, PAGE_KEY = "mmdiff.command", "mmdiff.tracking_uri", "mmdiff.mlflow"
"""Metadata keys of a job: its command, the tracking URI of its runs, their MLflow page."""
STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_S = 120
"""Time for a stopped job to save a checkpoint before Ray kills it. Ray's default is 3 s."""
POLL_S, MAX_POLL_S = 1.0, 10.0
SPARE_S = 30.0
EXIT_CODES = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 130}
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASS|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Server:
    """The job server of a cluster. source: what set its address. local: set if this folder started it."""

    url: str
    source: str
    local: LocalCluster | None = None

    def __str__(self) -> str:
        return f"{without_passwords(self.url)} ({self.source})"


def find_server(address: str | None) -> Server:
    """Return the job server at `--address`, else from the environment, else of this folder's cluster."""
    local = local_cluster.read()
    named = [("--address", address), *((name, os.environ.get(name)) for name in ADDRESSES)]
    named += [(str(local_cluster.STATE), local.address)] if local else []
    for source, url in named:
        if url and not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"{source} ({without_passwords(url)}) must be the cluster's dashboard, http://HEAD:8265; "
                "--address overrides the environment"
            )
        if url:
            url = url.rstrip("/")
            return Server(url, source, local if local and local.address == url else None)
    raise ConfigError(
        "no cluster: give --address http://HEAD:8265, set RAY_API_SERVER_ADDRESS, or start a cluster on this "
        "machine with: mmdiff cluster up"
    )


def connect(server: Server) -> Any:
    """Connect to a job server. Raises ConfigError if it does not answer or refuses the token."""
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    token = _token(server)
    headers = {"Authorization": f"Bearer {token}"} if token else None
    before = os.environ.get(ADDRESSES[0])
    os.environ[ADDRESSES[0]] = server.url  # Ray's client ignores its argument if this is set
    try:
        with server_errors(server):
            return JobSubmissionClient(server.url, headers=headers)
    finally:
        del os.environ[ADDRESSES[0]]
        if before is not None:
            os.environ[ADDRESSES[0]] = before


def _token(server: Server) -> str | None:
    """Return the token of the local cluster or of the environment. Ray itself reads ~/.ray/auth_token."""
    if server.local is None and (token := os.environ.get("RAY_AUTH_TOKEN")):
        return token.strip()
    path = server.local.token_path if server.local else os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return Path(path).expanduser().read_text(encoding="utf8").strip() if path else None
    except OSError as error:
        raise ConfigError(f"no token in {path}: {error.strerror}; {HOW_TO_TOKEN}") from None


@contextmanager
def server_errors(server: Server, job_id: str = "") -> Iterator[None]:
    """Turn errors of Ray's client in the block into ConfigErrors of one line."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        reason = "it requires a token" if "required" in str(error) else "it has another token"
        raise ConfigError(f"the cluster at {server} refused: {reason}; {HOW_TO_TOKEN}") from None
    except (ConnectionError, requests.exceptions.RequestException):
        fix = "start it: mmdiff cluster up" if server.local else "is its dashboard reachable from here?"
        raise ConfigError(f"no cluster answers at {server}; {fix}") from None
    except RuntimeError as error:
        if job_id and "does not exist" in str(error):
            raise ConfigError(f"no job {job_id!r} at {server}; see: mmdiff jobs list") from None
        first_line = str(error).strip().partition("\n")[0][:300]
        raise ConfigError(f"the cluster at {server} refused: {first_line}") from None


def list_jobs(address: str | None, console: Console) -> int:
    """Print the submitted jobs of a cluster, newest first."""
    server = find_server(address)
    client = connect(server)
    with server_errors(server):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    if not jobs:
        console.print(f"no jobs at {server}; submit one: mmdiff submit -- train CONFIG", soft_wrap=True)
        return 0
    table = Table(box=SIMPLE, title=f"jobs at {server}", title_justify="left")
    for heading in ("job", "status", "started", "duration", "command"):
        table.add_column(heading, overflow="fold")
    for job in sorted(jobs, key=lambda job: -(job.start_time or 0)):
        table.add_row(job.submission_id, job.status.value, _started(job), _duration(job), _command(job))
    console.print(table)
    return 0


def show_job(address: str | None, job_id: str, console: Console) -> int:
    """Print a job's status and, if MLflow answers, its runs."""
    server = find_server(address)
    job = _info(connect(server), server, job_id)
    lines = {"job": job_id, "status": job.status.value, "started": _started(job), "duration": _duration(job)}
    if job.driver_exit_code is not None:
        lines["exit code"] = str(job.driver_exit_code)
    lines["command"] = _command(job)
    if job.status.value == "FAILED":
        lines["reason"] = without_secrets(job.message or "", job).strip()
    uri = (job.metadata or {}).get(TRACKING_KEY, "")
    for run in [run.info for run in runs_of_job(uri, job_id)]:
        lines[f"run {run.run_name}"] = f"{run.status}, {ui_link(uri, run.experiment_id, run.run_id)}"
    width = max(map(len, lines)) + 2
    for key, value in lines.items():
        console.print(f"{key:{width}}{value}", soft_wrap=True)
    return 0


def show_logs(address: str | None, job_id: str, follow: bool, console: Console) -> int:
    """Print a job's output. With `follow`, print until the job ends and return its exit code.

    Ctrl-C stops printing; the job continues.
    """
    server = find_server(address)
    client, printed = connect(server), 0
    try:
        while True:
            polled_at = time.monotonic()
            job = _info(client, server, job_id)  # status first: if the job has ended, the output is complete
            with server_errors(server, job_id):
                text = client.get_job_logs(job_id)
            console.out(without_secrets(text[printed:], job), end="", highlight=False)
            printed = len(text)
            if not follow:
                return 0
            if job.status.is_terminal():
                break
            pause_s = 5 * (time.monotonic() - polled_at)  # every reply contains the whole output
            time.sleep(min(max(pause_s, POLL_S), MAX_POLL_S))
    except KeyboardInterrupt:
        console.print(f"\nthe job continues; stop it with: mmdiff jobs stop {job_id}")
        return 130
    except ConfigError as error:
        if not printed:
            raise
        again = f"mmdiff jobs logs --follow {job_id}"
        raise RunError(f"{error}; the job continues if its cluster runs, see: {again}") from None
    console.print(f"{job_id}: {job.status.value} after {_duration(job)}")
    return EXIT_CODES[job.status.value]


def stop_job(address: str | None, job_id: str, wait: bool, console: Console) -> int:
    """Request that a job saves a checkpoint and ends; with `wait`, wait until it has ended."""
    server = find_server(address)
    client = connect(server)
    job = _info(client, server, job_id)
    if job.status.is_terminal():
        console.print(f"{job_id} has already ended: {job.status.value}")
        return 0
    with server_errors(server, job_id):
        client.stop_job(job_id)
    limit_s = float(_variables(job).get(STOP_VARIABLE, STOP_S))
    console.print(f"{job_id} saves a checkpoint and ends; Ray kills it after {limit_s:g} s")
    deadline = time.monotonic() + limit_s + SPARE_S
    while wait and not job.status.is_terminal() and time.monotonic() < deadline:
        time.sleep(POLL_S)
        job = _info(client, server, job_id)
    if wait:
        console.print(f"{job_id}: {job.status.value}")
    return 0 if job.status.is_terminal() or not wait else 1


def stop_all(cluster: LocalCluster, console: Console) -> None:
    """Stop every job of a local cluster and wait until each has ended."""
    server = Server(cluster.address, str(local_cluster.STATE), cluster)
    client = connect(server)
    with server_errors(server):
        running = [job.submission_id for job in client.list_jobs() if not job.status.is_terminal()]
    for job_id in filter(None, running):
        stop_job(cluster.address, job_id, True, console)


def without_secrets(text: str, job: Any) -> str:
    """Mask the secrets among a job's environment variables in a text: Ray's errors may quote them."""
    secrets = [value for name, value in _variables(job).items() if value and SECRET.search(name)]
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "***")
    return without_passwords(text)


def _info(client: Any, server: Server, job_id: str) -> Any:
    with server_errors(server, job_id):
        return client.get_job_info(job_id)


def _variables(job: Any) -> dict[str, str]:
    return (job.runtime_env or {}).get("env_vars") or {}


def _command(job: Any) -> str:
    return without_passwords((job.metadata or {}).get(COMMAND_KEY) or job.entrypoint)


def _started(job: Any) -> str:
    return f"{datetime.fromtimestamp(job.start_time / 1000):%Y-%m-%d %H:%M}" if job.start_time else ""


def _duration(job: Any) -> str:
    end_s = job.end_time / 1000 if job.end_time else time.time()
    return duration(end_s - job.start_time / 1000) if job.start_time else ""
