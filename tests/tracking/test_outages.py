"""A network that fails between a run and its MLflow server: nothing waits, nothing is lost, nothing twice."""

import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmdiff_ray.cli import main
from mmdiff_ray.distributed import launch, worker
from mmdiff_ray.distributed.display import Display
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.tracking import run_life, store, tracker
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.sender import LOCAL_TAG
from mmdiff_ray.tracking.tracker import GIVE_UP_FAILURES, Tracker
from tests import s3 as s3_server
from tests import sprites as tiny
from tests.faults import Faults, faulty
from tests.tracking.conftest import Server

pytestmark = pytest.mark.slow

REPORTS = [32, 64, 96, 128, 160]
"""After how many samples the tiny run reports."""
QUIET = ("evaluate.evaluators=[]", "tracking.system_metrics=false")


class Acting(Display):
    """Do something to the network when so many samples are shown; remember what was said."""

    def __init__(self, acts: dict[int, Callable[[], None]]) -> None:
        super().__init__()
        self.acts, self.said = acts, []  # type: ignore[var-annotated]

    def say(self, text: str) -> None:
        self.said.append(text)

    def show(self, event: dict[str, Any]) -> None:
        self.acts.get(event["progress"]["samples_seen"], lambda: None)()


@pytest.fixture
def network(server: Server) -> Iterator[Faults]:
    """The network before the MLflow server, without faults yet."""
    with faulty(int(server.uri.rpartition(":")[2])) as faults:
        yield faults


def prepared(data: str, runs: Path, network: Faults, *overrides: str) -> jobs.Job:
    config = tiny.config(data, f"runs={runs}", f"tracking.uri={network.url}", *QUIET, *overrides)
    return jobs.prepare(config, jobs.new_folder(config))


def recorded(server: Server, folder: Path) -> Any:
    """Return the only run that the server has of a run's folder, which it knows by its id or its local id."""
    client = store.client(server.uri)
    tag = f"tags.`mmdiff.run_folder` = '{folder}'"
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()], tag)
    run_id = jobs.read_run(folder)["run_id"]
    assert run_id in (run.info.run_id, run.data.tags.get(LOCAL_TAG))
    return run


def steps(server: Server, run: Any) -> list[int]:
    """Return the steps of all points of the loss, in the order of their times: a step sent twice is there
    twice."""
    points = store.client(server.uri).get_metric_history(run.info.run_id, "loss/total")
    return [point.step for point in sorted(points, key=lambda point: point.timestamp)]


def refuse(*_: object) -> None:
    raise AssertionError("something was started")


def test_run_that_needs_its_server_starts_nothing_while_it_is_away(
    sprites, network, tmp_path, monkeypatch, capsys
):
    import ray

    monkeypatch.setattr(ray, "init", refuse)
    network.down = True
    file = tiny.write_config(tmp_path, sprites, f"tracking.uri={network.url}", "workers.count=2")
    assert main(["train", str(file)]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"mmdiff: tracking.uri ({network.url}): the run cannot be recorded there: no server answers; start "
        "that server, set another tracking.uri, or record on disk for now: tracking.required=false\n"
    )
    assert not (tmp_path / "runs").exists()


def test_run_begun_without_its_server_arrives_as_one_run_by_sync(
    sprites, server, network, tmp_path, caplog, capsys
):
    network.down = True
    display = Acting({})
    job = prepared(sprites, tmp_path / "runs", network, "tracking.required=false")
    with caplog.at_level(logging.ERROR):
        folder = launch.train(job, display)
    assert jobs.read_run(folder)["state"] == "finished"
    assert (
        f"MLflow at {network.url} does not answer; records are kept in {folder / 'tracking'}" in display.said
    )
    assert not any("Retrying" in line for line in display.said), "the end does not wait"
    assert display.said[-1].endswith(f"records wait for MLflow; send them with: mmdiff sync {folder}")
    assert main(["sync", str(folder)]) == 1
    assert "records sent" in capsys.readouterr().out

    network.down = False
    for said in ("all records are in MLflow", "all records are in MLflow"):
        assert main(["sync", str(tmp_path)]) == 0
        assert said in capsys.readouterr().out
    run = recorded(server, folder)
    assert run.info.status == "FINISHED" and run.data.params["train.samples"] == "160"
    assert steps(server, run) == REPORTS
    assert len(run.inputs.dataset_inputs) == 1
    kept = {item.path for item in store.client(server.uri).list_artifacts(run.info.run_id)}
    assert "config.yaml" in kept


