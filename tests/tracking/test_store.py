import os
import shlex
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from mmdiff_ray.config import ConfigError, without_passwords
from mmdiff_ray.tracking import store

SERVER = "https://me:secret@host:5000/mlflow/"


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


def test_a_deleted_experiment_is_named_with_its_key(uri, client):
    client.delete_experiment(store.get_or_create_experiment(uri, "gone"))
    with pytest.raises(ConfigError, match=r"tracking\.experiment \(gone\) was deleted"):
        store.get_or_create_experiment(uri, "gone")


def test_texts_lose_passwords_and_nothing_else():
    text = "mmdiff train a.yaml tracking.uri=http://me:p4ss@host:5000/x 'data=s3://bucket/a' http://b:80/c@d"
    assert without_passwords(text) == text.replace("me:p4ss@", "")


def test_stored_address_is_asked_with_the_password_of_the_environment(monkeypatch):
    stored, whole = "http://host:5000", "http://me:secret@host:5000"
    assert store.with_credentials(stored) == stored
    assert store.with_credentials(stored, "http://me:secret@other:5000", whole) == whole
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert store.tracking_uri(stored, "runs") == store.tracking_uri(None, "runs") == whole
    assert store.with_credentials(stored) == whole
    assert store.with_credentials("http://host:5001") == "http://host:5001"
    assert store.client(stored).tracking_uri == whole


def test_limits_set_by_the_user_stay(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    store.prepare("http://host:5000")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


@pytest.mark.parametrize(
    ("place", "page"),
    [
        ({}, "/experiments"),
        ({"experiment": "7"}, "/experiments/7/runs"),
        ({"experiment": "7", "run": "abc"}, "/experiments/7/runs/abc"),
        ({"experiment": "7", "search": "tags.`mmdiff.job_id` = 'a-b c'"}, "/experiments/7/runs"),
    ],
)
def test_every_link_opens_the_view_of_training_runs_and_shows_no_password(place, page):
    address, _, route = store.ui_link(SERVER, **place).partition("#")
    assert address == "https://host:5000/mlflow/"
    path, _, query = route.partition("?")
    assert path == page
    expected = {"workflowType": ["machine_learning"]}
    if "search" in place:
        expected["searchFilter"] = [place["search"]]
    assert parse_qs(urlsplit(f"?{query}").query) == expected


def test_an_sqlite_store_is_opened_by_a_command_that_survives_a_space_in_its_path():
    command = store.ui_link("sqlite:////my runs/x.db")
    assert shlex.split(command) == ["MLFLOW_TRACKING_URI=sqlite:////my runs/x.db", "mmdiff", "ui"]
