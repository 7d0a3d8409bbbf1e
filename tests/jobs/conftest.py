"""What the tests of jobs share."""

import os
import socket

import pytest

from tests.surroundings import is_somebodys


@pytest.fixture
def nothing_around(tmp_path, monkeypatch):
    """Work in an empty folder, with no address, token or store in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in filter(is_somebodys, list(os.environ)):
        monkeypatch.delenv(name)


@pytest.fixture
def dead_url() -> str:
    """The address of a server that does not answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
