"""Storage that does not answer: retried for a while, with one warning; permanent errors are not."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmdiff_ray.config import ConfigError, OutageError, UnreachableError
from mmdiff_ray.data.batches import local_batches
from mmdiff_ray.data.plan import Plan
from mmdiff_ray.storage import retry as retry_module
from mmdiff_ray.storage.retry import retry, with_timeout
from tests.data.samples import pairs, reader, write
from tests.faults import faulty


@contextlib.contextmanager
def on_warning(act: Callable[[], object]) -> Iterator[list[str]]:
    """Do something as soon as an outage is logged; yield the warnings."""
    warnings: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())
            act()

    listener, logger = Listener(), logging.getLogger(retry_module.__name__)
    logger.addHandler(listener)
    try:
        yield warnings
    finally:
        logger.removeHandler(listener)


def no_answer() -> None:
    raise OSError("no route")


def test_an_outage_is_one_warning_however_many_threads_meet_it() -> None:
    with on_warning(lambda: None) as warnings:
        for _ in range(2):
            with pytest.raises(OutageError, match=r"^cannot read x, retried for 0 s: no route$"):
                retry(no_answer, "read x", timeout_s=0.0)
    assert warnings == ["cannot read x, retrying for 0 s: no route"]


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("no"), OSError(28, "full")])
def test_a_permanent_error_is_not_retried(error: OSError) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        retry(fail, "read x")
    assert caught.value is error and len(calls) == 1


def test_a_stream_that_is_closed_during_an_outage_ends_the_retries(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    plan = Plan([(write(uri, range(60), rows_per_shard=4).splits["train"], 1.0)], 4, 2, 8, 0)
    windows = [window for _, window in plan.rank_windows(0, 1, 0, 5)]
    first, later = ({group.path for w in part for group, *_ in w.places()} for part in (windows[:4], windows))
    for path in later - first:  # a folder in a shard's place: the disk gives neither bytes nor a reason
        (tmp_path / "toy" / path).unlink()
        (tmp_path / "toy" / path).mkdir()
    met = threading.Event()
    with on_warning(met.set):
        batches = local_batches(plan, reader([uri]), stop_batch=5)
        next(batches)
        assert met.wait(60)
        begun = time.monotonic()
        batches.close()
    assert time.monotonic() - begun < retry_module.OUTAGE_S / 2


@pytest.mark.slow
def test_an_outage_in_mid_stream_costs_time_and_no_row(bucket, tmp_path: Path, monkeypatch) -> None:
    write(bucket.uri("toy"), range(60))
    local = str(tmp_path / "toy")
    plan = Plan([(write(local, range(60)).splits["train"], 1.0)], 2, 2, 8, 0)
    with faulty(bucket.port) as network:
        there = reader([bucket.uri("toy", network.port)], bad_row_limit=1000, cache_mb=0)
        batches = local_batches(plan, there, stop_batch=12)
        found = [next(batches)]
        network.down = True
        with on_warning(lambda: setattr(network, "down", False)) as warnings:
            found += batches
        assert pairs(found) == pairs(local_batches(plan, reader([local]), stop_batch=12))
        assert all(bool(batch.real.all()) for batch in found)
        assert len(warnings) == 1 and warnings[0].startswith(f"cannot read {there.uris[0]}, retrying for")

        network.down = True
        monkeypatch.setattr(retry_module, "OUTAGE_S", 0.0)
        with pytest.raises(OutageError, match=r"^cannot read s3://toys/toy.*, retried for 0 s: ") as caught:
            next(local_batches(plan, there))
        assert not isinstance(caught.value, ConfigError)
        with pytest.raises(OutageError, match=r"^cannot read s3://toys/toy"):
            reader([bucket.uri("toy", network.port)])


def test_an_answer_that_takes_too_long_is_not_waited_for() -> None:
    with pytest.raises(UnreachableError, match=r"the store is silent within 0.05 s"):
        with_timeout(0.05, threading.Event().wait, "the store is silent")
    assert with_timeout(5.0, lambda: 3, "") == 3
    with pytest.raises(KeyError):
        with_timeout(5.0, {}.popitem, "")
