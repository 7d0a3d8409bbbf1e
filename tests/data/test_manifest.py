"""The manifest: JSON out and in, versions, and what is said when there is none."""

import dataclasses
import json
from pathlib import Path

import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import (
    MANIFEST,
    Manifest,
    from_json,
    from_plain,
    read_manifest,
    to_json,
    to_plain,
)
from tests.data.samples import interrupted, split, write


def manifest() -> Manifest:
    columns = {"category": {"kind": "label", "names": ["a", "b"], "present": 3, "counts": [1, 2]}}
    return Manifest("toy", columns, {"train": split(40), "val": split(0)}, "me", "Toys", "nobody")


def test_a_manifest_survives_json() -> None:
    assert from_json(to_json(manifest())) == manifest()


def test_a_manifest_without_a_test_split_loads_and_keeps_its_json_and_digest() -> None:
    plain = to_plain(manifest())
    assert set(plain["splits"]) == {"train", "val"}
    assert from_plain(plain).splits["test"].rows == 0
    assert to_plain(from_plain(plain)) == plain
    # The digest that version 1 of this manifest has had since before there were test splits.
    assert manifest().digest == "1dd916c767538b62d6fa0ec73e27946b6eaf18eceea1dbb0fb3d8afd1cce734f"


def test_a_test_split_survives_json() -> None:
    splits = {"train": split(40), "val": split(4), "test": split(8)}
    whole = dataclasses.replace(manifest(), splits=splits)
    assert from_json(to_json(whole)) == whole and whole.splits["test"].rows == 8
    assert whole.digest != dataclasses.replace(whole, splits={**splits, "test": split(0)}).digest


def test_the_digest_depends_on_the_data_and_not_on_the_order_of_keys() -> None:
    shuffled = json.dumps(dict(reversed(to_plain(manifest()).items())))
    assert from_json(shuffled).digest == manifest().digest
    assert dataclasses.replace(manifest(), name="other").digest != manifest().digest
    assert len(manifest().digest) == 64


def test_a_manifest_of_a_newer_version_is_refused_with_both_versions() -> None:
    with pytest.raises(ConfigError, match="format version 2, want 1 or less; upgrade"):
        from_plain({**to_plain(manifest()), "format_version": 2})


def test_a_manifest_of_an_older_version_is_brought_forward_step_by_step() -> None:
    old = {**to_plain(manifest()), "format_version": -1}
    old["title"] = old.pop("name")

    def rename(plain: dict) -> dict:
        return {**{key: value for key, value in plain.items() if key != "title"}, "name": plain["title"]}

    steps = {
        -1: lambda plain: {**rename(plain), "format_version": 0},
        0: lambda plain: {**plain, "format_version": 1},
    }
    assert from_plain(old, steps) == manifest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: b"[]",
        lambda text: text.replace(b'"rows": 40', b'"rows": 41'),
        lambda text: text.replace(b'"row_groups"', b'"groups"'),
        lambda text: text.replace(b'"kind"', b'"sort"'),
        lambda text: text.replace(b'"present": 3', b'"present": null'),
        lambda text: text.replace(b'"present": 3', b'"present": NaN'),
        lambda text: text.replace(b'"label"', b"true"),
        lambda text: text.replace(b'"label"', b'"embedding"'),
        lambda text: text.replace(b'"b"', b"7"),
        lambda text: text.replace(b'"b"', b'"b", "c"'),
        lambda text: text.replace(b"train/00000", b"../../etc/passwd"),
        lambda text: text.replace(b"train/00000", b"/etc/passwd"),
        lambda text: text.replace(b'"footer_crc32": 0', b'"footer_crc32": 0.5'),
        lambda text: text.replace(b'"Toys"', b"[]"),
        lambda text: b"[" * 100_000,
        lambda text: b"\xff\xfe" + text,
    ],
)
def test_a_corrupt_manifest_is_named_with_its_place_and_remedy(tmp_path: Path, damage) -> None:
    (tmp_path / MANIFEST).write_bytes(damage(to_json(manifest())))
    with pytest.raises(
        ConfigError, match=rf"data.sources: {tmp_path}: .*not a manifest.*build the data again"
    ):
        read_manifest(str(tmp_path))


def test_a_missing_data_set_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"data.sources: no data set at {tmp_path}.*mmdiff data build"):
        read_manifest(str(tmp_path))


def test_an_unfinished_data_set_says_how_to_finish_it(tmp_path: Path) -> None:
    list(interrupted(str(tmp_path), range(5)))
    with pytest.raises(ConfigError, match=r"interrupted; run its .* again"):
        read_manifest(str(tmp_path))


def test_equal_rows_have_equal_digests_wherever_they_lie(tmp_path: Path) -> None:
    digests = {write(str(tmp_path / name), range(30)).digest for name in ("here", "there")}
    assert len(digests) == 1
