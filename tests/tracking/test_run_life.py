import json
import shutil
import time
from pathlib import Path

import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.tracking import provenance, queries, run_life
from mmdiff_ray.tracking.recorder import DatasetFacts
from mmdiff_ray.tracking.sender import LOCAL_PREFIX, LOCAL_TAG, replay
from mmdiff_ray.tracking.tracker import Tracker
from tests.tracking.killed import record_and_be_killed

SETTINGS = {"name": "first", "train.samples": 1000, "train.betas": [0.9, 0.99], "tracking.uri": None}
DIGEST = "0123456789abcdef" * 4
DATA = [DatasetFacts("openmoji", "s3://bucket/openmoji", DIGEST, {"train": 1700, "val": 200})]


def begin(uri, root, **more) -> str:
    return run_life.start_run(uri, "tests", "first", root, SETTINGS, "name: first\n", DATA, **more)


def test_a_run_starts_with_its_config_its_datasets_and_its_origin(uri, client, tmp_path):
    run = client.get_run(begin(uri, tmp_path / "tracking", tags={"kind": "demo"}))
    assert (run.info.run_name, run.info.status) == ("first", "RUNNING")
    assert run.data.params == {
        "name": "first", "train.samples": "1000", "train.betas": "[0.9, 0.99]", "tracking.uri": "None"
    }  # fmt: skip
    yaml = client.download_artifacts(run.info.run_id, "config.yaml", tmp_path)
    assert Path(yaml).read_text() == "name: first\n"
    versions = {f"version.{name}": version for name, version in provenance.versions().items()}
    assert {**versions, "kind": "demo"}.items() <= run.data.tags.items()
    data = run.inputs.dataset_inputs[0].dataset
    assert (data.name, data.digest, data.source_type) == ("openmoji", DIGEST[:36], "s3")
    assert json.loads(data.source) == {"uri": "s3://bucket/openmoji"}
    assert json.loads(data.profile) == {"rows": {"train": 1700, "val": 200}, "manifest_sha256": DIGEST}


def test_a_job_that_restarts_stays_one_run(uri, client, experiment, tmp_path):
    run_id = begin(uri, tmp_path)
    before = len(client.search_runs([experiment]))
    for attempt in range(3):
        tracker = Tracker(uri, run_id, tmp_path)
        tracker.metrics({"loss": attempt}, 10 * attempt)
        tracker.close(30)
        assert run_life.end_run(uri, run_id, "FAILED", tmp_path) == 0
        assert client.get_run(run_id).info.status == "FAILED"
        assert run_life.resume_run(uri, run_id, tmp_path) == 0
        assert client.get_run(run_id).info.status == "RUNNING"
    record_and_be_killed(uri, run_id, tmp_path)
    assert run_life.end_run(uri, run_id, "FINISHED", tmp_path) == 0
    assert client.get_run(run_id).info.status == "FINISHED"
    assert {(0, 0), (10, 1), (20, 2)} < {(p.step, p.value) for p in client.get_metric_history(run_id, "loss")}
    assert client.get_run(run_id).data.metrics == {"loss": 99}, "of the killed worker"
    assert len(client.search_runs([experiment])) == before


def test_a_store_that_is_away_at_the_start_is_an_error_that_names_the_key(dead_uri, mute_uri, tmp_path):
    start = time.perf_counter()
    with pytest.raises(
        ConfigError, match=r"tracking\.uri \(http.*refused; start that server.*tracking\.required=false"
    ):
        begin(dead_uri, tmp_path)
    with pytest.raises(ConfigError, match=r"no answer within 0\.2 s"):
        begin(mute_uri, tmp_path, timeout_s=0.2)
    assert time.perf_counter() - start < 20
    assert list(tmp_path.iterdir()) == []


def test_a_run_begun_without_its_store_appears_there_later_as_one_run(
    uri, client, dead_uri, experiment, tmp_path
):
    local = begin(dead_uri, tmp_path / "driver", required=False)
    assert local.startswith(LOCAL_PREFIX)
    worker = Tracker(dead_uri, local, tmp_path / "worker")
    worker.metrics({"loss": 0.5}, 100)
    worker.close(timeout_s=0.1)
    run_life.end_run(dead_uri, local, "FINISHED", tmp_path / "driver", timeout_s=0.1)

    early = replay(tmp_path / "worker", uri)
    assert early.waiting == 1 and "the start of run" in str(early.error)
    assert not client.search_runs([experiment], f"tags.`{LOCAL_TAG}` = '{local}'")
    shutil.copytree(tmp_path / "driver", tmp_path / "driver sent again")
    for folder in ("driver", "worker", "driver sent again"):
        assert replay(tmp_path / folder, uri).waiting == 0
    assert len(client.search_runs([experiment], f"tags.`{LOCAL_TAG}` = '{local}'")) == 1
    run = queries.find_run(uri, local)
    assert (run.info.status, run.data.metrics, run.data.params["name"]) == (
        "FINISHED",
        {"loss": 0.5},
        "first",
    )


