"""A real SQLite store shared by the tests, and a real MLflow server that can be stopped and started again."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmdiff_ray.tracking import store


@pytest.fixture(scope="session")
def uri(tmp_path_factory) -> str:
    """The address of an SQLite store, in a folder with a space in its name."""
    address = store.tracking_uri(None, tmp_path_factory.mktemp("the runs"))
    store.client(address)
    return address


@pytest.fixture(scope="session")
def client(uri):
    return store.client(uri)


@pytest.fixture(scope="session")
def experiment(uri) -> str:
    return store.get_or_create_experiment(uri, "tests")


@pytest.fixture
def run_id(client, experiment) -> str:
    return client.create_run(experiment, run_name="a run").info.run_id


@pytest.fixture
def dead_uri() -> str:
    """The address of a server that is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def mute_uri():
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class Server:
    """An `mlflow server` on loopback; its store, port and environment stay the same from start to start.

    artifacts, database: where it keeps them and all else, if not in the folder.
    """

    def __init__(self, folder: Path, port: int, artifacts: str = "", database: str = ""):
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        self._command += [
            "--workers",
            "1",
            "--backend-store-uri",
            database or f"sqlite:///{folder}/server.db",
        ]
        self._command += ["--artifacts-destination", artifacts or str(folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._environment = os.environ | quiet
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=self._environment,
        )
        seen, awaited = (
            "",
            ("Application startup complete", "Uvicorn running on"),
        )  # the latter: its port is open
        errors = self._process.stderr
        assert errors is not None
        for line in errors:
            seen += line
            if all(words in seen for words in awaited):
                threading.Thread(target=errors.read, daemon=True).start()  # a full pipe would stop the server
                return
        raise RuntimeError(f"the server ended:\n{seen}")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = Server(tmp_path_factory.mktemp("server"), port)
    running.start()
    yield running
    running.kill()
