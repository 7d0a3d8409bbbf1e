"""The whole way of a submitted job with real services: a cluster of three nodes, an MLflow server with a
database; shards, checkpoints and artifacts on an S3 server."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmdiff_ray.cli import main
from mmdiff_ray.datasets.build import build
from mmdiff_ray.distributed.jobs import connect, find_server
from mmdiff_ray.runs.job import read_run
from mmdiff_ray.tracking import queries, store
from tests import sprites as tiny
from tests.s3 import SECRET, s3_server
from tests.sweeps import tiny as tiny_sweep
from tests.tracking.conftest import Server

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
PLUGIN = "print('the plug-in is', __file__)\n"
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Services:
    """Where everything is. folder: from which commands are given; shared: a folder of the cluster; data: the
    shards on S3; runs: where runs may be kept there."""

    folder: Path
    shared: Path
    data: str
    runs: str
    tracking: str
    s3: Any
    environment: dict[str, str]

    def mmdiff(self, *words: str, **variables: str) -> tuple[int, str]:
        """Run a command as a person does and return its exit code and all that it said."""
        done = subprocess.run(
            [sys.executable, "-m", "mmdiff_ray.cli", *words],
            cwd=self.folder,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert SECRET not in done.stdout
        return done.returncode, done.stdout

    def submit(self, *words: str) -> str:
        """Return the id of a submitted job."""
        code, said = self.mmdiff("submit", *words)
        assert code == 0, said
        found = re.search(r"^job +(\S+), at http", said, re.MULTILINE)
        assert found, said
        return found[1]

    def there(self, prefix: str) -> set[str]:
        """Return what begins with a prefix in the bucket, without the prefix."""
        listed = self.s3.list_objects_v2(Bucket="toys", Prefix=prefix).get("Contents", [])
        return {entry["Key"].removeprefix(prefix) for entry in listed}

    def run_of(self, job: str) -> Any:
        """Return the one run that MLflow has of a job."""
        (found,) = queries.runs_of_job(self.tracking, job)
        return found


@contextmanager
def mlflow_server(folder: Path, endpoint: str) -> Iterator[str]:
    """Run MLflow with a database in a folder and artifacts on S3, which it alone knows; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{endpoint}")
        server = Server(folder, port, artifacts="s3://toys/artifacts")
    server.start()
    try:
        yield server.uri
    finally:
        server.kill()


@pytest.fixture(scope="module")
def services(tmp_path_factory) -> Iterator[Services]:
    """Start all services, the cluster as the README says; write a plug-in, and a config that needs it."""
    import boto3

    folder, shared = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as endpoint:
        s3 = boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1")
        s3.create_bucket(Bucket="toys")
        data, runs = (
            f"s3://toys/{name}?scheme=http&region=us-east-1&endpoint_override={endpoint}"
            for name in ("sprites", "runs")
        )
        build("sprites", data, {"count": 200, "size": 16}, workers=0, progress=False)
        with mlflow_server(tmp_path_factory.mktemp("server"), endpoint) as tracking:
            around = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": tracking}
            around["MMDIFF_CACHE"] = str(tmp_path_factory.mktemp("cache"))
            here = Services(folder, shared, data, runs, tracking, s3, os.environ | around)
            (folder / "my_plugin.py").write_text(PLUGIN)
            file = tiny.write_config(folder, data, "runs=runs", "workers.data_workers=1")
            file.write_text(file.read_text().replace("plugins: []", "plugins: [my_plugin]"))
            try:
                code, said = here.mmdiff("cluster", "up", "--workers", "2", "--cpus", "3")
                assert code == 0 and "mmdiff submit -- train" in said, said
                yield here
            finally:
                assert here.mmdiff("cluster", "down")[0] == 0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Return what a condition says once it holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not (said := condition()):
        assert time.monotonic() < deadline, f"no {what} within {DEADLINE_S:g} s"
        time.sleep(1.0)
    return said


def last_checkpoint(folder: Path) -> int:
    """Return after how many samples the last complete checkpoint of a run is; 0 where there is none."""
    found = (folder / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in found if path.name.isdigit()), default=0)


