"""Writing data sets, and what is found when their files have changed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import JOURNAL, MANIFEST, RowGroup, read_manifest
from mmdiff_ray.data.parquet import read_row_group
from mmdiff_ray.data.shards import ShardWriter, row_id, split_of, verify
from tests.data.samples import COLUMNS, flip_bit, interrupted, png, row, write


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def row_groups(uri: str, split: str) -> list[RowGroup]:
    shards = read_manifest(uri).splits[split].shards
    return [shard.row_group(group) for shard in shards for group in range(len(shard.row_groups))]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, range(50))
    found: dict[str, dict] = {}
    for split in ("train", "val"):
        for group in row_groups(uri, split):
            columns = read_row_group(uri, group, ["key", *COLUMNS])
            found |= {key: {c: v[i] for c, v in columns.items()} for i, key in enumerate(columns["key"])}
    assert set(found) == {f"row {number}" for number in range(50)}
    for number in range(50):
        want, got = row(number), found[f"row {number}"]
        assert got["id"] == row_id(f"row {number}")
        assert (got["pixels"], got["alpha"], got["caption"]) == (
            want["pixels"],
            want["alpha"],
            want["caption"],
        )
        label = want["category"]
        assert got["category"] == (None if label is None else COLUMNS["category"]["names"].index(label))
        np.testing.assert_array_equal(got["look"], None if want["look"] is None else np.float32(want["look"]))


def test_the_manifest_counts_what_was_written(tmp_path: Path) -> None:
    rows = [row(number) for number in range(50)]
    manifest = write(str(tmp_path / "toy"), range(50))
    assert manifest == read_manifest(str(tmp_path / "toy"))
    assert sum(split.rows for split in manifest.splits.values()) == 50
    assert all(shard.rows <= 16 and max(shard.row_groups) <= 4 for shard in manifest.splits["train"].shards)
    labels = [r["category"] for r in rows]
    assert manifest.columns["category"]["counts"] == [labels.count(name) for name in ("ant", "bee", "cat")]
    train = [r["category"] for r in rows if split_of(row_id(r["key"]), 0.2) == "train"]
    wanted = [train.count(name) for name in ("ant", "bee", "cat")]
    assert manifest.columns["category"]["train_counts"] == wanted
    assert wanted != manifest.columns["category"]["counts"]
    assert manifest.columns["category"]["present"] == 50 - labels.count(None)
    norms = [np.linalg.norm(np.float32(r["look"])) for r in rows if r["look"] is not None]
    assert manifest.columns["look"] == {
        "kind": "embedding",
        "codec": "toy",
        "dim": 4,
        "present": len(norms),
        "mean_norm": pytest.approx(np.mean(norms), abs=1e-5),
    }
    assert sum(manifest.columns["alpha"]["pixel_share"]) == pytest.approx(1, abs=1e-5)
    assert sum(path.stat().st_size for path in tmp_path.rglob("train/*")) == manifest.splits["train"].bytes


def test_the_split_of_a_row_depends_on_its_key_alone() -> None:
    val = {key for key in map(str, range(20_000)) if split_of(row_id(key), 0.1) == "val"}
    assert len(val) == pytest.approx(2000, abs=4 * 2000**0.5)
    assert val < {key for key in map(str, range(20_000)) if split_of(row_id(key), 0.2) == "val"}


def test_a_test_share_takes_rows_from_train_and_leaves_val_as_it_is() -> None:
    ids = [row_id(str(number)) for number in range(20_000)]
    two, three = ([split_of(number, 0.1, share) for number in ids] for share in (0.0, 0.2))
    assert [split == "val" for split in two] == [split == "val" for split in three]
    assert two.count("test") == 0
    assert three.count("test") == pytest.approx(4000, abs=4 * 4000**0.5)


def test_three_splits_are_written_by_shares_by_group_and_by_name(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    writer = ShardWriter(uri, "toy", COLUMNS, val_share=0.2, test_share=0.3)
    for number in range(40):
        writer.add(row(number), group=f"group {number // 4}")
    writer.add(row(40), split="test")
    manifest = writer.close()
    found = {
        key: split
        for split in ("train", "val", "test")
        for group in row_groups(uri, split)
        for key in read_row_group(uri, group, ["key"])["key"]
    }
    for number in range(40):
        assert found[f"row {number}"] == split_of(row_id(f"group {number // 4}"), 0.2, 0.3)
    assert set(found.values()) == {"train", "val", "test"} and found["row 40"] == "test"
    assert verify(uri) == [] and read_manifest(uri) == manifest
    write(uri, range(20), force=True)  # replaces the shards of the test split, too
    assert not list((tmp_path / "toy" / "test").glob("*.parquet"))


def test_shares_above_one_and_unknown_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"val_share \(0.5\) and test_share \(0.6\) must .* together at most 1"
    ):
        ShardWriter(str(tmp_path / "toy"), "toy", COLUMNS, val_share=0.5, test_share=0.6)
    writer = ShardWriter(str(tmp_path / "toy"), "toy", COLUMNS)
    with pytest.raises(ConfigError, match=r"row 'row 1' has an unknown split 'dev'; known: train, val, test"):
        writer.add(row(1), split="dev")


def test_an_interrupted_build_from_before_there_were_test_splits_goes_on(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(str(tmp_path / "whole"), range(60))
    list(interrupted(uri, range(40)))
    journal = tmp_path / "toy" / JOURNAL
    plain = json.loads(journal.read_text())
    assert "test_share" not in plain["settings"] and plain["shards"].pop("test") == []
    journal.write_text(json.dumps(plain))
    write(uri, range(60))
    assert files_of(tmp_path / "toy") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("stopped_after", [0, 1, 15, 29, 47, 80, 99])
def test_an_interrupted_build_goes_on_to_the_same_files(tmp_path: Path, stopped_after: int) -> None:
    write(str(tmp_path / "whole"), range(100))
    uri = str(tmp_path / "parts")
    for number in interrupted(uri, range(100)):
        if number == stopped_after:
            break
    assert not (tmp_path / "parts" / MANIFEST).exists()
    write(uri, range(100))
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_a_kill_between_shard_and_journal_loses_and_doubles_nothing(tmp_path: Path) -> None:
    write(str(tmp_path / "whole"), range(100))
    journal = tmp_path / "parts" / JOURNAL
    before = b""
    for _ in interrupted(str(tmp_path / "parts"), range(100)):
        if (tmp_path / "parts/train/00001.parquet").exists():
            break
        before = journal.read_bytes()
    journal.write_bytes(before)
    (tmp_path / "parts/train/00001.parquet").write_bytes(b"half a sha")
    (tmp_path / "parts/train/00001.parquet.part").write_bytes(b"half")
    write(str(tmp_path / "parts"), range(100))
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_an_interrupted_build_does_not_go_on_with_other_settings(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    list(interrupted(uri, range(40)))
    with pytest.raises(ConfigError, match=r"interrupted build with settings .*--force"):
        ShardWriter(uri, "toy", COLUMNS, rows_per_shard=32, rows_per_group=4, val_share=0.2)
    other = {**COLUMNS, "category": {"kind": "label", "names": ["x", "y"]}}
    with pytest.raises(ConfigError, match="names of column 'category' is"):
        ShardWriter(uri, "toy", other, rows_per_shard=16, rows_per_group=4, val_share=0.2)
    flip_bit(str(tmp_path / "toy/train/00000.parquet"), 60)
    with pytest.raises(ConfigError, match=r"train/00000.parquet of an interrupted build cannot be read"):
        write(uri, range(40))


def test_a_finished_data_set_is_never_overwritten(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, range(20))
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match="finished and is never overwritten"):
        write(uri, range(30))
    assert files_of(tmp_path) == before


def test_force_replaces_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, range(90))
    (tmp_path / "toy/notes.txt").write_text("mine")
    write(uri, range(20), force=True)
    write(str(tmp_path / "fresh"), range(20))
    expected = {**files_of(tmp_path / "fresh"), "notes.txt": b"mine"}
    assert files_of(tmp_path / "toy") == expected
    (tmp_path / "toy/train/mine.parquet").write_text("mine")
    with pytest.raises(ConfigError, match=r"files that are not ours, e.g. .*mine.parquet"):
        write(uri, range(20), force=True)
    assert (tmp_path / "toy/train/mine.parquet").read_text() == "mine"


def test_force_clears_an_interrupted_build_too(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    list(interrupted(uri, range(60), rows_per_shard=8))
    (tmp_path / "toy/val/00001.parquet").write_bytes(b"written just before the kill, not yet in the journal")
    write(uri, range(20), force=True)
    write(str(tmp_path / "fresh"), range(20))
    assert files_of(tmp_path / "toy") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"splits": {}}',
        '{"splits": {"train": {"shards": [{"path": "../precious"}]}, "val": {"shards": []}}}',
    ],
)
def test_force_removes_nothing_that_a_strange_manifest_names(tmp_path: Path, text: str) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "toy" / MANIFEST).write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match=r"manifest.json is not as we write it .* remove it yourself"):
        write(str(tmp_path / "toy"), range(20), force=True)
    assert files_of(tmp_path) == before


def test_a_folder_with_files_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val/00000.parquet").write_text("mine")
    with pytest.raises(ConfigError, match="not ours"):
        write(str(tmp_path), range(20))
    assert files_of(tmp_path) == {"val/00000.parquet": b"mine"}


def test_two_rows_of_one_key_are_an_error_even_across_an_interruption(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    list(interrupted(uri, range(40)))
    writer = ShardWriter(uri, "toy", COLUMNS, rows_per_shard=16, rows_per_group=4, val_share=0.2)
    with pytest.raises(ConfigError, match=f"row {min(writer.done)!r} comes twice"):
        writer.add({"key": min(writer.done)})
    writer.add(row(200))
    with pytest.raises(ConfigError, match="row 'row 200' comes twice"):
        writer.add(row(200))


def test_a_build_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gave no rows"):
        write(str(tmp_path / "toy"), [])


BAD_ROWS = {
    "no key": ({}, "needs a key"),
    "strange column": ({"key": "a", "colour": 1}, "unknown column 'colour'"),
    "not a PNG": ({"key": "a", "pixels": b"GIF89a"}, "row 'a', column 'pixels': want PNG bytes"),
    "wrong channels": ({"key": "a", "pixels": png(np.zeros((8, 8, 3), np.uint8))}, "channels is 3, want 4"),
    "wrong size": (
        {"key": "a", "pixels": png(np.zeros((8, 9, 4), np.uint8))},
        r"size is \[8, 9\], want \[8, 8\]",
    ),
    "colour mask": ({"key": "a", "alpha": png(np.zeros((8, 8, 3), np.uint8))}, "one channel"),
    "class out of range": ({"key": "a", "alpha": png(np.full((8, 8), 2, np.uint8))}, "holds the index 2"),
    "truncated mask": ({"key": "a", "alpha": row(0)["alpha"][:-25]}, "column 'alpha'"),
    "unknown label": ({"key": "a", "category": "bees"}, "unknown label 'bees'; did you mean 'bee'"),
    "label out of range": ({"key": "a", "category": 3}, "unknown label 3"),
    "label no index": ({"key": "a", "category": 0.5}, "column 'category'"),
    "not finite": ({"key": "a", "look": [1.0, float("nan"), 0, 0]}, "must be finite"),
    "not a vector": ({"key": "a", "look": [[1.0]]}, r"one vector, got shape \(1, 1\)"),
    "not text": ({"key": "a", "caption": 7}, "must be a string, got int"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_value_that_does_not_fit_its_column_is_refused(tmp_path: Path, bad: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardWriter(str(tmp_path / "toy"), "toy", COLUMNS).add(bad)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"kind": "picture"}, "unknown kind 'picture'; known: image, mask"),
        ({"kind": "label"}, "needs `names`"),
        ({"kind": "label", "names": ["a", "a"]}, "different names"),
        ({"kind": "mask"}, "classes from 2 to 256"),
        ({"kind": "mask", "classes": 3, "names": ["a", "b"]}, "as many as names"),
        ({"kind": "text", "source": np.int64(1)}, "JSON"),
    ],
)
def test_column_facts_that_make_no_sense_are_refused(tmp_path: Path, facts: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardWriter(str(tmp_path / "toy"), "toy", {"it": facts})


def test_an_embedding_that_first_comes_in_a_later_shard_is_kept(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, [2, 7, 12, 17, 0], val_share=0.0, rows_per_shard=4)
    last = read_row_group(uri, row_groups(uri, "train")[-1], ["look"])
    np.testing.assert_array_equal(last["look"][0], np.float32(row(0)["look"]))
    assert read_row_group(uri, row_groups(uri, "train")[0], ["look"])["look"] == [None] * 4


def test_verify_names_every_file_that_changed(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, range(100))
    assert verify(uri) == []
    shards = sorted((tmp_path / "toy/train").iterdir())
    flip_bit(str(shards[0]), shards[0].stat().st_size // 2)
    os.truncate(shards[1], 100)
    shards[2].unlink()
    problems = verify(uri)
    assert [problem.split(":")[0] for problem in problems] == [f"train/{n:05d}.parquet" for n in range(3)]
    assert "sha256" in problems[0] and "100 bytes" in problems[1]


def test_no_flipped_bit_of_a_shard_passes_unnoticed(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, range(4), val_share=0.0)
    group = row_groups(uri, "train")[0]
    shard = tmp_path / "toy" / group.path
    clean, size = read_row_group(uri, group, list(COLUMNS)), shard.stat().st_size
    noticed = 0
    for position in range(0, size, 7):
        # the footer is kept once read, so each position gets a path of its own
        copy = tmp_path / f"copy{position}"
        (copy / "train").mkdir(parents=True)
        (copy / group.path).write_bytes(shard.read_bytes())
        flip_bit(str(copy / group.path), position)
        try:
            found = read_row_group(str(copy), group, list(COLUMNS))
        except (OSError, ValueError):
            noticed += 1
        else:
            np.testing.assert_equal(found, clean)
    assert noticed > 0.9 * (size // 7)
