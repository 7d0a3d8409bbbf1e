"""Row groups in Ray's object store: read from storage once, by whoever comes first."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.data.parquet import read_row_group, read_table
from mmdiff_ray.data.plan import GroupTable
from mmdiff_ray.sweeps.shelf import SharedTables, make_shelf
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


def test_processes_read_each_row_group_once_together(ray_cluster, toy):
    shelf, wanted = make_shelf(), groups(toy)
    here = [key for one in wanted for key in read_row_group(toy, one, ["key"])["key"]]
    there = ray.get([keys.remote(SharedTables(shelf), toy, wanted) for _ in range(4)])
    assert there == [here] * 4
    assert ray.get(shelf.facts.remote())["reads"] == len(wanted)


def test_what_is_kept_needs_no_storage_any_more(ray_cluster, toy):
    shelf, wanted = make_shelf(), groups(toy)
    tables = SharedTables(shelf)
    first = ray.get(keys.remote(tables, toy, wanted))
    for shard in Path(toy).glob("train/*.parquet"):
        shard.unlink()
    assert ray.get(keys.remote(tables, toy, wanted)) == first
    with pytest.raises(OSError):
        read_table(toy, wanted[0], ["id"])


def test_what_does_not_fit_is_read_from_storage(ray_cluster, toy):
    wanted = groups(toy)
    size = read_table(toy, wanted[0], ["id", "key", "look"]).nbytes
    shelf = make_shelf(int(2.5 * size))
    tables = SharedTables(shelf)
    assert ray.get(keys.remote(tables, toy, wanted)) == ray.get(keys.remote(tables, toy, wanted))
    assert 0 < ray.get(shelf.facts.remote())["bytes"] <= 2.5 * size


def test_a_shelf_that_died_is_done_without(ray_cluster, toy):
    shelf, wanted = make_shelf(), groups(toy)
    tables = SharedTables(shelf)
    before = ray.get(keys.remote(tables, toy, wanted))
    ray.kill(shelf)
    assert ray.get(keys.remote(tables, toy, wanted)) == before


def test_rows_read_through_a_shelf_are_the_same_and_corrupt_ones_are_told_as_ever(ray_cluster, toy):
    plain, shared = samples.reader([toy]), samples.reader([toy])
    shared._tables = SharedTables(make_shelf())
    table = GroupTable(read_manifest(toy).splits["train"])
    window = samples.Window(0, 0, tuple(table.row(number) for number in range(20)))
    first, second = plain.read(window), shared.read(window)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    shard = next(Path(toy).glob("train/*.parquet"))
    shard.write_bytes(b"PAR1" + bytes(1000) + b"PAR1")
    again = samples.reader([toy])
    again._tables = SharedTables(make_shelf())
    assert list(again.read(window)["error"]) == list(samples.reader([toy]).read(window)["error"])
    assert not all(again.read(window)["real"])
