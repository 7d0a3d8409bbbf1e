import shlex
from urllib.parse import parse_qs, urlsplit

import pytest

from mmdiff_ray.tracking import links

SERVER = "https://me:secret@host:5000/mlflow/"


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
    address, _, route = links.link(SERVER, **place).partition("#")
    assert address == "https://host:5000/mlflow/"
    path, _, query = route.partition("?")
    assert path == page
    expected = {"workflowType": ["machine_learning"]}
    if "search" in place:
        expected["searchFilter"] = [place["search"]]
    assert parse_qs(urlsplit(f"?{query}").query) == expected


def test_an_sqlite_store_is_opened_by_a_command_that_survives_a_space_in_its_path():
    command = links.where_to_look("sqlite:////my runs/x.db")
    assert shlex.split(command) == ["MLFLOW_TRACKING_URI=sqlite:////my runs/x.db", "mmdiff", "ui"]
    assert links.where_to_look(SERVER, "7", "abc") == links.link(SERVER, "7", "abc")
