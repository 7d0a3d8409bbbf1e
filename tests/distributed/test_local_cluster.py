"""A cluster on this machine: it comes up, is found again, and ends with all its processes and no others."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mmdiff_ray.arguments import make_parser
from mmdiff_ray.cli import main
from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.distributed import local_cluster, processes
from mmdiff_ray.distributed.local_cluster import LocalCluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen]:
    """A process that is no part of any cluster."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def noted(*known: processes.Known, workers: int = 0) -> LocalCluster:
    """Return a cluster that the folder's file tells of, with these processes."""
    cluster = LocalCluster(
        "0badcafe", "http://127.0.0.1:9", "127.0.0.1:9", "token", "/tmp/ray/mm-0badcafe", workers, known
    )
    local_cluster.FOLDER.mkdir()
    plain = dataclasses.asdict(cluster)
    (local_cluster.FOLDER / local_cluster.STATE).write_text(json.dumps(plain))
    return cluster


def members(cluster: LocalCluster) -> list[psutil.Process]:
    return processes.family(cluster.processes, local_cluster.MARK, cluster.name)


def test_what_is_noted_is_read_again():
    cluster = noted((12, 34.5))
    assert local_cluster.read() == cluster


@pytest.mark.parametrize("text", ["", "{}", '{"name": "x"}', '{"processes": 3}', "[]"])
def test_file_that_a_killed_machine_left_half_written_is_no_cluster(text):
    local_cluster.FOLDER.mkdir()
    (local_cluster.FOLDER / local_cluster.STATE).write_text(text)
    assert local_cluster.read() is None
    assert local_cluster.down() is None


def test_process_that_took_over_a_noted_id_is_not_the_cluster_and_is_left_alone(bystander, capsys):
    pid, began = processes.known(bystander.pid)
    cluster = noted((pid, began - 3600))
    assert not local_cluster.is_up(cluster)
    assert main(["cluster", "status"]) == 1
    assert "has ended without" in capsys.readouterr().out
    assert main(["cluster", "down"]) == 0
    assert bystander.poll() is None
    assert local_cluster.read() is None
    assert "the cluster is down" in capsys.readouterr().out


def test_noted_process_is_ended_with_its_children_and_what_carries_its_mark(bystander):
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess as s; s.run(['sleep', '600'])"], start_new_session=True
    )
    marked = subprocess.Popen(["sleep", "600"], env={**os.environ, local_cluster.MARK: "0badcafe"})
    while not (children := psutil.Process(parent.pid).children()):
        assert parent.poll() is None
    cluster = noted(processes.known(parent.pid))
    assert {process.pid for process in members(cluster)} == {parent.pid, children[0].pid, marked.pid}
    ended = members(cluster)
    local_cluster.down()
    assert psutil.wait_procs(ended, timeout=10)[1] == []
    assert parent.poll() is not None and marked.poll() is not None and bystander.poll() is None


def test_folder_without_a_cluster_is_told_calmly(capsys):
    assert main(["cluster", "status"]) == 1
    assert main(["cluster", "down"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "there is no cluster in this folder; start one: mmdiff cluster up",
        "there is no cluster in this folder",
    ]
    assert list(Path.cwd().iterdir()) == []


def test_cluster_without_workers_is_refused():
    with pytest.raises(ConfigError, match=r"--workers \(0\) and --cpus \(4\) must be at least 1"):
        local_cluster.up(0, 4)


@pytest.mark.parametrize(("target", "action"), [("cluster", "up"), ("cluster-down", "down")])
def test_make_runs_the_command_that_is_tested_with_the_three_nodes_it_speaks_of(target, action):
    if shutil.which("make") is None:
        pytest.skip("no make")
    installed = [target, "--old-file", ".venv/.installed"]
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *installed], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f".venv/bin/mmdiff cluster {action}\n", done.stderr
    (about,) = re.findall(rf"^{target}: install ## (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert action == "down" or "three nodes" in about
    given = make_parser().parse_args(["cluster", action])
    assert given.run == f"cluster_{action}" and getattr(given, "workers", 2) == 2


@pytest.mark.slow
def test_cluster_that_does_not_come_up_is_told_with_its_last_words_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(local_cluster, "_head_options", lambda cluster: ["--head", "--port=notaport"])
    with pytest.raises(
        RunError, match=r"the local cluster did not come up: .*notaport.*\(.cluster/head.log\)"
    ):
        local_cluster.up(1, 1)
    assert local_cluster.read() is None
    assert not (local_cluster.FOLDER / local_cluster.TOKEN).exists()


@pytest.mark.slow
@pytest.mark.ray
def test_cluster_comes_up_once_survives_a_killed_machine_and_ends_alone(bystander, capsys):
    assert main(["cluster", "up", "--workers", "1", "--cpus", "1"]) == 0
    cluster = local_cluster.read()
    assert cluster is not None
    try:
        assert stat.S_IMODE(os.stat(cluster.token_path).st_mode) == 0o600
        assert_wants_its_token(cluster)
        assert local_cluster.nodes(cluster) == 2

        assert main(["cluster", "up"]) == 0
        assert local_cluster.read() == cluster
        assert "the cluster is up already" in capsys.readouterr().out

        killed = members(cluster)
        for process in killed:
            with contextlib.suppress(psutil.NoSuchProcess):  # one that ended with its parent
                process.kill()
        assert psutil.wait_procs(killed, timeout=30)[1] == []
        assert main(["cluster", "status"]) == 1
        assert "has ended without" in capsys.readouterr().out

        assert main(["cluster", "up", "--workers", "1", "--cpus", "1"]) == 0
        second = local_cluster.read()
        assert second is not None and second.name != cluster.name
        assert not Path(cluster.temp).exists()
        cluster = second
        assert main(["cluster", "status"]) == 0
        before = members(cluster)
        assert len(before) > 4
        assert main(["cluster", "down"]) == 0
    finally:
        local_cluster.down()
    assert psutil.wait_procs(before, timeout=10)[1] == [] and members(cluster) == []
    assert not Path(cluster.temp).exists()
    assert bystander.poll() is None


def assert_wants_its_token(cluster: LocalCluster) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
            urllib.request.urlopen(urllib.request.Request(f"{cluster.address}/api/version", headers=headers))