def test_run_begun_without_its_server_goes_on_in_it_as_the_same_run(sprites, server, network, tmp_path):
    network.down = True
    first = prepared(sprites, tmp_path / "runs", network, "tracking.required=false")
    folder = launch.train(first, Acting({}))
    network.down = False
    longer = ["train.samples=224", "train.decay=constant"]
    launch.resume(jobs.load_job(folder, longer), Acting({}))
    run = recorded(server, folder)
    assert run.info.status == "FINISHED" and steps(server, run) == [*REPORTS, 192, 224]


def test_server_that_goes_away_in_mid_run_stops_nothing_and_gets_everything_once_it_is_back(
    sprites, server, network, tmp_path
):
    def down() -> None:
        network.down = True

    def up() -> None:
        network.down = False

    display = Acting({64: down, 128: up})
    folder = launch.train(prepared(sprites, tmp_path / "runs", network), display)
    assert jobs.read_run(folder)["state"] == "finished"
    assert not any("wait" in line for line in display.said)
    run = recorded(server, folder)
    assert run.info.status == "FINISHED" and steps(server, run) == REPORTS
    assert Log(folder / "tracking").waiting == 0


def test_training_takes_all_its_steps_while_the_server_holds_every_request(
    sprites, server, network, tmp_path
):
    found: list[list[int]] = []

    def hold() -> None:
        network.held = True

    def let_go() -> None:
        found.append(steps(server, recorded(server, folder)))
        network.held = False

    job = prepared(sprites, tmp_path / "runs", network)
    folder = job.folder
    launch.train(job, Acting({32: hold, 160: let_go}))
    assert found and len(found[0]) < 2, "requests were not held"
    assert steps(server, recorded(server, folder)) == REPORTS


