"""A folder has one process at a time; a run in storage has one driver, on whatever machine it is."""

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
from mmdiff_ray.storage import lock, retry
from mmdiff_ray.storage.filesystem import filesystem, join, list_files, write_atomic
from mmdiff_ray.storage.lock import DRIVERS, Lease, lock_folder
from tests.faults import faulty

HOLDS = """
import sys, time
from pathlib import Path
from mmdiff_ray.storage.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""
DRIVES = """
import sys, time
from mmdiff_ray.distributed.launch import stop_requests
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.storage import lock
where, expiry_s, elsewhere = sys.argv[1], float(sys.argv[2]), bool(sys.argv[3])
lock.EXPIRY_S, lock.RENEW_S = expiry_s, expiry_s / 6
if elsewhere:
    real = lock._this_process
    lock._this_process = lambda: {**real(), "system": "another machine"}
say = lambda line: print(line, flush=True)
with runs.lock_run(runs.make_cache(where), say), stop_requests() as stopped:
    say("drives")
    while not stopped():
        time.sleep(0.05)
say("stopped")
"""
EXPIRY_S = 2.4
pytestmark = pytest.mark.slow


class Driver:
    """A process that drives a run until it is asked to stop. elsewhere: as if on another machine."""

    def __init__(self, where: str, elsewhere: bool) -> None:
        words = [sys.executable, "-c", DRIVES, where, str(EXPIRY_S), "yes" if elsewhere else ""]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.line() == "drives\n"

    def line(self) -> str:
        return self.process.stdout.readline()

    def send(self, number: int) -> None:
        self.process.send_signal(number)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(lock, "EXPIRY_S", EXPIRY_S)
    monkeypatch.setattr(lock, "RENEW_S", EXPIRY_S / 6)
    monkeypatch.setattr(lock, "POLL_S", 0.1)


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


def leases(where: str) -> list[str]:
    return list(list_files(*filesystem(join(where, DRIVERS))))


def written(where: str) -> int:
    """Return when the only lease was written, in nanoseconds."""
    (info,) = list_files(*filesystem(join(where, DRIVERS))).values()
    return info.mtime_ns


def test_a_folder_has_one_process_until_that_has_ended(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "holds\n"
    with pytest.raises(ConfigError, match=rf"{tmp_path}: process {other.pid} on \S+ works on it; wait"):
        lock_folder(tmp_path).__enter__()
    threading.Timer(1.0, other.kill).start()
    with lock_folder(tmp_path, timeout_s=60):
        assert other.poll() is not None or other.wait(5)
    other.communicate()
    with runs.lock_run(tmp_path, pytest.fail), pytest.raises(ConfigError, match="works on it"):
        runs.lock_run(tmp_path, pytest.fail).__enter__()
    assert [path.name for path in Path(tmp_path).iterdir()] == ["lock"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_another_driver_is_refused_while_one_is_alive_and_let_in_when_it_has_ended(begun, where, elsewhere):
    said: list[str] = []
    first = begun(elsewhere)
    folder = runs.make_cache(where)
    time.sleep(1.5 * EXPIRY_S)  # longer than a lease that nobody renews
    with pytest.raises(ConfigError, match=rf": process {first.process.pid} on \S+ works on it; wait"):
        runs.lock_run(folder, said.append).__enter__()
    seen = rf"process {first.process.pid} on \S+ used {re.escape(where)} \d s ago and may have died"
    assert [bool(re.match(seen, line)) for line in said] == [True] * elsewhere
    assert len(leases(where)) == 1
    first.send(signal.SIGINT)
    assert first.line() == "stopped\n" and leases(where) == []
    with runs.lock_run(folder, said.append):
        assert len(leases(where)) == 1
    assert leases(where) == []


def test_a_driver_that_was_killed_here_is_not_waited_for(begun, where, monkeypatch):
    begun().send(signal.SIGKILL)
    monkeypatch.setattr(lock, "EXPIRY_S", 600.0)
    said: list[str] = []
    with runs.lock_run(runs.make_cache(where), said.append):
        assert said == [] and len(leases(where)) == 1


@pytest.mark.parametrize("ends", [False, True])
def test_a_driver_that_is_out_of_reach_is_waited_for_and_ends_if_it_comes_back(begun, where, ends):
    first, said = begun(elsewhere=True), []
    first.send(signal.SIGSTOP)
    paused = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(runs.lock_run(runs.make_cache(where), said.append))
        assert time.monotonic() - paused > 0.7 * EXPIRY_S
        assert len(said) == 1 and "may have died; waiting up to" in said[0]
        if ends:
            stack.close()
        first.send(signal.SIGCONT)
        assert first.line() == (
            f"another process has taken over {where} while this one could not reach it; exiting\n"
        )
        assert first.process.wait(20) == 1 and first.line() == ""
        assert len(leases(where)) == (0 if ends else 1)


def test_a_driver_that_nobody_has_replaced_goes_on_after_any_pause(begun, where):
    first = begun(elsewhere=True)
    first.send(signal.SIGSTOP)
    before = written(where)
    time.sleep(1.5 * EXPIRY_S)
    first.send(signal.SIGCONT)
    while written(where) == before:
        time.sleep(0.05)
    first.send(signal.SIGTERM)
    assert first.line() == "stopped\n" and leases(where) == []


def test_a_late_renewal_does_not_make_two_drivers(where):
    """A driver lists, sleeps, is replaced, and renews: it ends when it sees the other lease."""
    first, second = Lease(where, pytest.fail), Lease(where, pytest.fail)
    first._write()
    assert not first._is_lost()
    first._renewed -= 2 * EXPIRY_S
    second._write()
    assert len(leases(where)) == 2 and first._is_lost() and not second._is_lost()
    first._remove(first._path)
    assert first._is_lost() and not second._is_lost() and len(leases(where)) == 1


@pytest.mark.parametrize("left", [b"", b"{}", b'{"process": 3, "host": "a", "system": "b"}', b"\xff"])
def test_a_lease_that_cannot_be_read_counts_until_it_expires(where, left):
    fs, folder = filesystem(join(where, DRIVERS))
    write_atomic(fs, f"{folder}/unreadable", left)
    said: list[str] = []
    begun = time.monotonic()
    with runs.lock_run(runs.make_cache(where), said.append):
        assert time.monotonic() - begun > 0.7 * EXPIRY_S and len(leases(where)) == 1
    assert len(said) == 1 and said[0].startswith(f"another process used {where} ")


def test_storage_that_refuses_is_reported_at_once(tmp_path):
    where = f"file://{tmp_path}/storage/run"
    (tmp_path / "storage" / "run").mkdir(parents=True)
    (tmp_path / "storage" / "run" / DRIVERS).touch()  # where a folder should be made
    with pytest.raises(ConfigError, match=r"^file://.*run: cannot be locked: "):
        runs.lock_run(runs.make_cache(where), pytest.fail).__enter__()


def test_storage_that_is_away_ends_no_driver_and_lets_none_begin(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "mine"))
    monkeypatch.setattr(retry, "OUTAGE_S", 1.0)
    with faulty(bucket.port) as network:
        where = bucket.uri("away/run", network.port)
        folder = runs.make_cache(where)
        with runs.lock_run(folder, pytest.fail):
            network.down = True
            time.sleep(1.2 * EXPIRY_S)
            network.down = False
            before = written(where)
            while written(where) == before:
                time.sleep(0.1)
        assert leases(where) == []
        network.down = True
        with pytest.raises(OutageError, match=r"^cannot list s3://toys/away/run"):
            runs.lock_run(folder, pytest.fail).__enter__()


def test_of_two_that_begin_at_one_moment_not_both_go_on(tmp_path, monkeypatch):
    where, written, ended, outcomes = f"file://{tmp_path}/run", threading.Barrier(2), threading.Barrier(2), []
    write = Lease._write

    def write_together(self):
        write(self)
        written.wait(20)

    monkeypatch.setattr(Lease, "_write", write_together)

    def begin() -> None:
        try:
            with Lease(where, pytest.fail):
                outcomes.append("drives")
                ended.wait(20)
        except ConfigError:
            outcomes.append("refused")
            ended.wait(20)

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 2 and outcomes.count("drives") <= 1
