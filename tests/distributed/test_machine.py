"""Problems with this machine are one line each, before Ray starts and in `mmdiff doctor`."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmdiff_ray.cli import main
from mmdiff_ray.config import ConfigError
from mmdiff_ray.distributed import machine
from mmdiff_ray.distributed.cluster import cluster
from mmdiff_ray.distributed.machine import check_ray_folder


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path as short as Ray needs it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def broken(capsys) -> list[str]:
    """Return the lines of what `mmdiff doctor` finds broken."""
    assert main(["doctor"]) == 1
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("BROKEN")]


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_folder_whose_paths_are_too_long_for_sockets_is_told(monkeypatch, capsys, tmp_path, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, f"/tmp/{'x' * 60}")
    words = (
        rf"^{variable} \(/tmp/x+\) is \d+ bytes too long for Ray's sockets, .*; set RAY_TMPDIR to a shorter"
    )
    with pytest.raises(ConfigError, match=words), cluster():
        raise AssertionError("the block must not run")
    (line,) = broken(capsys)
    assert "folder for Ray" in line and f"{variable} (/tmp/x" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
def test_longest_folder_that_is_let_through_is_one_that_ray_can_use(monkeypatch, short):
    longest = f"{short}/x"
    with pytest.raises(ConfigError, match="bytes too long"):
        while True:
            monkeypatch.setenv("RAY_TMPDIR", longest + "x")
            check_ray_folder()
            longest += "x"
    monkeypatch.setenv("RAY_TMPDIR", longest)
    code = "from mmdiff_ray.distributed.cluster import cluster\nwith cluster(1): print('it runs')"
    assert "it runs" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def test_folder_of_another_user_is_told(monkeypatch, short):
    (short / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what a user who is not root sees
    words = rf"^{short}/ray, Ray's session folder, is not writable: it belongs to \w+; set RAY_TMPDIR to"
    with pytest.raises(ConfigError, match=words):
        check_ray_folder()


def test_little_shared_memory_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "LEAST_SHARED_GIB", 10**6)
    monkeypatch.chdir(tmp_path)
    (line,) = broken(capsys)
    assert (
        "memory for Ray" in line and "GiB free in /dev/shm: Ray stores batches on disk, which is slow" in line
    )