def test_a_run_that_was_deleted_in_mlflow_is_reported_before_it_trains_and_can_have_a_new_one(
    sprites, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    file = tiny.write_config(tmp_path, sprites, *QUIET, "workers.count=0")
    assert main(["train", str(file)]) == 0
    folder = tmp_path / "runs" / "tiny"
    facts = jobs.read_run(folder)
    client = store.client(facts["tracking_uri"])
    client.delete_run(facts["run_id"])
    resume = ["train", "--resume", str(folder), "train.samples=224", "train.decay=constant"]
    capsys.readouterr()

    monkeypatch.setattr(launch, "work", refuse)
    assert main(resume) == 2
    assert capsys.readouterr().err == (
        f"mmdiff: run {facts['run_id']} was deleted in MLflow at {facts['tracking_uri']}; restore it: "
        f"mlflow runs restore --run-id {facts['run_id']}, or record it in a new MLflow run: "
        "--new-mlflow-run\n"
    )
    monkeypatch.undo()
    assert main([*resume, "--new-mlflow-run"]) == 0
    new = jobs.read_run(folder)["run_id"]
    points = client.get_metric_history(new, "loss/total")
    assert [point.step for point in points] == [*REPORTS, 192, 224], "the old metrics are in it, too"
    assert client.get_run(new).info.status == "FINISHED" and new != facts["run_id"]
    assert client.get_run(new).data.params["train.samples"] == "224"
    assert not (folder / "tracking" / "refused.jsonl").exists()


# --- away when a run ends ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_store_missed(monkeypatch):
    """Let no test know what others have waited for."""
    monkeypatch.setattr(tracker, "_unreachable", set())


def comes_back(monkeypatch, network: Faults, failures: int) -> None:
    """Bring the network back once those that close have tried so often."""
    note, seen = Tracker._note, []

    def counted(self: Tracker, problem: Exception | None) -> None:
        note(self, problem)
        if problem and self._flushing:
            seen.append(problem)
            network.down = network.down and len(seen) < failures

    monkeypatch.setattr(Tracker, "_note", counted)


def typed(monkeypatch, network: Faults, *words: str) -> tuple[int, list[str]]:
    """Type a command that loses the network at its last report; return its exit code and what was said."""

    def down() -> None:
        network.down = True

    display = Acting({REPORTS[-1]: down})
    monkeypatch.setattr("mmdiff_ray.cli.training.Display", lambda console: display)
    return main(words), display.said


def test_the_end_waits_by_time_for_a_store_that_is_away_and_says_so_once(
    server, network, tmp_path, monkeypatch
):
    run_id = run_life.start_run(network.url, "ends", "x", tmp_path, {}, "name: x\n")
    network.down, said = True, []
    comes_back(monkeypatch, network, GIVE_UP_FAILURES + 1)
    assert run_life.end_run(network.url, run_id, "FINISHED", tmp_path, say=said.append) == 0
    (line,) = said
    assert line.startswith(f"MLflow at {network.url}: ") and "; 1 records wait. Retrying until " in line
    assert f"keeps them in {tmp_path}" in line
    assert store.client(server.uri).get_run(run_id).info.status == "FINISHED"


def test_a_second_end_in_a_process_does_not_wait_as_long_again(network, tmp_path, monkeypatch):
    run_id = run_life.start_run(network.url, "ends", "x", tmp_path, {}, "name: x\n")
    monkeypatch.setattr(tracker, "SHORT_WAIT_S", 0.2)
    network.down = True
    assert run_life.end_run(network.url, run_id, "FINISHED", tmp_path, timeout_s=0.2) == 1
    begun = time.monotonic()
    assert run_life.end_run(network.url, run_id, "FINISHED", tmp_path) == 2
    assert time.monotonic() - begun < tracker.END_WAIT_S / 2
    network.down = False
    assert run_life.end_run(network.url, run_id, "FINISHED", tmp_path, timeout_s=60) == 0
    assert not tracker._unreachable


def test_ctrl_c_ends_the_wait_and_the_records_stay(network, tmp_path):
    run_id = run_life.start_run(network.url, "ends", "x", tmp_path, {}, "name: x\n")
    network.down = True

    def interrupt(_: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_life.end_run(network.url, run_id, "FINISHED", tmp_path, say=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert Log(tmp_path).waiting == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_is_away_for_seconds_at_the_end_gets_everything(
    sprites, server, network, tmp_path, monkeypatch, workers
):
    comes_back(monkeypatch, network, GIVE_UP_FAILURES * (1 if workers else 2) + 1)
    file = tiny.write_config(
        tmp_path, sprites, f"tracking.uri={network.url}", *QUIET, f"workers.count={workers}"
    )
    code, said = typed(monkeypatch, network, "train", str(file))
    assert code == 0 and sum("Retrying until" in line for line in said) == 1
    (folder,) = (tmp_path / "runs").iterdir()
    run = recorded(server, folder)
    assert run.info.status == "FINISHED" and steps(server, run) == REPORTS


def test_a_server_that_does_not_come_back_fails_the_command_and_gets_everything_by_sync(
    sprites, server, network, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tracker, "END_WAIT_S", 0.5)
    file = tiny.write_config(tmp_path, sprites, f"tracking.uri={network.url}", *QUIET, "workers.count=0")
    assert typed(monkeypatch, network, "train", str(file))[0] == 1
    (folder,) = (tmp_path / "runs").iterdir()
    said = capsys.readouterr().out
    assert f"in {folder / 'tracking'}: {Log(folder / 'tracking').waiting} records wait for MLflow; " in said
    assert f"send them with: mmdiff sync {folder}\n" in said
    assert main(["train", "--resume", str(folder)]) == 1, "it is finished, and not recorded"

    network.down = False
    assert main(["sync", str(folder)]) == 0
    run = recorded(server, folder)
    assert run.info.status == "FINISHED" and steps(server, run) == REPORTS
    assert main(["train", "--resume", str(folder)]) == 0


@pytest.mark.parametrize("sender", ["sync", "sync of all", "next start"])
def test_records_of_a_run_in_storage_outlive_the_machine_that_made_them(
    sprites, server, network, tmp_path, monkeypatch, capsys, sender
):
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tracker, "END_WAIT_S", 0.5)
    monkeypatch.setattr(worker, "HAND_OVER_S", 0.5)
    runs = f"file://{tmp_path}/storage"
    file = tiny.write_config(
        tmp_path, sprites, f"tracking.uri={network.url}", *QUIET, "workers.count=0", f"runs={runs}"
    )
    assert typed(monkeypatch, network, "train", str(file))[0] == 1
    uri = f"{runs}/tiny"
    said = capsys.readouterr().out
    assert f"in {uri}/records: " in said and f"send them with: mmdiff sync {uri}\n" in said
    shutil.rmtree(tmp_path / "cache")

    network.down = False
    words = {"sync": ["sync", uri], "sync of all": ["sync", runs], "next start": ["train", "--resume", uri]}
    assert main(words[sender]) == 0
    assert not list((tmp_path / "storage" / "tiny").glob("records/*"))
    client = store.client(server.uri)
    run = client.get_run(jobs.read_run(tmp_path / "storage" / "tiny")["run_id"])
    assert run.info.status == "FINISHED" and steps(server, run) == REPORTS


FAULTS = {
    "unavailable": {"fail_next": 2},
    "cut in the middle of requests": {"cut_after": 700},
    "lost: run made": {"lose_answer": b"/runs/create"},
    "lost: metrics stored": {"lose_answer": b"/log-batch"},
    "lost: file stored": {"lose_answer": b"PUT "},
    "lost: model made": {"lose_answer": b"/logged-models "},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_a_fault_hit_is_sent_again_and_stored_once(server, network, tmp_path, fault):
    for key, value in fault.items():
        setattr(network, key, value)
    run_id = run_life.start_run(
        network.url, f"faults-{tmp_path.name}", "x", tmp_path, {"seed": 1}, "name: x\n", required=False
    )
    tracker = Tracker(network.url, run_id, tmp_path)
    for step in range(100):
        tracker.metrics({"loss": step}, step)
    tracker.text("hello " * 1000, "note.txt")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MLmodel").write_text("flavors: {}\n")
    tracker.model(tmp_path / "model", "model", 100)
    if "cut_after" in fault:
        assert tracker.flush(20) and network.cut
        network.cut_after = None
    assert tracker.close(60) == 0
    assert network.lose_answer is None and network.fail_next == 0, "the fault hit nothing"

    client = store.client(server.uri)
    experiment = client.get_experiment_by_name(f"faults-{tmp_path.name}").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.data.params == {"seed": "1"}
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(step, step) for step in range(100)]
    note = client.download_artifacts(run.info.run_id, "note.txt", str(tmp_path))
    assert Path(note).read_text() == "hello " * 1000
    (model,) = client.search_logged_models([experiment])
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert not (tmp_path / "refused.jsonl").exists()


@pytest.mark.parametrize("fault", ["dead", "refusing", "cut", "slow"])
def test_artifacts_arrive_in_s3_behind_the_server_whatever_its_network_does(
    behind_s3, tmp_path, monkeypatch, fault
):
    server, network, s3 = behind_s3
    run_id = store.client(server.uri).create_run("0").info.run_id
    running = Tracker(server.uri, run_id, tmp_path / "tracking")
    file, whole = tmp_path / "model.bin", os.urandom(300_000)
    file.write_bytes(whole)
    seen = network.connections
    network.down = fault == "dead"
    network.fail_next = {"refusing": 12}.get(fault, 0)
    network.cut_after = {"cut": 100_000}.get(fault)
    network.delay_s = {"slow": 0.1}.get(fault, 0.0)
    running.artifact(file, fault)
    running.metrics({"loss": 1.0}, 1)
    if fault == "dead":
        assert running.flush(60, failures=1) > 0 and running.error
    elif fault == "cut":
        assert running.flush(60, failures=1) > 0 and network.cut > 0
    network.down, network.cut_after = False, None
    assert running.finish() == 0
    assert network.connections > seen and network.fail_next == 0, "the fault hit nothing"
    network.delay_s = 0.0
    kept = s3.get_object(Bucket="toys", Key=f"artifacts/0/{run_id}/artifacts/{fault}/model.bin")
    assert kept["Body"].read() == whole
    assert [point.step for point in store.client(server.uri).get_metric_history(run_id, "loss")] == [1]


@pytest.fixture(scope="module")
def behind_s3(tmp_path_factory) -> Iterator[tuple[Server, Faults, Any]]:
    """An MLflow server that keeps artifacts on S3, the network between the two, and a client of S3."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.KEYS.items():
            patch.setenv(name, value)
        with s3_server.serve() as bucket, faulty(bucket.port) as faults, socket.socket() as probe:
            patch.setenv("MLFLOW_S3_ENDPOINT_URL", faults.url)
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()
            server = Server(tmp_path_factory.mktemp("behind"), port, artifacts="s3://toys/artifacts")
            server.start()
            try:
                endpoint = f"http://127.0.0.1:{bucket.port}"
                yield server, faults, boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
            finally:
                server.kill()
