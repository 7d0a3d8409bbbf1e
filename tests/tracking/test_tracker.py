import json
import logging
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mmdiff_ray.tracking import queries
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.recorder import Recorder, safe_key
from mmdiff_ray.tracking.sender import replay
from mmdiff_ray.tracking.sync import sync
from mmdiff_ray.tracking.tracker import Tracker
from tests.faults import full_disk
from tests.tracking.killed import record_and_be_killed

PICTURE = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)


def paths(client, run_id: str, folder: str = "") -> list[str]:
    return sorted(item.path for item in client.list_artifacts(run_id, folder))


def test_numbers_settings_and_tags_arrive_with_their_steps(uri, client, run_id, tmp_path):
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.params({"train.seed": 3, "data.sources": [{"uri": "x"}]})
    for step in range(0, 500, 10):
        tracker.metrics({"loss/l1/pixels": 1.0 / (step + 1), "samples_per_s": step}, step)
    tracker.tags({"note": "first"})
    tracker.tags({"note": "last"})
    assert tracker.close(30) == 0
    run = client.get_run(run_id)
    assert run.data.params == {"train.seed": "3", "data.sources": '[{"uri": "x"}]'}
    assert run.data.tags["note"] == "last"
    expected = [(step, 1.0 / (step + 1)) for step in range(0, 500, 10)]
    assert queries.history(uri, run_id, "loss/l1/pixels") == expected
    assert not list(tmp_path.glob("files/*"))


def test_more_values_than_one_request_takes_all_arrive(uri, client, run_id, tmp_path):
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.metrics({f"m{n}": n for n in range(1234)}, 7)
    tracker.params({f"p{n}": "x" * 5900 for n in range(130)})
    tracker.tags({f"t{n}": "x" * 5000 for n in range(130)})
    assert tracker.close(60) == 0
    data = client.get_run(run_id).data
    assert data.metrics == {f"m{n}": n for n in range(1234)}
    assert len(data.params) == 130 and sum(key.startswith("t") for key in data.tags) == 130


def test_a_value_that_is_not_finite_is_counted_and_named_instead_of_stored(uri, client, run_id, tmp_path):
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.metrics({"loss": float("inf"), "grad": 1.0}, 10)
    tracker.metrics({"loss": float("nan"), "grad": 2.0}, 20)
    tracker.close(30)
    data = client.get_run(run_id).data
    assert "loss" not in data.metrics and data.metrics["grad"] == 2.0
    assert queries.history(uri, run_id, "nonfinite/loss") == [(10, 1.0), (20, 1.0)]
    assert data.tags["nonfinite/loss"] == "nan at step 20"


def test_a_setting_longer_than_mlflow_stores_is_left_out_instead_of_cut(uri, client, run_id, tmp_path):
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.params({"fits": "x" * 6000, "too_long": "x" * 6001})
    tracker.close(30)
    assert client.get_run(run_id).data.params == {"fits": "x" * 6000}


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


def test_pictures_form_a_slider_under_the_names_that_mlflow_reads(uri, client, run_id, tmp_path):
    tracker = Tracker(uri, run_id, tmp_path)
    for step in (0, 1000):
        tracker.image("grids/joint", PICTURE, step)
    assert tracker.close(30) == 0
    files = paths(client, run_id, "images")
    assert [file.split("+")[:4] for file in files[::2]] == [
        ["images/grids~joint", "step", "0", "timestamp"],
        ["images/grids~joint", "step", "1000", "timestamp"],
    ]
    assert [file.endswith("+compressed.webp") for file in files] == [True, False, True, False]
    assert client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"


def test_a_picture_comes_back_as_it_was(uri, client, run_id, tmp_path):
    from PIL import Image

    tracker = Tracker(uri, run_id, tmp_path / "tracking")
    tracker.image("x", PICTURE, 1)
    tracker.close(30)
    full = next(path for path in paths(client, run_id, "images") if path.endswith(".png"))
    with Image.open(client.download_artifacts(run_id, full, tmp_path)) as image:
        assert (np.asarray(image) == PICTURE).all()


def test_picture_names_differ_from_those_of_mlflows_own_logger_only_in_time_and_id(
    uri, client, run_id, experiment, tmp_path
):
    own = client.create_run(experiment).info.run_id
    client.log_image(own, PICTURE, key="a/b", step=3)
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.image("a/b", PICTURE, 3)
    tracker.close(30)
    ours, theirs = (paths(client, run, "images") for run in (run_id, own))
    assert [len(path) for path in ours] == [len(path) for path in theirs]
    assert [path.split("+")[:4] for path in ours] == [path.split("+")[:4] for path in theirs]


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
        timed(tracker.image, "grid", PICTURE, 1)
        timed(tracker.text, "hello", "note.txt")
        start = time.perf_counter()
        assert tracker.close(timeout_s=1.0) == 302
        assert time.perf_counter() - start < 3
    assert sorted(times)[-3] < 0.05
    assert "the run goes on" in caplog.text and "302 records" in caplog.text
    done = replay(tmp_path, uri)
    assert (done.sent, done.waiting, done.error) == (302, 0, None)
    assert queries.history(uri, run_id, "loss") == [(step, step) for step in range(300)]
    assert paths(client, run_id) == ["images", "note.txt"]


def test_a_server_that_never_answers_does_not_hold_the_process(mute_uri, run_id, tmp_path):
    tracker = Tracker(mute_uri, run_id, tmp_path)
    tracker.metrics({"loss": 1}, 1)
    start = time.perf_counter()
    assert tracker.close(timeout_s=0.5) == 1
    assert time.perf_counter() - start < 3


