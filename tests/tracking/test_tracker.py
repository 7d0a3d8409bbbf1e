import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.runs.records import sync
from mmdiff_ray.tracking import queries, store
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.recorder import Recorder, SystemMonitor, safe_key
from mmdiff_ray.tracking.sender import replay
from mmdiff_ray.tracking.tracker import Tracker, retry_pause_s
from tests.faults import full_disk
from tests.tracking.killed import record_and_be_killed

PICTURE = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
PNG = to_png(PICTURE)


def paths(client, run_id: str, folder: str = "") -> list[str]:
    return sorted(item.path for item in client.list_artifacts(run_id, folder))


def test_metrics_params_and_tags_arrive_also_beyond_the_limits_of_one_request(uri, client, run_id, tmp_path):
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.params({"data.sources": [{"uri": "x"}], "fits": "x" * 6000, "mlflow_would_cut": "x" * 6001})
    tracker.params({f"p{n}": "x" * 5900 for n in range(130)})
    for step in range(0, 500, 10):
        tracker.metrics({"loss/l1/pixels": 1.0 / (step + 1), "samples_per_s": step}, step)
    tracker.metrics({f"m{n}": n for n in range(1234)}, 7)
    tracker.tags({"note": "first"})
    tracker.tags({"note": "last", **{f"t{n}": "x" * 5000 for n in range(130)}})
    assert tracker.close(60) == 0
    data = client.get_run(run_id).data
    assert (data.params["data.sources"], data.params["fits"]) == ('[{"uri": "x"}]', "x" * 6000)
    assert len(data.params) == 132 and "mlflow_would_cut" not in data.params
    assert data.tags["note"] == "last" and data.tags["t129"] == "x" * 5000
    assert {f"m{n}": n for n in range(1234)}.items() <= data.metrics.items()
    expected = [(step, 1.0 / (step + 1)) for step in range(0, 500, 10)]
    assert queries.history(uri, run_id, "loss/l1/pixels") == expected


def test_a_value_that_is_not_finite_is_counted_and_named_instead_of_stored(uri, client, run_id, tmp_path):
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.metrics({"loss": float("inf"), "grad": 1.0}, 10)
    tracker.metrics({"loss": float("nan"), "grad": 2.0}, 20)
    tracker.close(30)
    data = client.get_run(run_id).data
    assert "loss" not in data.metrics and data.metrics["grad"] == 2.0
    assert queries.history(uri, run_id, "nonfinite/loss") == [(10, 1.0), (20, 1.0)]
    assert data.tags["nonfinite/loss"] == "nan at step 20"


def test_a_refused_setting_is_kept_aside_and_stops_nothing_else(uri, client, run_id, tmp_path):
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.params({"seed": 1})
    tracker.params({"seed": 2, "late": "yes"})
    tracker.metrics({"loss": 0.5}, 1)
    assert tracker.close(30) == 0
    data = client.get_run(run_id).data
    assert data.params == {"seed": "1", "late": "yes"} and data.metrics == {"loss": 0.5}
    assert '"values": {"seed": "2"}' in (tmp_path / "refused.jsonl").read_text()


@pytest.mark.parametrize(
    ("key", "safe"), [("loss/l1/a b", "loss/l1/a b"), ("é:x", "__x"), ("/a//../b/", "a/b"), ("", "_")]
)
def test_a_name_is_changed_only_where_mlflow_refuses_it(key, safe):
    assert safe_key(key) == safe


def test_images_keep_their_pixels_and_are_named_as_by_mlflow_for_its_slider(
    uri, client, run_id, experiment, tmp_path
):
    from PIL import Image

    own = client.create_run(experiment).info.run_id
    tracker = Tracker(uri, run_id, tmp_path / "tracking")
    for step in (0, 1000):
        client.log_image(own, PICTURE, key="grids/joint", step=step)
        tracker.image("grids/joint", PNG, step)
    assert tracker.close(30) == 0
    ours, theirs = (paths(client, run, "images") for run in (run_id, own))
    assert len(ours) == 4 and [len(path) for path in ours] == [len(path) for path in theirs]
    assert [path.split("+")[:4] for path in ours] == [path.split("+")[:4] for path in theirs]
    assert client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
    full = next(path for path in ours if path.endswith(".png"))
    with Image.open(client.download_artifacts(run_id, full, tmp_path)) as image:
        assert (np.asarray(image) == PICTURE).all()
    assert not list((tmp_path / "tracking").glob("files/*")), "files are removed after sending"


