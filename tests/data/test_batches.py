"""Rows from shards to batches: order, content, bad rows."""

import itertools
import logging
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import ConfigError, DataConfig
from mmdiff_ray.data.bad_rows import BadRows, BadRowsError
from mmdiff_ray.data.batches import local_batches, rank_batches, split_batches
from mmdiff_ray.data.manifest import Manifest
from mmdiff_ray.data.plan import Piece, Plan, Window
from mmdiff_ray.data.reader import RowReader
from mmdiff_ray.data.shards import ShardWriter, row_id
from mmdiff_ray.distributed.board import Board
from mmdiff_ray.modalities.image import ImageModality
from tests.data.samples import LABELS, flip_bit, modalities, pairs, reader, row, write

ROWS = 100


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[str, Manifest]:
    uri = str(tmp_path_factory.mktemp("data") / "toy")
    return uri, write(uri, range(ROWS))


def plan_of(*manifests: Manifest, weights: tuple[float, ...] = (1.0, 1.0), seed: int = 0) -> Plan:
    sources = [
        (manifest.splits["train"], weight) for manifest, weight in zip(manifests, weights, strict=False)
    ]
    return Plan(sources, lanes=4, window=2, global_batch=8, seed=seed)


def same(one: Batch, two: Batch) -> bool:
    return all(torch.equal(one.data[name], two.data[name]) for name in one.data) and torch.equal(
        one.ids, two.ids
    )


def joined(parts: tuple[Batch, ...]) -> Batch:
    data = {name: torch.cat([part.data[name] for part in parts]) for name in parts[0].data}
    present = {name: torch.cat([part.present[name] for part in parts]) for name in parts[0].present}
    ids, visits, real = (torch.cat([getattr(part, f) for part in parts]) for f in ("ids", "visits", "real"))
    return Batch(ids, visits, real, data, present)


