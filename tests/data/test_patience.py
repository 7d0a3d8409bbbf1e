"""Storage that does not answer: tried again for a while, told once; what time does not mend is not."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmdiff_ray.config import ConfigError, OutageError
from mmdiff_ray.data.batches import local_batches
from mmdiff_ray.data.plan import Plan
from mmdiff_ray.storage import retry as patience
from mmdiff_ray.storage.retry import patiently
from tests.data.samples import pairs, reader, write
from tests.faults import faulty


@contextlib.contextmanager
def when_told(act: Callable[[], object]) -> Iterator[list[str]]:
    """Do something as soon as an outage is told; yield what is told."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())
            act()

    listener, logger = Listener(), logging.getLogger(patience.__name__)
    logger.addHandler(listener)
    try:
        yield told
    finally:
        logger.removeHandler(listener)


def no_answer() -> None:
    raise OSError("no route")


def test_an_outage_is_told_once_however_many_meet_it() -> None:
    with when_told(lambda: None) as told:
        for _ in range(2):
            with pytest.raises(OutageError, match=r"^cannot read x, tried for 0 s: no route$"):
                patiently(no_answer, "read x", longest_s=0.0)
    assert told == ["cannot read x, which is tried again for 0 s: no route"]


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("no"), OSError(28, "full")])
def test_what_time_does_not_mend_is_not_tried_again(error: OSError) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        patiently(fail, "read x")
    assert caught.value is error and len(calls) == 1


def test_nobody_waits_for_readers_in_an_outage_when_a_stream_is_closed(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    plan = Plan([(write(uri, range(60), rows_per_shard=4).splits["train"], 1.0)], 4, 2, 8, 0)
    windows = [window for _, window in plan.rank_windows(0, 1, 0, 5)]
    first, later = ({group.path for w in part for group, _ in w.places()} for part in (windows[:4], windows))
    for path in later - first:  # a folder in a shard's place: the disk gives neither bytes nor a reason
        (tmp_path / "toy" / path).unlink()
        (tmp_path / "toy" / path).mkdir()
    met = threading.Event()
    with when_told(met.set):
        batches = local_batches(plan, reader([uri]), stop_batch=5)
        next(batches)
        assert met.wait(60)
        begun = time.monotonic()
        batches.close()
    assert time.monotonic() - begun < patience.OUTAGE_S / 2


@pytest.mark.slow
def test_an_outage_in_mid_stream_costs_time_and_no_row(bucket, tmp_path: Path, monkeypatch) -> None:
    write(bucket.uri("toy"), range(60))
    local = str(tmp_path / "toy")
    plan = Plan([(write(local, range(60)).splits["train"], 1.0)], 2, 2, 8, 0)
    with faulty(bucket.port) as network:
        there = reader([bucket.uri("toy", network.port)], bad_row_limit=1000)
        batches = local_batches(plan, there, stop_batch=12)
        found = [next(batches)]
        network.down = True
        with when_told(lambda: setattr(network, "down", False)) as told:
            found += batches
        assert pairs(found) == pairs(local_batches(plan, reader([local]), stop_batch=12))
        assert all(bool(batch.real.all()) for batch in found)
        assert len(told) == 1 and told[0].startswith(f"cannot read {there.uris[0]}, which is tried again for")

        network.down = True
        monkeypatch.setattr(patience, "OUTAGE_S", 0.0)
        with pytest.raises(OutageError, match=r"^cannot read s3://toys/toy.*, tried for 0 s: ") as caught:
            next(local_batches(plan, there))
        assert not isinstance(caught.value, ConfigError)
        with pytest.raises(OutageError, match=r"^cannot read s3://toys/toy"):
            reader([bucket.uri("toy", network.port)])