def test_files_folders_and_texts_lie_where_they_were_put(uri, client, run_id, tmp_path):
    source = tmp_path / "report"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "a.txt").write_text("as recorded")
    tracker = Tracker(uri, run_id, tmp_path / "tracking")
    tracker.artifact(source, "reports")
    tracker.artifact(source / "inner" / "a.txt")
    tracker.text("yaml: 1", "configs/deep/config.yaml")
    (source / "inner" / "a.txt").write_text("changed afterwards")
    assert tracker.close(30) == 0
    assert paths(client, run_id, "reports/report/inner") == ["reports/report/inner/a.txt"]
    assert paths(client, run_id, "configs/deep") == ["configs/deep/config.yaml"]
    copy = client.download_artifacts(run_id, "a.txt", tmp_path)
    assert Path(copy).read_text() == "as recorded"


def test_no_call_waits_for_a_store_that_is_away_and_a_later_flush_sends_all(
    uri, client, dead_uri, run_id, tmp_path, caplog
):
    times = []

    def timed(call, *arguments):
        start = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - start)

    with caplog.at_level(logging.WARNING, "mmdiff_ray"):
        tracker = Tracker(dead_uri, run_id, tmp_path)
        for step in range(300):
            timed(tracker.metrics, {"loss": step}, step)
        timed(tracker.image, "grid", PNG, 1)
        timed(tracker.text, "hello", "note.txt")
        start = time.perf_counter()
        assert tracker.close(timeout_s=1.0) == 302
        assert time.perf_counter() - start < 3
    assert sorted(times)[-3] < 0.05
    assert "the run continues" in caplog.text and "302 records" in caplog.text
    away, done = replay(tmp_path), replay(tmp_path, uri)
    assert (away.sent, away.waiting) == (0, 302) and "Connection refused" in str(away.error)
    assert (done.sent, done.waiting, done.error) == (302, 0, None)
    assert queries.history(uri, run_id, "loss") == [(step, step) for step in range(300)]
    assert paths(client, run_id) == ["images", "note.txt"]


def test_a_server_that_never_answers_does_not_hold_the_process(mute_uri, run_id, tmp_path):
    tracker = Tracker(mute_uri, run_id, tmp_path)
    tracker.metrics({"loss": 1}, 1)
    start = time.perf_counter()
    assert tracker.close(timeout_s=0.5) == 1
    assert time.perf_counter() - start < 3


def test_records_sent_twice_are_stored_once(uri, client, dead_uri, run_id, tmp_path):
    tracker = Tracker(dead_uri, run_id, tmp_path / "once")
    tracker.params({"seed": 1})
    for step in range(20):
        tracker.metrics({"loss": step, "other": 1.0}, step)
    tracker.image("grid", PNG, 1)
    tracker.text("hello", "note.txt")
    tracker.close(timeout_s=0.1)
    shutil.copytree(tmp_path / "once", tmp_path / "again")
    for copy in ("once", "again"):
        assert replay(tmp_path / copy, uri).waiting == 0
    assert len(client.get_metric_history(run_id, "loss")) == 20
    assert len(paths(client, run_id, "images")) == 2
    assert not (tmp_path / "again" / "refused.jsonl").exists()


def test_the_next_tracker_of_a_run_sends_what_a_killed_process_left(uri, client, dead_uri, run_id, tmp_path):
    record_and_be_killed(dead_uri, run_id, tmp_path)
    assert Log(tmp_path).waiting == 101
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.metrics({"loss": 100}, 100)
    assert tracker.close(30) == 0
    assert queries.history(uri, run_id, "loss") == [(step, step) for step in range(101)]
    assert paths(client, run_id) == ["note.txt"]