def test_job_trains_by_the_code_that_was_sent_with_all_it_reads_and_makes_in_s3_and_its_run_in_mlflow(
    services, monkeypatch
):
    monkeypatch.chdir(services.folder)
    words = ["--folder", str(services.shared), "--num-workers", "2", "--env", f"MY_SECRET={SECRET}"]
    job = services.submit(*words, "--", "train", "tiny.yaml", f"runs={services.runs}")
    assert job.startswith("tiny-")

    code, said = services.mmdiff("jobs", "logs", "--follow", job)
    assert code == 0, said
    assert said.splitlines()[-1].startswith(f"{job}: SUCCEEDED")
    assert "training on 2 workers" in said
    assert re.search(r"the plug-in is /\S*/working_dir_files/_ray_pkg_\w+/my_plugin.py", said)

    run = services.run_of(job)
    assert (run.info.status, run.data.params["workers.count"]) == ("FINISHED", "2")
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    kept = {item.path for item in store.client(services.tracking).list_artifacts(run.info.run_id)}
    assert "config.yaml" in kept
    assert any(
        name.endswith(f"{run.info.run_id}/artifacts/config.yaml") for name in services.there("artifacts/")
    )
    made = services.there("runs/tiny/")
    assert {"run.json", "config.yaml", "evaluation.json", "export/facts.json"} <= made
    samples = int(run.data.params["train.samples"])
    assert f"checkpoints/{samples:012d}/state.json" in made
    assert not (services.shared / "runs").exists()

    code, said = services.mmdiff("sample", "tiny", "--runs", services.runs, "--num", "2", "--out", "drawn")
    assert code == 0, said
    assert list((services.folder / "drawn").rglob("*.png"))

    code, said = services.mmdiff("jobs", "status", job)
    assert code == 0 and "SUCCEEDED" in said and f"runs/{run.info.run_id}" in said
    code, said = services.mmdiff("jobs", "list")
    assert code == 0 and job in said
    metadata = connect(find_server(None)).get_job_info(job).metadata
    assert metadata["mmdiff.command"].startswith("train tiny.yaml") and SECRET not in str(metadata)
    assert metadata["mmdiff.mlflow"].startswith(services.tracking)
    assert job in metadata["mmdiff.mlflow"] and "workflowType=machine_learning" in metadata["mmdiff.mlflow"]


@pytest.mark.faults
def test_stopped_job_keeps_a_checkpoint_closes_its_run_and_goes_on_by_another_job(services, monkeypatch):
    monkeypatch.chdir(services.folder)
    words = ["train.samples=10000000", "evaluate.evaluators=[]", "checkpoint.every_samples=100000"]
    job = services.submit("--name", "long", "--num-workers", "1", "--", "train", "tiny.yaml", *words)
    client = connect(find_server(None))
    until(lambda: "samples " in client.get_job_logs(job), "progress")
    folder = services.folder / "runs" / "tiny"
    assert last_checkpoint(folder) == 0

    code, said = services.mmdiff("jobs", "stop", job)
    assert code == 0 and said.splitlines()[-1] == f"{job}: STOPPED"
    assert "stopped with a checkpoint" in client.get_job_logs(job)
    reached = last_checkpoint(folder)
    assert reached > 0 and read_run(folder)["state"] == "stopped"
    stopped = services.run_of(job)
    assert stopped.info.status == "KILLED"
    assert services.mmdiff("jobs", "stop", job) == (0, f"{job} has already ended: STOPPED\n")

    end = reached + 64
    code, said = services.mmdiff(
        "submit",
        "--follow",
        "--",
        "train",
        "--resume",
        "tiny",
        f"train.samples={end}",
        "train.decay=constant",
    )
    assert code == 0, said
    assert f"from the checkpoint at {reached:,} samples" in said
    assert last_checkpoint(folder) == end
    found = re.search(r"^job +(\S+), at http", said, re.MULTILINE)
    assert found and found[1] != job
    assert services.run_of(found[1]).info.run_id == stopped.info.run_id
    assert services.run_of(found[1]).info.status == "FINISHED"


