"""The data layer on an object store, a real S3 server on the loopback."""

import pytest

from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.data.bad_rows import BadRowsError
from mmdiff_ray.data.batches import local_batches
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.data.plan import Plan
from mmdiff_ray.data.shards import verify
from mmdiff_ray.storage import retry
from mmdiff_ray.storage.filesystem import filesystem, list_files, read_bytes, write_atomic
from tests import s3
from tests.data.samples import interrupted, pairs, reader, write
from tests.faults import faulty
from tests.storage.test_retry import on_warning

pytestmark = pytest.mark.slow


def test_a_data_set_on_an_object_store_is_written_taken_up_read_and_checked(
    bucket: s3.Bucket, tmp_path
) -> None:
    uri, local = bucket.uri("some/toy"), str(tmp_path / "toy")
    with pytest.raises(ConfigError, match="no data set at s3://toys/some/toy"):
        read_manifest(uri)
    for number in interrupted(uri, range(60)):
        if number == 40:
            break
    assert write(uri, range(60)) == write(local, range(60)) == read_manifest(uri)
    assert verify(uri) == []
    with pytest.raises(ConfigError, match="finished and is never overwritten"):
        write(uri, range(60))

    plan = Plan([(read_manifest(uri).splits["train"], 1.0)], lanes=2, window=2, global_batch=8, seed=0)
    there = pairs(local_batches(plan, reader([uri]), stop_batch=12, threads=2))
    assert there == pairs(local_batches(plan, reader([local]), stop_batch=12))

    fs, root = filesystem(uri)
    shard = f"{root}/train/00001.parquet"
    data = bytearray(read_bytes(fs, shard))
    data[700] ^= 1
    write_atomic(fs, shard, bytes(data))
    assert len(verify(uri)) == 1
    with pytest.raises(BadRowsError, match=r"train/00001.parquet"):
        list(local_batches(plan, reader([uri]), stop_batch=12))

    write(uri, range(20), force=True)
    assert list(list_files(fs, root)) == names_of(uri)


def test_an_upload_that_breaks_off_is_made_again_and_a_build_that_gives_up_goes_on(
    bucket: s3.Bucket, tmp_path, monkeypatch
) -> None:
    whole = write(str(tmp_path / "toy"), range(60))
    with faulty(bucket.port) as network:
        uri = bucket.uri("toy", network.port)
        rows = interrupted(uri, range(60))
        for number in rows:
            if number == 5:
                network.cut_after = 2000
                break
        with on_warning(lambda: setattr(network, "cut_after", None)) as warnings:
            assert next(number for number in rows if number == 40)
        assert network.cut > 0 and len(warnings) == 1
        assert warnings[0].startswith(f"cannot write to {uri}, retrying for 180 s: ")

        network.cut_after = 2000
        monkeypatch.setattr(retry, "OUTAGE_S", 0.0)
        with pytest.raises(RunError, match=r"^cannot write to s3://toys/toy.*; run the same command again"):
            list(rows)
        network.cut_after = None
        assert write(uri, range(60)) == whole and verify(uri) == []


def names_of(uri: str) -> list[str]:
    shards = [shard.path for split in read_manifest(uri).splits.values() for shard in split.shards]
    return sorted(["manifest.json", *shards])