@pytest.mark.slow
def test_nothing_is_lost_or_sent_twice_when_a_process_is_killed_while_it_sends(uri, client, run_id, tmp_path):
    record_and_be_killed(uri, run_id, tmp_path, sending=True)
    assert replay(tmp_path, uri).waiting == 0
    points = client.get_metric_history(run_id, "loss")
    assert sorted(point.step for point in points) == list(range(100))


def test_pauses_between_attempts_stay_short_after_any_number_of_failures():
    assert [retry_pause_s(n, False) for n in (0, 1, 10_000)] == [1, 2, 30]
    assert [retry_pause_s(n, True) for n in (1, 10_000)] == [0.5, 5]


@pytest.mark.slow
def test_mlflow_can_be_imported_right_after_a_tracker_was_made(dead_uri, tmp_path):
    program = (
        "import sys; from mmdiff_ray.tracking.tracker import Tracker, retry_pause_s\n"
        "tracker = Tracker(sys.argv[1], 'a' * 32, sys.argv[2]); tracker.metrics({'loss': 1.0}, 1)\n"
        "import mlflow.pyfunc; print(tracker.flush(0.1, failures=1))"
    )
    done = subprocess.run([sys.executable, "-c", program, dead_uri, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


class Forgetful(LocalArtifactRepository):
    """An artifact store that does not find its settings at first, as a plug-in may."""

    missing = True

    def __init__(self, artifact_uri: str, *arguments: object, **more: object) -> None:
        super().__init__(artifact_uri.removeprefix("forgetful:"), *arguments, **more)

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        if Forgetful.missing:
            Forgetful.missing = False
            raise KeyError("STORAGE_KEY")
        super().log_artifact(local_file, artifact_path)


def test_a_key_error_while_sending_refuses_nothing_for_good(client, uri, tmp_path):
    _artifact_repository_registry.register("forgetful", Forgetful)
    place = client.create_experiment(tmp_path.name, artifact_location=f"forgetful:{tmp_path}/artifacts")
    run_id = client.create_run(place).info.run_id
    tracker = Tracker(uri, run_id, tmp_path / "tracking")
    tracker.text("hello", "note.txt")
    tracker.metrics({"loss": 1.0}, 1)
    assert tracker.close(30) == 0 and not Forgetful.missing
    assert not (tmp_path / "tracking" / "refused.jsonl").exists()
    assert (tmp_path / "artifacts" / run_id / "artifacts" / "note.txt").read_text() == "hello"
    assert client.get_run(run_id).data.metrics == {"loss": 1.0}


def test_invalid_lines_are_counted_kept_and_reported(uri, run_id, tmp_path, capsys):
    tracking = tmp_path / "run" / "tracking"
    log = Log(tracking, {"uri": uri, "run_id": run_id})
    Recorder(log).metrics({"loss": 1.0}, 1)
    lines = [b"\x00 torn", b"[1]", b'{"id": "1", "kind": "hologram", "time_ms": 1, "body": {}}']
    log.extend([line + b"\n" for line in lines])
    Recorder(log).metrics({"loss": 2.0}, 2)
    assert sync(str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert f"run: 5 records sent, 3 of them refused, see {tracking}/refused.jsonl" in shown
    kept = [json.loads(line) for line in (tracking / "refused.jsonl").read_text().splitlines()]
    assert [one["line"].encode().strip() for one in kept] == lines
    assert "unreadable line" in kept[0]["reason"] and "unknown kind of record 'hologram'" in kept[2]["reason"]
    assert queries.history(uri, run_id, "loss") == [(1, 1.0), (2, 2.0)]
    messages: list[str] = []
    assert Tracker(uri, run_id, tracking).finish(say=messages.append) == 0
    assert messages == [f"MLflow refused 3 records; reasons in {tracking}/refused.jsonl"]


def test_records_of_the_first_release_arrive_as_its_run(uri, client, tmp_path):
    shutil.copytree(Path(__file__).parent / "fixtures" / "spools", tmp_path / "tracking")
    done = replay(tmp_path / "tracking", uri)
    assert (done.sent, done.waiting, done.refused, done.error) == (26, 0, 1, None)
    run = queries.find_run(uri, "local-0123456789abcdef0123456789abcdef")
    assert (run.info.run_name, run.info.status) == ("old run", "FINISHED")
    assert run.data.params == {"train.seed": "3", "data": '{"uri": "x"}'}
    steps = [step for step, _ in queries.history(uri, run.info.run_id, "loss/total")]
    assert steps == list(range(50, 201, 10)), "the first five were sent before"
    assert paths(client, run.info.run_id) == ["config.yaml", "images"]
    assert len(run.outputs.model_outputs) == len(run.inputs.dataset_inputs) == 1


@pytest.mark.slow
def test_a_full_disk_drops_pictures_and_no_number_while_mlflow_answers(server, tmp_path, caplog):
    client = store.client(server.uri)
    run_id = client.create_run(store.get_or_create_experiment(server.uri, "full disk")).info.run_id
    tracker = Tracker(server.uri, run_id, tmp_path)
    tracker.metrics({"loss": 0.0, **{f"filling{n}": 0.0 for n in range(900)}}, 0)
    assert tracker.flush(60) == 0
    noise = np.random.default_rng(0).bytes(100_000)
    with full_disk((tmp_path / "log.jsonl").stat().st_size + 20):
        for step in range(1, 20):
            tracker.metrics({"loss": float(step)}, step)
            tracker.image("grid", noise, step)
        assert tracker.close(60) == 0
    assert queries.history(server.uri, run_id, "loss") == [(step, step) for step in range(20)]
    assert paths(client, run_id) == []
    warnings = [record.message for record in caplog.records if record.name.startswith("mmdiff_ray")]
    assert [text.partition(" are lost")[0] for text in warnings[1:]] == ["19 records"], (
        "and one in all before"
    )


def test_two_trackers_of_one_run_leave_each_other_alone(uri, run_id, tmp_path):
    trackers = [Tracker(uri, run_id, tmp_path) for _ in range(2)]
    for step in range(50):
        for number, tracker in enumerate(trackers):
            tracker.metrics({f"worker{number}": step}, step)
    assert [tracker.close(30) for tracker in trackers] == [0, 0]
    for number in range(2):
        assert queries.history(uri, run_id, f"worker{number}") == [(step, step) for step in range(50)]


@pytest.mark.slow
def test_a_server_killed_in_mid_run_loses_nothing_and_stops_nobody(server, tmp_path):
    client = store.client(server.uri)
    run_id = client.create_run(store.get_or_create_experiment(server.uri, "outage")).info.run_id
    tracker, times = Tracker(server.uri, run_id, tmp_path), []

    def record(steps: range) -> None:
        for step in steps:
            start = time.perf_counter()
            tracker.metrics({"loss": step, "samples_per_s": 2 * step}, step)
            if step % 50 == 0:
                tracker.image("grid", PNG, step)
            times.append(time.perf_counter() - start)

    record(range(100))
    assert tracker.flush(60) == 0
    record(range(100, 200))
    server.kill()
    record(range(200, 400))
    assert tracker.flush(2.0) > 0 and tracker.error
    server.start()
    record(range(400, 500))
    assert tracker.close(60) == 0
    points = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(step, step) for step in range(500)]
    assert all(before.timestamp <= after.timestamp for before, after in pairwise(points))
    pictures = [path for path in paths(client, run_id, "images") if path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in pictures) == list(range(0, 500, 50))
    assert sorted(times)[-6] < 0.05


def test_the_load_of_the_machine_is_recorded_at_the_samples_seen_then(uri, client, run_id, tmp_path):
    tracker, asked = Tracker(uri, run_id, tmp_path), threading.Semaphore(0)
    seen = iter(range(0, 10**9, 64))

    def step() -> int:
        asked.release()
        return next(seen)

    monitor = SystemMonitor(tracker, step, node="node-0", interval_s=0.01)
    for _ in range(3):
        assert asked.acquire(timeout=60)
    monitor.stop()
    assert tracker.close(30) == 0
    memory = queries.history(uri, run_id, "system/node-0/system_memory_usage_percentage")
    assert [point[0] for point in memory[:3]] == [0, 64, 128]
    assert all(0 < value < 100 for _, value in memory)
    recorded = client.get_run(run_id).data.metrics
    assert {f"system/node-0/{key}" for key in ("cpu_utilization_percentage", "disk_usage_percentage")} <= set(
        recorded
    )
