"""`mmdiff ui` opens MLflow for a folder of runs; `mmdiff sync` sends waiting records to MLflow."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys

from mmdiff_ray.cli.common import RUNS, Commands, command
from mmdiff_ray.config import ConfigError

END_S = 5.0


def add(commands: Commands) -> None:
    """Add `ui` and `sync`."""
    ui = command(commands, "ui", "open MLflow for the runs of this folder", "mmdiff ui --port 5000", _ui)
    ui.add_argument("--runs", default="runs", help=RUNS)
    ui.add_argument("--host", default="127.0.0.1")
    ui.add_argument("--port", type=int, default=5000)
    sync = command(
        commands,
        "sync",
        "send records to MLflow that were saved while it was unavailable",
        "mmdiff sync runs/demo",
        _sync,
    )
    sync.add_argument(
        "folder", nargs="?", default="runs", help="folder or URI of a run or of all runs (default: runs)"
    )


def _sync(given: argparse.Namespace) -> int:
    from mmdiff_ray.runs import records

    return records.sync(given.folder)


def _ui(given: argparse.Namespace) -> int:
    """Serve the MLflow UI until interrupted. Raises ConfigError if the port is in use or there is no run."""
    from mmdiff_ray.tracking.store import SQLITE, client, sqlite_file, tracking_uri, ui_link

    uri = tracking_uri(None, given.runs)
    if not uri.startswith(SQLITE):
        print(f"the runs are on a server: open {ui_link(uri)}")
        return 0
    if not sqlite_file(uri).is_file():
        raise ConfigError(
            f"no runs in {given.runs}/ yet; start with: mmdiff train pipelines/configs/demo.yaml"
        )
    check_free(given.host, given.port)
    store = client(uri)  # migrates an older database before the server's workers open it
    found = [one.experiment_id for one in store.search_experiments(filter_string="name != 'Default'")]
    page = ui_link(f"http://{given.host}:{given.port}", found[0] if len(found) == 1 else "")
    print(f"MLflow: {page} (Ctrl-C ends it)", flush=True)
    address = ["--host", given.host, "--port", str(given.port), "--workers", "1"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, *address],
        start_new_session=True,  # Ctrl-C reaches only this process, which then stops the server's processes
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, number)
                server.wait(END_S)


def check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fix = f"({error.strerror}); try another --port"
            raise ConfigError(f"--host {host} --port {port} cannot be used {fix}") from None