def test_sweep_runs_as_a_job_with_all_it_makes_in_s3_and_its_report_is_made_by_anyone_from_mlflow_alone(
    services, tmp_path, monkeypatch
):
    monkeypatch.chdir(services.folder)
    (services.folder / "searches").mkdir()
    budget = {"trials": 2, "samples": 32, "reports": 2}
    file = tiny_sweep.write(
        services.folder / "searches", services.data, budget=budget, scheduler__name="fifo", base__runs="runs"
    )  # no trial is stopped before its end, whichever reports first
    plain = yaml.safe_load(file.read_text())
    base = services.folder / "searches" / "base.yaml"  # is not over there
    base.write_text(yaml.safe_dump(plain["base"]))
    file.write_text(yaml.safe_dump({**plain, "base": "searches/base.yaml"}))
    job = services.submit("--", "sweep", "searches/tiny.yaml", "--runs", services.runs)
    code, said = services.mmdiff("jobs", "logs", "--follow", job)
    assert code == 0, said
    assert "up to 2 trials of 32 samples" in said and "Best: trial" in said

    runs = {run.info.run_name: run.info for run in queries.runs_of_job(services.tracking, job)}
    assert len(runs) == 1 + 2 and {run.status for run in runs.values()} == {"FINISHED"}
    parent = queries.find_run(services.tracking, runs["tiny"].run_id)
    children = queries.children(services.tracking, parent)
    assert {child.info.run_id for child in children} | {parent.info.run_id} == {
        run.run_id for run in runs.values()
    }
    assert all("eval/shape/head_nll" in child.data.metrics for child in children)
    kept = services.there("runs/sweeps/tiny/")
    assert {f"trials/{n:04d}/checkpoints/{32:012d}/state.json" for n in range(2)} <= kept
    assert {f"trials/{n:04d}/{name}" for n in range(2) for name in ("trial.json", "run.json")} <= kept
    assert not (services.folder / "runs" / "sweeps").exists()

    no_keys = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}  # artifacts come through the server
    elsewhere = tmp_path / "runs"
    code, again = services.mmdiff("sweep", "report", "tiny", "--runs", str(elsewhere), **no_keys)
    assert code == 0, again
    made = elsewhere / "sweeps" / "tiny" / "report"
    there = services.s3.get_object(Bucket="toys", Key="runs/sweeps/tiny/report/results.json")["Body"].read()
    assert (made / "results.json").read_bytes() == there
    names = {file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file()}
    assert {f"report/{name}" for name in names} | {"report/files.json"} == {
        name for name in kept if name.startswith("report/")
    }


def test_mistakes_are_one_line_with_what_to_do(services, monkeypatch, capsys):
    monkeypatch.chdir(services.folder)
    elsewhere = [
        "--address",
        find_server(None).url.replace("127.0.0.1", "localhost"),
    ]  # no token is known for
    for words, message in (
        (["status", "nothing"], "no job 'nothing' at"),
        (["logs", "--follow", "nothing"], "no job 'nothing' at"),
        (["stop", "nothing"], "no job 'nothing' at"),
    ):
        assert main(["jobs", *words]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1
    code, said = services.mmdiff("jobs", "list", *elsewhere)  # a process that Ray gave no token before
    assert code == 2 and "it requires a token; set RAY_AUTH_TOKEN_PATH" in said
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert main(["jobs", "list", *elsewhere]) == 2
    assert "it has another token; set RAY_AUTH_TOKEN_PATH" in capsys.readouterr().err
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(services.folder / ".cluster" / "token"))
    assert main(["jobs", "list", *elsewhere]) == 0


def test_failed_job_has_its_reason_and_exit_code(services):
    code, said = services.mmdiff("submit", "--follow", "--", "evaluate", "nothing")
    assert code == 1 and "no run 'nothing' in runs/" in said
    job = re.search(r"^job +(\S+), at http", said, re.MULTILINE)[1]  # type: ignore[index]
    code, said = services.mmdiff("jobs", "status", job)
    assert code == 0 and "FAILED" in said and "exit code  2" in said and "no run 'nothing'" in said
