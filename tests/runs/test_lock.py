"""A run in storage has one driver, whatever machine it is on, and another once that is gone."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mmdiff_ray.config import ConfigError, OutageError
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import lock as lease
from mmdiff_ray.runs.lock import only_driver
from mmdiff_ray.storage import retry as patience
from mmdiff_ray.storage.filesystem import files_under, filesystem, join, write_bytes_atomic
from tests.faults import faulty

DRIVES = """
import os, sys, time
from mmdiff_ray.distributed import lease, runs
from mmdiff_ray.distributed.launch import stop_requests
where, quiet_s, elsewhere = sys.argv[1], float(sys.argv[2]), bool(sys.argv[3])
lease.QUIET_S, lease.RENEW_S = quiet_s, quiet_s / 6
if elsewhere:
    real = lease.me
    lease.me = lambda: {**real(), "system": "another machine"}
say = lambda line: print(line, flush=True)
with lease.only_driver(runs.make(where), say, new=True), stop_requests() as stopped:
    say("drives")
    while not stopped():
        time.sleep(0.05)
say("stopped")
"""
QUIET_S = 2.4
pytestmark = pytest.mark.slow


class Driver:
    """A process that drives a run until it is asked to stop. elsewhere: as if on another machine."""

    def __init__(self, where: str, elsewhere: bool) -> None:
        words = [sys.executable, "-c", DRIVES, where, str(QUIET_S), "yes" if elsewhere else ""]
        begun_file(where)
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.line() == "drives\n"
        folder = filesystem(join(where, runs.DRIVERS))
        while not files_under(*folder):
            time.sleep(0.05)

    def line(self) -> str:
        return self.process.stdout.readline()

    def send(self, number: int) -> None:
        self.process.send_signal(number)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(lease, "QUIET_S", QUIET_S)
    monkeypatch.setattr(lease, "RENEW_S", QUIET_S / 6)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)


@pytest.fixture
def where(bucket, tmp_path) -> str:
    return bucket.uri(f"{tmp_path.name}/run")


@pytest.fixture
def begun(where, tmp_path, monkeypatch) -> Iterator[Callable[..., Driver]]:
    """Yield what starts drivers of a run, each on a machine with a cache of its own."""
    started = []

    def start(elsewhere: bool = False) -> Driver:
        with monkeypatch.context() as patch:
            patch.setenv("MMDIFF_CACHE", str(tmp_path / f"machine-{len(started)}"))
            started.append(Driver(where, elsewhere))
        return started[-1]

    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "mine"))
    yield start
    for driver in started:
        driver.process.kill()
        driver.process.communicate()


def notes(where: str) -> list[str]:
    return files_under(*filesystem(join(where, runs.DRIVERS)))


def written(where: str, note: str) -> int:
    """Return when a note was written, in nanoseconds."""
    return filesystem(where)[0].get_file_info(note).mtime_ns


def begun_file(where: str) -> None:
    """Write what storage knows a run by."""
    fs, root = filesystem(where)
    write_bytes_atomic(fs, f"{root}/{runs.RUN}", b"{}")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_another_driver_is_refused_while_one_is_alive_and_let_in_when_it_has_ended(begun, where, elsewhere):
    said: list[str] = []
    first = begun(elsewhere)
    folder = runs.make(where)
    time.sleep(1.5 * QUIET_S)  # longer than a lease that nobody renews
    with pytest.raises(ConfigError, match=rf": process {first.process.pid} on \S+ works on it; wait"):
        only_driver(folder, said.append).__enter__()
    seen = rf"process {first.process.pid} on \S+ drove {re.escape(where)} \d s ago and may be gone"
    assert [bool(re.match(seen, line)) for line in said] == [True] * elsewhere
    assert len(notes(where)) == 1
    first.send(signal.SIGINT)
    assert first.line() == "stopped\n" and notes(where) == []
    with only_driver(folder, said.append):
        assert len(notes(where)) == 1
    assert notes(where) == []


def test_a_driver_that_was_killed_here_is_not_waited_for(begun, where, monkeypatch):
    begun().send(signal.SIGKILL)
    monkeypatch.setattr(lease, "QUIET_S", 600.0)
    said: list[str] = []
    with only_driver(runs.make(where), said.append):
        assert said == [] and len(notes(where)) == 1


@pytest.mark.parametrize("ends", [False, True])
def test_a_driver_that_is_out_of_reach_is_waited_for_and_ends_if_it_comes_back(begun, where, ends):
    first, said = begun(elsewhere=True), []
    first.send(signal.SIGSTOP)
    paused = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(only_driver(runs.make(where), said.append))
        assert time.monotonic() - paused > 0.7 * QUIET_S
        assert len(said) == 1 and "may be gone; waiting to see whether it is" in said[0]
        if ends:
            stack.close()
        first.send(signal.SIGCONT)
        assert first.line() == (
            f"another process has taken {where} over, which this one did not reach; this one ends\n"
        )
        assert first.process.wait(20) == 1 and first.line() == ""
        assert len(notes(where)) == (0 if ends else 1)


def test_a_driver_that_nobody_has_replaced_goes_on_after_any_pause(begun, where):
    first = begun(elsewhere=True)
    (note,) = notes(where)
    first.send(signal.SIGSTOP)
    before = written(where, note)
    time.sleep(1.5 * QUIET_S)
    first.send(signal.SIGCONT)
    while written(where, note) == before:
        time.sleep(0.05)
    first.send(signal.SIGTERM)
    assert first.line() == "stopped\n" and notes(where) == []


def test_a_renewal_that_was_on_its_way_for_long_does_not_make_two_drivers(where, tmp_path, monkeypatch):
    """It lists, sleeps, is replaced, and writes: the next look finds the other one."""
    first = lease.Lease(where, pytest.fail)
    begun_file(where)
    assert not first._is_lost() and not first._is_lost()
    (note,) = notes(where)
    first._renewed -= 2 * QUIET_S
    second = lease.Lease(where, pytest.fail)
    second._write()
    assert len(notes(where)) == 2 and first._is_lost() and not second._is_lost()
    filesystem(where)[0].delete_file(note)
    assert first._is_lost() and not second._is_lost() and len(notes(where)) == 1


@pytest.mark.parametrize("left", [b"", b"{}", b'{"process": 3, "host": "a", "system": "b"}', b"\xff"])
def test_a_note_that_cannot_be_read_counts_until_it_is_old(where, left):
    fs, folder = filesystem(join(where, runs.DRIVERS))
    write_bytes_atomic(fs, f"{folder}/unreadable", left)
    said: list[str] = []
    begun = time.monotonic()
    with only_driver(runs.make(where), said.append):
        assert time.monotonic() - begun > 0.7 * QUIET_S and len(notes(where)) == 1
    assert len(said) == 1 and said[0].startswith(f"another process drove {where} ")


def test_a_new_run_has_no_note_before_it_is_known_in_storage(where):
    with only_driver(runs.make(where), pytest.fail, new=True):
        time.sleep(QUIET_S)
        assert notes(where) == [] and runs.begun(where) is None
        begun_file(where)
        while not notes(where):
            time.sleep(0.05)
    assert notes(where) == []


def test_storage_that_refuses_is_told_at_once(tmp_path, monkeypatch):
    where = f"file://{tmp_path}/storage/run"
    (tmp_path / "storage" / "run").mkdir(parents=True)
    (tmp_path / "storage" / "run" / runs.DRIVERS).touch()  # where a folder should be made
    with pytest.raises(ConfigError, match=r"^file://.*run: cannot be worked on: "):
        only_driver(runs.make(where), pytest.fail).__enter__()


def test_storage_that_is_away_ends_no_driver_and_lets_none_begin(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "mine"))
    monkeypatch.setattr(patience, "OUTAGE_S", 1.0)
    with faulty(bucket.port) as network:
        where = bucket.uri("away/run", network.port)
        folder = runs.make(where)
        with only_driver(folder, pytest.fail):
            (note,) = notes(where)
            network.down = True
            time.sleep(1.2 * QUIET_S)
            network.down = False
            before = written(where, note)
            while written(where, note) == before:
                time.sleep(0.1)
        assert notes(where) == []
        network.down = True
        with pytest.raises(OutageError, match=r"^cannot look into s3://toys/away/run"):
            only_driver(folder, pytest.fail).__enter__()


def test_of_two_that_begin_at_one_moment_not_both_go_on(tmp_path, monkeypatch):
    where, ended, outcomes = f"file://{tmp_path}/storage/run", threading.Barrier(2), []
    both = threading.Barrier(2)
    looks = lease.Lease._wait_for_others

    def look_together(self):
        looks(self)
        both.wait(20)

    monkeypatch.setattr(lease.Lease, "_wait_for_others", look_together)

    def begin() -> None:
        mine = lease.Lease(where, pytest.fail)
        try:
            mine.take()
            outcomes.append("drives")
        except ConfigError:
            outcomes.append("refused")
        ended.wait(20)

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 2 and outcomes.count("drives") <= 1


def test_a_folder_of_this_machine_alone_has_a_lock_and_no_lease(tmp_path):
    with only_driver(tmp_path, pytest.fail), pytest.raises(ConfigError, match="works on it"):
        only_driver(tmp_path, pytest.fail).__enter__()
    assert [path.name for path in Path(tmp_path).iterdir()] == ["lock"]


def test_what_is_said_of_a_process_can_be_written_down():
    assert json.loads(json.dumps(lease.me())) == {**lease.me(), "process": list(lease.me()["process"])}
