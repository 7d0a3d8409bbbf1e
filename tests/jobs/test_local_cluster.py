"""A cluster on this machine: it starts, is found again, and ends with all its processes and no others."""

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

from mmdiff_ray.cli import main, make_parser
from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.distributed import local_cluster, processes
from mmdiff_ray.distributed.local_cluster import MARK, STATE, TOKEN

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen]:
    """A process with a child that are no part of the cluster of this folder, but of another."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import subprocess as s; s.run(['sleep', '600'])"],
        env={**os.environ, MARK: "another/head"},
    )
    yield process
    processes.end([psutil.Process(process.pid)], 5.0)
    process.wait()


def family(name: str) -> list[psutil.Process]:
    roots = processes.marked(MARK, f"{name}/")
    return [*roots, *(child for root in roots for child in root.children(recursive=True))]


@pytest.mark.parametrize("text", ["", "{}", '{"name": "x"}', "[]"])
def test_half_written_state_is_no_cluster(text, capsys):
    STATE.parent.mkdir()
    STATE.write_text(text)
    assert main(["cluster", "status"]) == 1 and main(["cluster", "down"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "there is no cluster in this folder; start one with: mmdiff cluster up",
        "there is no cluster in this folder",
    ]


def test_folder_stays_empty_and_wrong_numbers_are_refused(capsys):
    assert main(["cluster", "down"]) == 0
    assert main(["cluster", "up", "--workers", "0"]) == 2
    assert "--workers (0) and --cpus (4) must be at least 1" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(("target", "action"), [("cluster", "up"), ("cluster-down", "down")])
def test_make_runs_the_command_that_is_tested_with_the_three_nodes_it_speaks_of(target, action):
    if shutil.which("make") is None:
        pytest.skip("no make")
    words = ["make", "--dry-run", "--no-print-directory", target, "--old-file", ".venv/.installed"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f".venv/bin/mmdiff cluster {action}\n", done.stderr
    (about,) = re.findall(rf"^{target}: install ## (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert action == "down" or "three nodes" in about
    given = make_parser().parse_args(["cluster", action])
    assert given.command == f"cluster {action}" and getattr(given, "workers", 2) == 2


@pytest.mark.slow
def test_cluster_that_does_not_start_reports_rays_last_line_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(local_cluster, "ATTEMPTS", 1)
    monkeypatch.setattr(local_cluster, "HOST", "no.such.host")
    monkeypatch.setattr(local_cluster, "_free_ports", lambda count: [1] * count)
    with pytest.raises(RunError, match=r"the local cluster did not start: .+ \(.cluster/head.log\)"):
        local_cluster.up(1, 1)
    assert not STATE.exists() and not TOKEN.exists()


@pytest.mark.slow
@pytest.mark.ray
def test_cluster_starts_once_survives_a_killed_machine_and_ends_alone(bystander, capsys):
    up = ["cluster", "up", "--workers", "1", "--cpus", "1"]
    assert main(up) == 0
    first = local_cluster.read()
    assert first is not None
    try:
        assert stat.S_IMODE(os.stat(first.token_path).st_mode) == 0o600
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            request = urllib.request.Request(f"{first.address}/api/version", headers=headers)
            with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
                urllib.request.urlopen(request)
        sockets = [one for process in family(first.name) for one in process.net_connections("inet")]
        port = int(first.address.rpartition(":")[2])
        assert {one.laddr.ip for one in sockets if one.laddr.port == port} == {"127.0.0.1"}
        assert main(["cluster", "status"]) == 0
        assert main(up) == 0 and local_cluster.read() == first
        assert "the cluster is up, with 2 nodes" in (said := capsys.readouterr().out)
        assert "the cluster is already up" in said

        killed = family(first.name)
        with pytest.raises(ConfigError, match=r"of 2 nodes answer; end it: mmdiff cluster down"):
            local_cluster.up(1, 1)
        for process in killed:
            process.kill()
        assert psutil.wait_procs(killed, timeout=30)[1] == []
        assert main(["cluster", "status"]) == 1
        assert "0 of 2 nodes respond; restart" in capsys.readouterr().out

        assert main(up) == 0
        second = local_cluster.read()
        assert second is not None and second.name != first.name and not Path(first.temp).exists()
        running = family(second.name)
        assert len(running) > 4
        assert main(["cluster", "down"]) == 0
    finally:
        local_cluster.down()
    assert psutil.wait_procs(running, timeout=10)[1] == [] and family(second.name) == []
    assert not Path(second.temp).exists() and not STATE.exists()
    assert bystander.poll() is None and psutil.Process(bystander.pid).children()