def test_a_visit_reads_every_row_of_the_split_once(toy) -> None:
    uri, manifest = toy
    rows = manifest.splits["train"].rows
    batches = list(local_batches(plan_of(manifest), reader([uri]), stop_batch=-(-rows * 2 // 8)))
    seen = Counter(pairs(batches))
    train = {row_id(f"row {number}") for number in range(ROWS)} - val_ids(uri, manifest)
    assert max(seen.values()) == 1
    assert set(seen) >= {(visit, number) for visit in (0, 1) for number in train}
    assert all(bool(batch.real.all()) for batch in batches)


def val_ids(uri: str, manifest: Manifest) -> set[int]:
    splits = [manifest.splits["val"]]
    return {
        number for _, number in pairs(split_batches(reader([uri]), splits, splits[0].rows, splits[0].rows))
    }


def test_rows_arrive_with_their_own_values(toy) -> None:
    uri, manifest = toy
    known = {row_id(f"row {number}"): row(number) for number in range(ROWS)}
    plain = reader([uri], backgrounds="white", flip=False)
    for batch in local_batches(plan_of(manifest), plain, stop_batch=12):
        assert batch.data["pixels"].shape == (8, 3, 8, 8) and batch.data["pixels"].dtype == torch.uint8
        for slot, number in enumerate(batch.ids.tolist()):
            want = known[number]
            assert bool(batch.present["category"][slot]) == (want["category"] is not None)
            assert bool(batch.present["look"][slot]) == (want["look"] is not None)
            if want["category"] is not None:
                assert LABELS[int(batch.data["category"][slot])] == want["category"]
            white = (batch.data["pixels"][slot] == 255).all(0)
            assert bool(white[batch.data["alpha"][slot] == 0].all())
            visible = batch.data["masked"][slot, 3] > 0
            assert torch.equal(
                batch.data["masked"][slot, :3, visible], batch.data["pixels"][slot][:, visible]
            )


def test_every_visit_of_a_split_has_the_same_rows_over_other_backgrounds(toy) -> None:
    uri, manifest = toy
    splits = [manifest.splits["train"]]
    (once,) = split_batches(reader([uri]), splits, 10, 16)
    first, second, third = split_batches(reader([uri]), splits, 10, 16, visits=3)
    assert same(once, first)
    for number, batch in enumerate((first, second, third)):
        assert torch.equal(batch.ids, once.ids) and torch.equal(batch.real, once.real)
        assert batch.visits[batch.real].eq(number).all()
    assert not torch.equal(second.data["pixels"], first.data["pixels"])
    assert not torch.equal(second.data["pixels"], third.data["pixels"])


@pytest.mark.parametrize("world", [2, 4])
def test_workers_together_read_what_one_reads(toy, world: int) -> None:
    uri, manifest = toy
    one = plan_of(manifest)
    whole = local_batches(one, reader([uri]), stop_batch=15)
    parts = [local_batches(one, reader([uri]), rank, world, stop_batch=15) for rank in range(world)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert same(batch, joined(tuple(shares)))


def test_resuming_in_mid_window_gives_the_same_bytes(toy, tmp_path: Path) -> None:
    uri, manifest = toy
    other = str(tmp_path / "other")
    mixed = plan_of(manifest, write(other, range(500, 530)), weights=(3.0, 1.0))
    whole = list(local_batches(mixed, reader([uri, other]), stop_batch=30))
    assert {bool((batch.visits > 0).any()) for batch in whole} == {False, True}
    for start in (1, 7, 22):
        resumed = list(
            local_batches(mixed, reader([uri, other]), start_batch=start, stop_batch=30, threads=2)
        )
        assert len(resumed) == 30 - start
        assert all(same(one, two) for one, two in zip(whole[start:], resumed, strict=True))


def test_a_row_is_drawn_anew_at_every_visit(toy) -> None:
    uri, manifest = toy
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in local_batches(plan_of(manifest), reader([uri]), stop_batch=30):
        for number, pixels in zip(batch.ids.tolist(), batch.data["pixels"], strict=True):
            seen.setdefault(number, []).append(pixels)
    again = [versions for versions in seen.values() if len(versions) > 1]
    assert len(again) > 60
    assert sum(not torch.equal(*versions[:2]) for versions in again) > 0.95 * len(again)


def test_a_source_without_a_column_gives_rows_that_lack_it(toy, tmp_path: Path) -> None:
    uri, manifest = toy
    poor = str(tmp_path / "poor")
    writer = ShardWriter(poor, "poor", {"pixels": {"kind": "image"}}, val_share=0.0)
    for number in range(20):
        writer.add({"key": f"poor {number}", "pixels": row(number)["pixels"]})
    batches = list(local_batches(plan_of(manifest, writer.close()), reader([uri, poor]), stop_batch=8))
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    lacking = torch.cat([~batch.present["alpha"] for batch in batches]).tolist()
    poor_ids = {row_id(f"poor {number}") for number in range(20)}
    assert [number in poor_ids for number in ids] == lacking
    assert all(bool(batch.present["pixels"].all()) for batch in batches)


def test_kept_rows_are_the_rows_of_the_data_set_and_need_no_shard(tmp_path: Path) -> None:
    uri = str(tmp_path / "gone")
    manifest = write(uri, range(ROWS))
    windows = list(itertools.islice(plan_of(manifest).windows(0), 24))
    plain, keeps = reader([uri], cache_mb=0), reader([uri])
    want = [plain.read(window) for window in windows]
    for window in windows:
        keeps.read(window)
    sent = pickle.dumps(keeps)
    for shard in Path(uri).rglob("*.parquet"):
        shard.unlink()
    found = [keeps.read(window) for window in windows]
    assert windows[-1].visit > 0 and all(part["real"].all() for part in found)
    for one, two in zip(want, found, strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)
    assert (
        len(sent) < len(pickle.dumps(plain)) + 100 and not pickle.loads(sent).read(windows[0])["real"].any()
    )


def test_a_row_group_that_breaks_later_costs_the_rows_that_are_not_kept_alone(tmp_path) -> None:
    uri = str(tmp_path / "breaks")
    (shard,) = write(uri, range(4), val_share=0).splits["train"].shards
    keeps = reader([uri])
    first = keeps.read(Window(0, 0, (Piece(shard.row_group(0), 0, 2),)))
    Path(uri, shard.path).unlink()
    found = keeps.read(Window(0, 0, (Piece(shard.row_group(0), 0, 4),)))
    assert found["real"].tolist() == [True, True, False, False]
    assert found["ids"][:2].tolist() == first["ids"].tolist()


def test_what_is_kept_stays_within_its_limit(toy) -> None:
    uri, manifest = toy
    few = reader([uri])
    few._cache.limit = 20_000
    for window in itertools.islice(plan_of(manifest).windows(0), 24):
        few.read(window)
    assert 0 < few._cache._bytes <= 20_000 and 2 < len(few._cache._kept) < 20


def test_a_reader_can_be_sent_to_another_process(toy, monkeypatch) -> None:
    uri, manifest = toy
    monkeypatch.chdir(Path(uri).parent)
    here = reader([Path(uri).name])
    sent = pickle.dumps(here)
    monkeypatch.chdir("/")
    window = next(plan_of(manifest).windows(0))
    one, two = here.read(window), pickle.loads(sent).read(window)
    assert set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)
    assert one["real"].all()


def test_evaluation_rows_are_always_the_same_and_padded_at_the_end(toy) -> None:
    uri, manifest = toy
    splits = [manifest.splits["train"]]
    few, many = (list(split_batches(reader([uri]), splits, rows, 16)) for rows in (20, 1000))
    assert [len(batch) for batch in few] == [16, 16]
    assert few[1].real.tolist() == [True] * 4 + [False] * 12
    assert same(few[0], many[0])
    assert pairs(few)[:20] == pairs(many)[:20]
    assert {visit for visit, _ in pairs(many)} == {0}
    real = torch.cat([batch.ids[batch.real] for batch in many]).tolist()
    assert len(real) == len(set(real)) == splits[0].rows


def test_evaluation_rows_spread_over_the_split_and_over_all_sources(toy, tmp_path: Path) -> None:
    uri, manifest = toy
    other = str(tmp_path / "other")
    small = write(other, range(500, 506), val_share=0.0)
    manifests, both = [manifest, small], reader([uri, other])
    (batch,) = split_batches(both, [m.splits["train"] for m in manifests], 16, 16)
    small_ids = {row_id(f"row {number}") for number in range(500, 506)}
    assert sum(number in small_ids for number in batch.ids.tolist()) == 6
    order = [number for number in range(ROWS) if row_id(f"row {number}") in set(batch.ids.tolist())]
    assert min(order) < 20 and max(order) > 80


DAMAGE = {
    "a flipped bit": lambda path: flip_bit(path, 700),
    "a flipped bit in the footer": lambda path: flip_bit(path, os.path.getsize(path) - 300),
    "a truncated file": lambda path: os.truncate(path, os.path.getsize(path) // 2),
    "a file of zero bytes": lambda path: os.truncate(path, 0),
    "a file of eight bytes": lambda path: os.truncate(path, 8),
    "a missing file": os.remove,
    "another shard's bytes": lambda path: shutil.copy(path.replace("00001", "00002"), path),
}


@pytest.fixture
def damaged(toy, tmp_path: Path) -> str:
    shutil.copytree(toy[0], tmp_path / "damaged")
    return str(tmp_path / "damaged")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_corrupt_shard_stops_the_run_and_names_the_place(toy, damaged: str, damage) -> None:
    damage(f"{damaged}/train/00001.parquet")
    with pytest.raises(
        BadRowsError, match=r"more than data.bad_row_limit \(0\).*damaged/train/00001.parquet, row group"
    ):
        list(local_batches(plan_of(toy[1]), reader([damaged]), stop_batch=10))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_tolerated_bad_rows_are_padding_and_move_no_other_row(toy, damaged: str, damage, caplog) -> None:
    damage(f"{damaged}/train/00001.parquet")
    clean = local_batches(plan_of(toy[1]), reader([toy[0]]), stop_batch=10)
    with caplog.at_level(logging.WARNING):
        found = list(local_batches(plan_of(toy[1]), reader([damaged], bad_row_limit=16), stop_batch=10))
    lost = 0
    for one, two in zip(clean, found, strict=True):
        assert same(pick(one, two.real), pick(two, two.real))
        assert not bool(two.present["pixels"][~two.real].any())
        lost += int((~two.real).sum())
    assert 1 <= lost <= 16
    assert "rows could not be read so far" in caplog.text and "00001.parquet" in caplog.text


def pick(batch: Batch, where: torch.Tensor) -> Batch:
    data, present = ({name: v[where] for name, v in part.items()} for part in (batch.data, batch.present))
    return Batch(batch.ids[where], batch.visits[where], batch.real[where], data, present)


def test_a_row_that_cannot_be_decoded_is_one_bad_row(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    writer = ShardWriter(uri, "toy", {"pixels": {"kind": "image"}}, val_share=0.0)
    for number in range(16):
        pixels = row(number)["pixels"]
        writer.add({"key": f"row {number}", "pixels": pixels[:60] if number == 5 else pixels})
    plan = plan_of(writer.close())
    message = rf"^1 rows .*row group 0, row {row_id('row 5')}, pixels: "
    with pytest.raises(BadRowsError, match=message):
        list(local_batches(plan, reader([uri], ["pixels"]), stop_batch=2))
    batches = list(local_batches(plan, reader([uri], ["pixels"], bad_row_limit=1), stop_batch=2))
    real = torch.cat([batch.ids[batch.real] for batch in batches]).tolist()
    assert sorted(real) == sorted(row_id(f"row {number}") for number in range(16) if number != 5)
    with pytest.raises(BadRowsError, match=message):
        list(split_batches(reader([uri], ["pixels"]), [writer.close().splits["train"]], 16, 8))


def test_a_bad_row_counts_once_in_all_epochs_on_all_ranks_and_after_a_restart(damaged: str, toy) -> None:
    flip_bit(f"{damaged}/train/00001.parquet", 700)
    board, plan = Board(), plan_of(toy[1])

    def run(rank: int, world: int, start: int, limit: int) -> int:
        bad_rows = BadRows(limit, board.bad_rows)
        batches = local_batches(plan, reader([damaged]), rank, world, start, start + 60, bad_rows=bad_rows)
        assert sum(int((~batch.real).sum()) for batch in batches) > 0
        return len(bad_rows.of_run)

    lost = run(0, 1, 0, limit=16)
    assert 1 <= lost <= 16
    board = Board()
    assert [run(rank, 2, start, limit=lost) for start in (0, 30) for rank in (0, 1)][1:] == [lost] * 3
    with pytest.raises(BadRowsError, match=rf"^{lost} rows could not be read, more than .* \({lost - 1}\)"):
        run(1, 2, 90, limit=lost - 1)


class Wide(ImageModality):
    """An image type that decodes to twice its width."""

    def decode(self, row):
        return np.zeros((8, 16, 3), np.uint8)


def test_a_modality_of_the_wrong_shape_is_reported(toy) -> None:
    uri, manifest = toy
    wrong = modalities(["pixels"])
    wrong["pixels"].__class__ = Wide
    small = RowReader(wrong, [uri], DataConfig(), seed=0)
    with pytest.raises(
        BadRowsError, match=r"pixels: ValueError: got uint8 \(3, 8, 16\), want uint8 \(3, 8, 8\)"
    ):
        next(local_batches(plan_of(manifest), small))


def test_a_stream_that_ends_early_is_an_error(toy) -> None:
    uri, manifest = toy
    one, toys = plan_of(manifest), reader([uri])
    windows = (
        (lane, window, toys.read(window)) for lane, window in itertools.islice(one.rank_windows(0, 1), 9)
    )
    with pytest.raises(RuntimeError, match="ended before"):
        list(rank_batches(one, windows, 0, 1, stop_batch=30))


def test_an_instance_made_from_an_unknown_one_is_refused(toy) -> None:
    with pytest.raises(ConfigError, match=r"modalities.masked is made from 'pixels'"):
        reader([toy[0]], ["alpha", "masked"])