def test_a_run_that_was_deleted_is_reported_before_anything_is_recorded(uri, client, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no run ffff.*; check tracking\.uri$"):
        run_life.resume_run(uri, "f" * 32, tmp_path)
    run_id = begin(uri, tmp_path)
    before = (tmp_path / "log.jsonl").read_text()
    client.delete_run(run_id)
    with pytest.raises(
        ConfigError, match=rf"run {run_id} was deleted in MLflow at .*; restore it: mlflow runs restore"
    ):
        run_life.resume_run(uri, run_id, tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == before
    client.restore_run(run_id)
    assert run_life.resume_run(uri, run_id, tmp_path) == 0


def test_a_run_that_began_without_its_store_and_was_deleted_there_later_is_reported(
    uri, client, dead_uri, tmp_path
):
    local = begin(dead_uri, tmp_path, required=False)
    run_life.check_run(uri, local)  # it is not there yet
    assert replay(tmp_path, uri).waiting == 0
    run_life.check_run(uri, local)
    client.delete_run(queries.find_run(uri, local).info.run_id)
    with pytest.raises(ConfigError, match=rf"run {local} was deleted .*, or --so$"):
        run_life.check_run(uri, local, "--so")


def test_records_of_a_run_that_is_deleted_while_it_trains_wait_until_it_is_restored(uri, client, tmp_path):
    run_id = begin(uri, tmp_path)
    client.delete_run(run_id)
    tracker = Tracker(uri, run_id, tmp_path)
    tracker.metrics({"loss": 1.0}, 1)
    assert tracker.close(30) == 1
    assert run_life.end_run(uri, run_id, "FINISHED", tmp_path) == 2, "without waiting for minutes"
    assert not (tmp_path / "refused.jsonl").exists()
    client.restore_run(run_id)
    assert replay(tmp_path).waiting == 0
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 1.0}


def test_a_new_mlflow_run_has_the_metrics_of_the_deleted_one(uri, client, tmp_path):
    first = begin(uri, tmp_path)
    tracker = Tracker(uri, first, tmp_path)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.text("sent", "note.txt")
    assert tracker.close(30) == 0
    client.delete_run(first)
    second = begin(uri, tmp_path, required=False)
    tracker = Tracker(uri, second, tmp_path)
    tracker.metrics({"loss": 2.0}, 2)
    assert tracker.close(30) == 0 and second != first
    assert queries.history(uri, second, "loss") == [(1, 1.0), (2, 2.0)]
    assert client.get_run(second).data.params["name"] == "first"
    assert not (tmp_path / "refused.jsonl").exists() and (tmp_path / f"log-{first}.jsonl").exists()


def test_a_run_goes_on_while_its_store_is_away(uri, client, dead_uri, tmp_path):
    run_id = begin(uri, tmp_path)
    run_life.end_run(uri, run_id, "FAILED", tmp_path)
    assert run_life.resume_run(dead_uri, run_id, tmp_path) == 2
    assert replay(tmp_path, uri).waiting == 0
    assert client.get_run(run_id).info.status == "RUNNING"


def test_the_password_of_the_store_is_not_recorded(dead_uri, uri, client, tmp_path):
    secret = dead_uri.replace("http://", "http://me:hidden@")
    local = run_life.start_run(
        secret, "tests", "secret", tmp_path, {"tracking.uri": secret}, f"uri: {secret}\n",
        tags={"command": f"mmdiff train a.yaml tracking.uri={secret}", "count": 3}, required=False,
    )  # fmt: skip
    kept = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert any(dead_uri in text for text in kept) and not any("hidden" in text for text in kept)
    replay(tmp_path, uri)
    run = queries.find_run(uri, local)
    assert run.data.params == {"tracking.uri": dead_uri}
    assert run.data.tags["command"] == f"mmdiff train a.yaml tracking.uri={dead_uri}"
    yaml = client.download_artifacts(run.info.run_id, "config.yaml", tmp_path)
    assert Path(yaml).read_text() == f"uri: {dead_uri}\n"
