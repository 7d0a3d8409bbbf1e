"""The store of a team: MLflow before PostgreSQL, artifacts through the server on S3. Both are killed in
mid-run."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.tracking import queries, run_life, store
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.recorder import DatasetFacts
from mmdiff_ray.tracking.tracker import Tracker
from tests.postgres import Postgres, postgres_server
from tests.s3 import s3_server
from tests.tracking.conftest import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Team:
    """A team's services."""

    server: Server
    database: Postgres
    s3: object


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Iterator[Team]:
    import boto3

    pytest.importorskip("psycopg2", reason="MLflow's driver of PostgreSQL, psycopg2, is not installed")
    with postgres_server() as database, pytest.MonkeyPatch.context() as patch, s3_server(patch) as endpoint:
        s3 = boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1")
        s3.create_bucket(Bucket="team")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with pytest.MonkeyPatch.context() as known_to_the_server:
            known_to_the_server.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{endpoint}")
            server = Server(tmp_path_factory.mktemp("server"), port, "s3://team/artifacts", database.uri)
        server.start()
        try:
            yield Team(server, database, s3)
        finally:
            server.kill()


def test_run_outlives_kills_of_its_server_and_of_the_database(team, tmp_path):
    uri, root = team.server.uri, tmp_path / "tracking"
    data = [DatasetFacts("toys", "s3://bucket/toys", "0" * 64, {"train": 9})]
    run_id = run_life.start_run(uri, "team", "first", root, {"train.seed": 3}, "name: first\n", data)
    tracker = Tracker(uri, run_id, root)

    def record(steps: range) -> None:
        for step in steps:
            tracker.metrics({"loss/total": 1 / (step + 1)}, step)
        tracker.image("samples/joint", to_png(np.full((8, 8, 3), steps[0], np.uint8)), steps[0])
        tracker.text(f"from {steps[0]}", f"notes/{steps[0]}.txt")

    record(range(0, 50))
    assert tracker.flush(60) == 0
    team.server.kill()
    record(range(50, 100))
    assert tracker.flush(20) > 0
    team.server.start()
    record(range(100, 150))
    assert tracker.flush(60) == 0
    team.database.crash()
    record(range(150, 200))
    assert tracker.flush(20) > 0
    team.database.start()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MLmodel").write_text("flavors: {}\n")
    tracker.model(tmp_path / "model", "model", 200)
    assert tracker.close(60) == 0
    assert run_life.end_run(uri, run_id, "FINISHED", root) == 0

    client = store.client(uri)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"train.seed": "3"})
    assert run.inputs.dataset_inputs[0].dataset.name == "toys"
    points = client.get_metric_history(run_id, "loss/total")
    assert sorted(point.step for point in points) == list(range(200))
    assert queries.history(uri, run_id, "loss/total") == [(step, 1 / (step + 1)) for step in range(200)]
    notes = [item.path for item in client.list_artifacts(run_id, "notes")]
    assert notes == [f"notes/{step}.txt" for step in (0, 100, 150, 50)]
    for step in (0, 50, 100, 150):
        copy = client.download_artifacts(run_id, f"notes/{step}.txt", str(tmp_path))
        assert Path(copy).read_text() == f"from {step}"
    pictures = [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in pictures) == [0, 50, 100, 150]
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    kept = [entry["Key"] for entry in team.s3.list_objects_v2(Bucket="team", Prefix="artifacts/")["Contents"]]
    assert any(key.endswith(f"{run_id}/artifacts/config.yaml") for key in kept)
    assert any(key.endswith(f"{model.model_id}/artifacts/MLmodel") for key in kept)
    assert Log(root).waiting == 0
