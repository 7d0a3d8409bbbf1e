"""Data sets with few annotations: the same share of every class, nested, and held-out rows whole."""

import pytest
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.shards import row_id, split_of
from mmdiff_ray.datasets.annotations import annotated
from mmdiff_ray.datasets.base import Item, Options
from mmdiff_ray.datasets.build import build, make_pipeline
from tests.datasets.reading import read_rows


def items(count: int = 400) -> list[Item]:
    return [Item(f"k{index:04d}", index) for index in range(count)]


def stratum(item: Item) -> str:
    return "rare" if item.source % 40 == 0 else "common"


def kept(share: float, **options) -> set[str]:
    found = annotated(items(), Options(annotated=share, val_share=0.25, **options), stratum)
    return {item.key for item in found if item.annotated}


def test_every_class_keeps_its_share_and_held_out_rows_keep_all():
    options = Options(annotated=0.1, val_share=0.25)
    found = annotated(items(), options, stratum)
    assert [item.key for item in found] == [item.key for item in items()]
    train = [item for item in found if split_of(row_id(item.key), 0.25) == "train"]
    assert all(item.annotated for item in found if item not in train)
    for name in ("common", "rare"):
        members = [item.annotated for item in train if stratum(item) == name]
        assert sum(members) == max(1, round(0.1 * len(members))) < len(members)


def test_a_smaller_share_is_part_of_a_larger_one_and_another_subset_is_another():
    few, more = kept(0.03), kept(0.1)
    assert few < more
    assert kept(0.1, subset=1) != more


def test_the_parts_are_the_annotated_rows_and_the_rest_with_the_same_held_out_rows():
    whole = annotated(items(), Options(annotated=0.1, val_share=0.25), stratum)
    parts = {
        part: annotated(items(), Options(annotated=0.1, val_share=0.25, part=part), stratum)
        for part in ("annotated", "rest")
    }
    assert all(item.annotated for item in parts["annotated"])
    both = {item.key for item in parts["annotated"]} & {item.key for item in parts["rest"]}
    assert 60 < len(both) < 140  # the held-out quarter
    together = {item.key for part in parts.values() for item in part}
    assert together == {item.key for item in whole}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotated": 0}, "annotated .0. must be above 0"),
        ({"annotated": 1.5}, "annotated .1.5. must be above 0 and at most 1"),
        ({"annotated": 0.5, "part": "half"}, "part .'half'. must be one of all, annotated, rest"),
        ({"annotated": 0.5, "lacks": "shape, colour"}, "lacks .colour.: not a column of annotations"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        build("sprites", str(tmp_path), {"count": 8, "size": 8, **options}, workers=0, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_without_annotations_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no annotations that could be left out"):
        Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
        options = {"source": str(tmp_path), "annotated": 0.5}
        build("folder", str(tmp_path / "out"), options, workers=0, progress=False)


def test_rows_without_annotations_lack_the_named_columns_alone(tmp_path):
    out, options = tmp_path / "few", {"count": 80, "size": 8, "annotated": 0.1, "lacks": "shapes"}
    build("sprites", str(out), options, workers=0, progress=False)
    rows = {row["key"]: row for row in read_rows(str(out)).values()}
    lacking = [row for row in rows.values() if row["shapes"] is None]
    assert 40 < len(lacking) < 75 and all(row["shape"] is not None for row in rows.values())
    pipeline = make_pipeline("sprites", options)
    assert len(pipeline.items()) == len(rows) == 80
