"""Row groups in Ray's object store: read from storage once, by whoever comes first."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.data.parquet import read_row_group, read_table
from mmdiff_ray.data.plan import GroupTable
from mmdiff_ray.distributed.tune.table_cache import SharedTables, start_cache
from tests.data import samples

pytestmark = pytest.mark.ray


@pytest.fixture
def toy(tmp_path: Path) -> str:
    samples.write(str(tmp_path / "toy"), range(60))
    return str(tmp_path / "toy")


def groups(uri: str) -> list[Any]:
    split = read_manifest(uri).splits["train"]
    return [shard.row_group(group) for shard in split.shards for group in range(len(shard.row_groups))]


@ray.remote(num_cpus=1)
def keys(tables: SharedTables, uri: str, wanted: list[Any]) -> list[str]:
    """Return the keys of all rows, read in a process of its own."""
    found = []
    for row_group in wanted:
        found += read_row_group(uri, row_group, ["key", "look"], tables=tables)["key"]
    return found


def test_processes_read_each_row_group_from_storage_once_and_survive_the_cache(ray_cluster, toy):
    cache, wanted = start_cache(), groups(toy)
    here = [key for one in wanted for key in read_row_group(toy, one, ["key"])["key"]]
    tables = SharedTables(cache)
    assert ray.get([keys.remote(tables, toy, wanted) for _ in range(4)]) == [here] * 4
    assert ray.get(cache.facts.remote())["reads"] == len(wanted)
    shards = {shard: shard.read_bytes() for shard in Path(toy).glob("train/*.parquet")}
    for shard in shards:
        shard.unlink()
    assert ray.get(keys.remote(tables, toy, wanted)) == here, "without storage"
    for shard, content in shards.items():
        shard.write_bytes(content)
    ray.kill(cache)
    assert ray.get(keys.remote(tables, toy, wanted)) == here, "without the cache"


def test_what_does_not_fit_is_read_from_storage(ray_cluster, toy):
    wanted = groups(toy)
    size = read_table(toy, wanted[0], ["id", "key", "look"]).nbytes
    cache = start_cache(int(2.5 * size))
    tables = SharedTables(cache)
    assert ray.get(keys.remote(tables, toy, wanted)) == ray.get(keys.remote(tables, toy, wanted))
    assert 0 < ray.get(cache.facts.remote())["bytes"] <= 2.5 * size


def test_rows_read_through_a_cache_are_the_same_and_corrupt_ones_are_reported(ray_cluster, toy):
    plain, shared = samples.reader([toy]), samples.reader([toy])
    shared._tables = SharedTables(start_cache())
    table = GroupTable(read_manifest(toy).splits["train"])
    window = samples.Window(0, 0, tuple(table.row(number) for number in range(20)))
    first, second = plain.read(window), shared.read(window)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    shard = next(Path(toy).glob("train/*.parquet"))
    shard.write_bytes(b"PAR1" + bytes(1000) + b"PAR1")
    again = samples.reader([toy])
    again._tables = SharedTables(start_cache())
    assert list(again.read(window)["error"]) == list(samples.reader([toy]).read(window)["error"])
    assert not all(again.read(window)["real"])
