"""Which cluster is asked, what its answers look like, and that no secret is printed."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmdiff_ray.cli import main
from mmdiff_ray.config import ConfigError
from mmdiff_ray.distributed import jobs
from mmdiff_ray.distributed.jobs import Server, connect, find_server, without_secrets
from mmdiff_ray.tracking.queries import page_of_job, runs_of_job

pytestmark = pytest.mark.usefixtures("nothing_around")
SECRET = "a-very-long-secret"


def test_address_comes_from_the_option_else_the_environment_else_the_folder(monkeypatch):
    with pytest.raises(ConfigError, match=r"no cluster: give --address .* mmdiff cluster up"):
        find_server(None)
    state = {
        "name": "x",
        "address": "http://127.0.0.1:7",
        "gcs": "",
        "token_path": "t",
        "temp": "",
        "workers": 1,
    }
    Path(".cluster").mkdir()
    Path(".cluster/cluster.json").write_text(json.dumps(state))
    assert find_server(None).url == "http://127.0.0.1:7" and find_server(None).local
    assert find_server("http://127.0.0.1:7/").local
    monkeypatch.setenv("RAY_ADDRESS", "http://b:1")
    assert find_server(None) == Server("http://b:1", "RAY_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://c:1")
    assert find_server(None) == Server("http://c:1", "RAY_API_SERVER_ADDRESS")
    assert find_server("http://d:1") == Server("http://d:1", "--address")
    for address in ("auto", "head:6379", "ray://head:10001"):
        with pytest.raises(ConfigError, match=rf"--address \({address}\) must be the cluster's dashboard"):
            find_server(address)


def test_cluster_that_does_not_answer_is_one_line_without_password_and_leaves_the_environment(
    dead_url, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    with pytest.raises(ConfigError, match=rf"no cluster answers at {dead_url} \(--address\)") as error:
        connect(Server(dead_url.replace("://", f"://me:{SECRET}@"), "--address"))
    assert SECRET not in str(error.value)
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:1" and "RAY_API_SERVER_ADDRESS" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/token")
    with pytest.raises(ConfigError, match=r"no token in /no/token: No such file"):
        connect(Server(dead_url, "--address"))


def test_text_of_ray_is_printed_without_secrets_but_with_all_else():
    variables = {
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "MY_TOKEN": f"{SECRET}-2",
        "EMPTY_KEY": "",
        "MLFLOW_TRACKING_URI": "https://me:pa55word@host/x",
        "MODE": "fast",
    }
    text = f"fast: {variables} at https://lone-token@host/x"
    shown = without_secrets(text, SimpleNamespace(runtime_env={"env_vars": variables}))
    assert not [secret for secret in (SECRET, "-2", "pa55word", "lone-token") if secret in shown]
    assert shown.startswith("fast: {") and shown.endswith("at https://host/x")
    assert without_secrets("text", SimpleNamespace(runtime_env=None)) == "text"


def test_mlflow_that_does_not_answer_is_a_search_without_password_and_no_runs(dead_url):
    uri = dead_url.replace("://", f"://me:{SECRET}@")
    search = "(search there: tags.`mmdiff.job_id` = 'demo-1a2b3c')"
    assert page_of_job(uri, "mmdiff", "demo-1a2b3c") == f"{dead_url} {search}"
    assert page_of_job("", "mmdiff", "demo-1a2b3c") == f"MLFLOW_TRACKING_URI of the cluster {search}"
    assert page_of_job("sqlite:///x.db", "mmdiff", "demo-1a2b3c").endswith(" mmdiff ui")
    assert runs_of_job(uri, "demo-1a2b3c") == runs_of_job("", "demo-1a2b3c") == []
    assert runs_of_job("sqlite:///nothing.db", "demo-1a2b3c") == [] and not Path("nothing.db").exists()


class JobServer(ThreadingHTTPServer):
    """A job server with one job whose output grows at each question. fails_at: the question it fails at."""

    daemon_threads = True
    parts = ("first\n", "second\n", "last\n")

    def __init__(self, fails_at: int | None) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked, self.fails_at = 0, fails_at


class Answer(BaseHTTPRequestHandler):
    server: JobServer

    def do_GET(self) -> None:
        if self.path.endswith("/version"):
            return self.answer(
                {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
            )
        if self.path.endswith("/logs"):
            return self.answer({"logs": "".join(self.server.parts[: self.server.asked])})
        self.server.asked += 1
        status = "RUNNING" if self.server.asked < len(self.server.parts) else "SUCCEEDED"
        job = {"type": "SUBMISSION", "entrypoint": "x", "submission_id": "demo-1", "status": status}
        job |= {"start_time": 1000, "end_time": 6000}
        self.answer(job, 503 if self.server.asked == self.server.fails_at else 200)

    def answer(self, values: dict, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(values).encode())

    def log_message(self, *words: object) -> None:
        pass


@contextlib.contextmanager
def job_server(fails_at: int | None = None) -> Iterator[str]:
    with JobServer(fails_at) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_output_is_printed_as_it_grows_and_once_until_the_job_ends(monkeypatch, capsys):
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    with job_server() as address:
        assert main(["jobs", "logs", "--follow", "--address", address, "demo-1"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "first",
            "second",
            "last",
            "demo-1: SUCCEEDED after 5 s",
        ]


def test_job_whose_server_fails_is_reported_to_continue(monkeypatch, capsys):
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    with job_server(fails_at=2) as address:
        assert main(["jobs", "logs", "--follow", "--address", address, "demo-1"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "first\n" and len(printed.err.splitlines()) == 1
    assert "the job continues if its cluster runs, see: mmdiff jobs logs --follow demo-1" in printed.err