def test_a_replay_into_a_store_that_is_away_keeps_everything_and_says_why(dead_uri, run_id, tmp_path):
    tracker = Tracker(dead_uri, run_id, tmp_path)
    tracker.metrics({"loss": 1}, 1)
    tracker.close(timeout_s=0.1)
    done = replay(tmp_path)
    assert (done.sent, done.waiting) == (0, 1) and "Connection refused" in str(done.error)
    assert replay(tmp_path).waiting == 1


def test_records_sent_twice_are_stored_once(uri, client, dead_uri, run_id, tmp_path):
    tracker = Tracker(dead_uri, run_id, tmp_path / "once")
    tracker.params({"seed": 1})
    for step in range(20):
        tracker.metrics({"loss": step, "other": 1.0}, step)
    tracker.image("grid", PICTURE, 1)
    tracker.text("hello", "note.txt")
    tracker.close(timeout_s=0.1)
    shutil.copytree(tmp_path / "once", tmp_path / "again")
    for copy in ("once", "again"):
        assert replay(tmp_path / copy, uri).waiting == 0
    assert len(client.get_metric_history(run_id, "loss")) == 20
    assert len(paths(client, run_id, "images")) == 2
    assert not (tmp_path / "again" / "refused.jsonl").exists()


def test_what_a_killed_process_recorded_is_sent_by_another(uri, client, dead_uri, run_id, tmp_path):
    record_and_be_killed(dead_uri, run_id, tmp_path)
    assert replay(tmp_path, uri).sent == 101
    assert queries.history(uri, run_id, "loss") == [(step, step) for step in range(100)]
    assert paths(client, run_id) == ["note.txt"]


@pytest.mark.slow
def test_the_next_tracker_of_a_run_sends_what_its_killed_predecessor_left(uri, run_id, tmp_path):
    record_and_be_killed(uri, run_id, tmp_path, sending=True)
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.metrics({"loss": 100}, 100)
    assert tracker.close(30) == 0
    assert queries.history(uri, run_id, "loss") == [(step, step) for step in range(101)]


def test_a_new_tracker_takes_over_at_once_what_its_killed_predecessor_left(dead_uri, run_id, tmp_path):
    record_and_be_killed(dead_uri, run_id, tmp_path)
    tracker = Tracker(dead_uri, run_id, tmp_path)
    assert tracker.waiting == 101
    assert tracker.close(timeout_s=0.1) == 101


@pytest.mark.slow
def test_mlflow_can_be_imported_right_after_a_tracker_was_made(dead_uri, tmp_path):
    program = (
        "import sys; from mmdiff_ray.tracking.tracker import Tracker\n"
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
    assert queries.latest(uri, run_id) == {"loss": 1.0}


def test_lines_that_cannot_be_read_are_counted_kept_and_reported(uri, run_id, tmp_path, capsys):
    tracking = tmp_path / "run" / "tracking"
    log = Log(tracking, {"uri": uri, "run_id": run_id})
    Recorder(log).metrics({"loss": 1.0}, 1)
    log.extend([b"\x00 torn\n", b'{"id": "1", "kind": "hologram", "time_ms": 1, "body": {}}\n'])
    Recorder(log).metrics({"loss": 2.0}, 2)
    assert sync(tmp_path) == 0
    said = capsys.readouterr().out
    assert f"run: 4 records sent, 2 of them refused, see {tracking}/refused.jsonl" in said
    reasons = [json.loads(line)["reason"] for line in (tracking / "refused.jsonl").read_text().splitlines()]
    assert "unreadable" in reasons[0] and "unknown kind of record 'hologram'" in reasons[1]
    assert queries.history(uri, run_id, "loss") == [(1, 1.0), (2, 2.0)]
    told: list[str] = []
    assert Tracker(uri, run_id, tracking).finish(say=told.append) == 0
    assert told == [f"MLflow refused 2 records; reasons in {tracking}/refused.jsonl"]


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
    from mmdiff_ray.tracking import store

    client = store.client(server.uri)
    run_id = client.create_run(store.get_or_create_experiment(server.uri, "full disk")).info.run_id
    tracker = Tracker(server.uri, run_id, tmp_path)
    tracker.metrics({"loss": 0.0, **{f"filling{n}": 0.0 for n in range(900)}}, 0)
    assert tracker.flush(60) == 0
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    with full_disk((tmp_path / "log.jsonl").stat().st_size + 20):
        for step in range(1, 20):
            tracker.metrics({"loss": float(step)}, step)
            tracker.image("grid", noise, step)
        assert tracker.close(60) == 0
    assert queries.history(server.uri, run_id, "loss") == [(step, step) for step in range(20)]
    assert paths(client, run_id) == []
    warnings = [record.message for record in caplog.records if record.name.startswith("mmdiff_ray")]
    assert [text.partition(" of the run")[0] for text in warnings[1:]] == ["19 records"], (
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
    from mmdiff_ray.tracking import store

    client = store.client(server.uri)
    run_id = client.create_run(store.get_or_create_experiment(server.uri, "outage")).info.run_id
    tracker, times = Tracker(server.uri, run_id, tmp_path), []

    def record(steps: range) -> None:
        for step in steps:
            start = time.perf_counter()
            tracker.metrics({"loss": step, "samples_per_s": 2 * step}, step)
            if step % 50 == 0:
                tracker.image("grid", PICTURE, step)
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
