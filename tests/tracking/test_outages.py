"""A network that fails between a run and its MLflow server: nothing waits, nothing is lost, nothing twice."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmdiff_ray.cli import main
from mmdiff_ray.distributed import job as jobs
from mmdiff_ray.distributed import launch
from mmdiff_ray.distributed.display import Display
from mmdiff_ray.tracking import run_life, store
from mmdiff_ray.tracking.sender import LOCAL_TAG
from mmdiff_ray.tracking.tracker import Tracker
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
        "that server, name another store, or train without it for now: tracking.required=false (records wait "
        "on disk)\n"
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
    assert f"MLflow at {network.url} does not answer; records wait in {folder / 'tracking'}" in display.said
    assert display.said[-1].endswith(f"records wait for MLflow; send them with: mmdiff sync {folder}")
    assert main(["sync", str(folder)]) == 1
    assert "records sent" in capsys.readouterr().out

    network.down = False
    for said in ("nothing waits any more", "nothing waits any more"):
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
    assert list((folder / "tracking").iterdir()) == []


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
