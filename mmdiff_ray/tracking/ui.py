"""Open MLflow's page on the runs of a store."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmdiff_ray.config import ConfigError
from mmdiff_ray.tracking.links import link, where_to_look
from mmdiff_ray.tracking.store import SQLITE, client, sqlite_file, tracking_uri

ENDING_S = 5.0


def serve(runs: str | Path, host: str, port: int) -> int:
    """Serve MLflow's page until interrupted; return its exit code, 0 where it was asked to end.

    All of the server's processes end with this one. Raises ConfigError where there is nothing yet, and for a
    port that is taken.
    """
    uri = tracking_uri(None, runs)
    if not uri.startswith(SQLITE):
        print(f"the runs are on a server: open {where_to_look(uri)}")
        return 0
    if not sqlite_file(uri).is_file():
        raise ConfigError(f"no runs in {runs}/ yet; make some with: mmdiff train pipelines/configs/demo.yaml")
    _check_free(host, port)
    mlflow = client(uri)  # brings an older database up to date before a server with several workers opens it
    found = [one.experiment_id for one in mlflow.search_experiments(filter_string="name != 'Default'")]
    only = found[0] if len(found) == 1 else ""
    print(f"MLflow: {link(f'http://{host}:{port}', only)} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", host]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--workers", "1"],
        start_new_session=True,  # it ends when we say so, all of it
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        _end(server)
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port} cannot be used ({error.strerror}); try another --port"
            ) from None


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _end(server: subprocess.Popen) -> None:  # type: ignore[type-arg]
    """End a server's whole session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        try:
            server.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            continue
