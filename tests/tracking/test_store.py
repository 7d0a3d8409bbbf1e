import os
from pathlib import Path

import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.tracking import store


def test_the_config_comes_before_the_environment_and_that_before_sqlite_beside_the_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000")
    assert store.tracking_uri("http://from-config:5000", tmp_path) == "http://from-config:5000"
    assert store.tracking_uri(None, tmp_path) == "http://from-environment:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert store.tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_relative_sqlite_file_means_the_same_file_in_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store.tracking_uri("sqlite:///here.db", "runs") == f"sqlite:///{Path.cwd()}/here.db"


@pytest.mark.parametrize("folder", ["./mlruns", "file:///tmp/mlruns"])
def test_a_plain_folder_is_refused_with_what_to_write_instead(folder):
    with pytest.raises(ConfigError, match=r"tracking\.uri .*is a folder.*sqlite:////path"):
        store.tracking_uri(folder, "runs")


def test_artifacts_of_an_sqlite_store_lie_beside_its_file(uri, client, experiment):
    location = client.get_experiment(experiment).artifact_location
    assert location == (store.sqlite_file(uri).parent / "mlartifacts" / "tests").as_uri()


def test_an_experiment_is_made_once(uri, experiment):
    assert store.get_or_create_experiment(uri, "tests") == experiment


def test_a_deleted_experiment_is_named_with_its_key(uri, client):
    client.delete_experiment(store.get_or_create_experiment(uri, "gone"))
    with pytest.raises(ConfigError, match=r"tracking\.experiment \(gone\) was deleted"):
        store.get_or_create_experiment(uri, "gone")


def test_texts_lose_passwords_and_nothing_else():
    text = "mmdiff train a.yaml tracking.uri=http://me:p4ss@host:5000/x 'data=s3://bucket/a' http://b:80/c@d"
    assert store.without_passwords(text) == text.replace("me:p4ss@", "")


def test_what_a_person_types_shows_no_password():
    assert store.ui_command("https://me:secret@host:5000/x") == "open https://host:5000/x"
    assert store.ui_command("https://t0ken@host:5000/x") == "open https://host:5000/x"


def test_stored_address_is_asked_with_the_password_of_the_environment(monkeypatch):
    stored, whole = "http://host:5000", "http://me:secret@host:5000"
    assert store.full(stored) == stored
    assert store.full(stored, "http://me:secret@other:5000", whole) == whole
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert (
        store.full(stored) == store.tracking_uri(stored, "runs") == store.tracking_uri(None, "runs") == whole
    )
    assert store.full("http://host:5001") == "http://host:5001"
    assert store.client(stored).tracking_uri == whole


def test_the_command_to_look_at_runs_survives_a_space_in_a_path():
    assert (
        store.ui_command("sqlite:////my runs/x.db")
        == "mlflow ui --backend-store-uri 'sqlite:////my runs/x.db'"
    )


def test_limits_set_by_the_user_stay(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    store.prepare("http://host:5000")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
