"""MLflow's page as the command serves it: it answers, and its processes end with it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import psutil
import pytest

from mmdiff_ray.cli import main


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_processes_of_the_page_end_with_the_command(finished, number):
    port = free_port()
    command = [sys.executable, "-m", "mmdiff_ray.cli", "ui", "--runs", finished.runs, "--port", str(port)]
    process = subprocess.Popen(
        command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        page = f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"
        assert process.stdout.readline() == f"MLflow: {page} (Ctrl-C ends it)\n"
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop the server
        deadline = time.monotonic() + 120
        while True:
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read().decode()
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.3)
        assert "MLflow" in page
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        sockets = [one for child in family for one in child.net_connections("inet") if one.status == "LISTEN"]
        assert {one.laddr.ip for one in sockets} == {"127.0.0.1"}
        process.send_signal(number)
        assert process.wait(30) == 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
    finally:
        process.kill()


def test_a_taken_port_is_an_error(finished, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "--runs", str(finished.runs), "--port", str(port)]) == 2
        assert f"--port {port} cannot be used (Address already in use); " in capsys.readouterr().err
