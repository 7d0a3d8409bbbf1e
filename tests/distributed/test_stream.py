"""The stream of rows through Ray Data: batch for batch what reading in this process gives."""

import shutil
import time
import uuid
from pathlib import Path

import pytest
import torch

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import OutageError
from mmdiff_ray.data.bad_rows import BadRowsError
from mmdiff_ray.data.batches import local_batches
from mmdiff_ray.data.plan import COPY
from mmdiff_ray.distributed import stream
from mmdiff_ray.distributed.stream import stream_batches
from tests import sprites as tiny
from tests.data.samples import flip_bit

pytestmark = pytest.mark.ray
STOP = 14
"""Batches of 16 rows: beyond the 180 rows of a visit."""


def same(first: Batch, second: Batch) -> bool:
    """Return whether two batches are the same bit for bit."""
    plain = [torch.equal(getattr(first, name), getattr(second, name)) for name in ("ids", "visits", "real")]
    return all(plain) and tiny.same(first.data, second.data) and tiny.same(first.present, second.present)


def both(job, rank: int, world: int, start: int, beside: bool = False) -> list[tuple[Batch, Batch]]:
    """Return a rank's batches as Ray Data and as this process reads them."""
    plan, reader = job.plan(), job.reader(job.denoiser())
    streamed = stream_batches(plan, reader, rank, world, start, STOP, 1, beside)
    return list(zip(streamed, local_batches(plan, reader, rank, world, start, STOP), strict=True))


@pytest.mark.parametrize("rank, world, start", [(0, 1, 0), (1, 2, 5), (0, 3, 0), (2, 3, 5)])
def test_stream_is_what_this_process_reads_at_any_world_and_from_any_batch(
    ray_cluster, sprites, rank, world, start
):
    job = tiny.job(sprites)
    pairs = both(job, rank, world, start)
    assert len(pairs) == STOP - start
    assert all(same(first, second) for first, second in pairs)
    assert len(pairs[0][0]) == -(-16 // world)
    assert int(pairs[-1][0].visits.max()) == 1


@pytest.mark.parametrize("rank, world, start", [(0, 1, 0), (1, 2, 5)])
def test_a_stream_of_balanced_classes_is_what_this_process_reads(ray_cluster, sprites, rank, world, start):
    job = tiny.job(sprites, "data.balance=shape")
    pairs = both(job, rank, world, start)
    assert len(pairs) == STOP - start and all(same(first, second) for first, second in pairs)
    assert any(int(first.visits.max()) >= COPY for first, _ in pairs)


def test_readers_beside_their_worker_ask_for_nothing_and_read_the_same(ray_cluster, sprites):
    import ray

    free = ray.available_resources()["CPU"]
    plan, reader = (job := tiny.job(sprites)).plan(), job.reader(job.denoiser())
    streamed = stream_batches(plan, reader, 0, 1, 0, STOP, 1, beside=True)
    next(streamed)
    assert ray.available_resources()["CPU"] >= free
    streamed.close()
    assert all(same(first, second) for first, second in both(job, 0, 2, 5, beside=True))


def test_stream_goes_on_where_one_segment_of_windows_ends(ray_cluster, sprites, monkeypatch):
    monkeypatch.setattr(stream, "SEGMENT_WINDOWS", 3)
    pairs = both(tiny.job(sprites), 0, 1, 0)
    assert len(pairs) == STOP and all(same(first, second) for first, second in pairs)


def test_corrupt_shard_stops_the_reader_of_the_stream_and_is_named(ray_cluster, sprites, tmp_path):
    data = Path(shutil.copytree(sprites, tmp_path / "sprites"))
    shard = next((data / "train").iterdir())
    for position in range(1000, shard.stat().st_size // 2, 500):
        flip_bit(str(shard), position)
    job = tiny.job(sprites)
    bad = tiny.config(str(data))
    reader = tiny.jobs.make_reader(bad, job.denoiser())
    with pytest.raises(BadRowsError, match=rf"data.bad_row_limit \(0\).*{shard.name}, row group"):
        list(stream_batches(job.plan(), reader, 0, 1, 0, STOP, data_workers=1))


def test_outage_of_the_readers_reaches_the_trainer_as_itself(ray_cluster, sprites):
    job = tiny.job(sprites)
    silent = SilentReader(job.reader(job.denoiser()))
    with pytest.raises(OutageError, match=r"^cannot read s3://toys$"):
        next(stream_batches(job.plan(), silent, 0, 1, 0, STOP, data_workers=1))


class SilentReader:
    """Read from storage that does not answer."""

    def __init__(self, reader) -> None:
        self.row_bytes, self.bad_row_limit = reader.row_bytes, reader.bad_row_limit

    def read(self, window):
        raise OutageError("cannot read s3://toys")


def test_reading_ahead_of_a_slow_trainer_is_bounded(ray_cluster, sprites, tmp_path):
    """Readers that are not held back take the cores that training needs."""
    job = tiny.job(sprites)
    plan, reader = job.plan(), CountedReader(job.reader(job.denoiser()), tmp_path)
    batches = stream_batches(plan, reader, 0, 1, 0, 1000, data_workers=1)
    windows = sum(1 for _ in plan.rank_windows(0, 1, 0, 1000))
    read = []
    for _ in range(20):
        next(batches)
        time.sleep(0.2)
        read.append(len(list(tmp_path.iterdir())))
    time.sleep(5)  # nothing is taken: readers that are not held back would go on
    read.append(len(list(tmp_path.iterdir())))
    batches.close()
    per_batch, ahead = windows / 1000, 40
    assert all(count < min(taken, 20) * per_batch + ahead for taken, count in enumerate(read, start=1))
    assert ahead < windows / 4


class CountedReader:
    """Leave a file for every window that was read."""

    def __init__(self, reader, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        self.row_bytes, self.bad_row_limit = reader.row_bytes, reader.bad_row_limit

    def read(self, window):
        """Read a window, and tell."""
        (self.folder / str(uuid.uuid4())).touch()
        return self.reader.read(window)
