"""Tables of pictures and COCO files: what lists the rows of a folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from PIL import Image

from mmdiff_ray.data.manifest import MANIFEST
from mmdiff_ray.data.shards import verify
from mmdiff_ray.datasets.build import build
from mmdiff_ray.datasets.layouts import CocoMasks, Drawing
from tests.fuzz.cases import Refused, answer, changed, damaged, fuzz, junk, leaves, numbers, words

FILES = ("a.png", "b/c.png", "b/ü.png")

pytest.importorskip("pycocotools", reason="pip install 'mmdiff-ray[coco]'")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (*FILES, "../outside.png"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(file)


def build_folder(**options: str) -> None:
    """Build the folder, and check that what is refused leaves no data set and what is built is whole."""
    shutil.rmtree("out", ignore_errors=True)
    given = {"source": "photos", "size": "8", "bad_limit": "100%", "val_share": 0, **options}
    built = answer(lambda: build("folder", "out", given, workers=0, progress=False))
    if isinstance(built, Refused):
        assert not Path("out", MANIFEST).exists()
        return
    assert verify("out") == []
    keys = [
        key for group in Path("out").glob("*/*.parquet") for key in pq.read_table(group)["key"].to_pylist()
    ]
    assert len(keys) == built.written
    for key in [*keys, *built.bad]:
        assert os.path.normpath(Path("photos", key)).startswith("photos/")


cell = st.one_of(st.sampled_from([*FILES, "b\\c.png", "../outside.png", str(Path("x").absolute())]), words)
table = st.lists(
    st.dictionaries(st.sampled_from(["file", "label", "caption", "split", "who", "File", " path "]), cell),
    max_size=4,
)


@fuzz(25, rows=table, ending=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]), more=st.data())
def test_a_table_is_refused_or_lists_pictures_of_its_folder(rows, ending, more):
    columns = list(dict.fromkeys(column for row in rows for column in row)) or ["file"]
    file = Path(f"t.{ending}")
    if ending == "jsonl":
        lines = [json.dumps(more.draw(st.one_of(st.just(row), changed(row)))) for row in rows]
        file.write_text("\n".join(lines))
    elif ending == "parquet":
        cells = {name: [str(row.get(name, "")).encode(errors="replace") for row in rows] for name in columns}
        pq.write_table(
            pa.table(
                {name: pa.array(values).cast(pa.string(), safe=False) for name, values in cells.items()}
            ),
            file,
        )
    else:
        comma = "\t" if ending == "tsv" else ","
        lines = [comma.join(columns), *(comma.join(row.get(name, "") for name in columns) for row in rows)]
        file.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    file.write_bytes(more.draw(st.one_of(st.just(file.read_bytes()), damaged(file.read_bytes()))))
    options = more.draw(st.sampled_from([{}, {"split_column": "split"}, {"group_by": "who"}]))
    build_folder(metadata=str(file), **options)


def coco() -> dict:
    """Return a COCO file of instances, with polygons, a box, runs and packed runs."""
    names = ["a.png", "b/c.png", "b/ü.png"]
    outlines = (
        {"segmentation": [[1, 1, 6, 1, 6, 6]], "area": 12.5},
        {"segmentation": {"size": [8, 8], "counts": [10, 4, 50]}, "area": 4},
        {"segmentation": {"size": [8, 8], "counts": "P15\\1"}},
        {"bbox": [2, 2, 3, 3]},
    )
    return {
        "images": [{"id": i, "file_name": name, "height": 8, "width": 8} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": i % 3, "category_id": 1 + i % 2, **one} for i, one in enumerate(outlines)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


@fuzz(
    20,
    content=changed(coco()),
    captions=changed({"annotations": [{"id": 1, "image_id": 0, "caption": "red"}]}),
)
def test_a_coco_file_is_refused_or_built_from(content, captions):
    Path("coco.json").write_text(json.dumps(content))
    Path("words.json").write_text(json.dumps(captions))
    build_folder(layout="coco", annotations="coco.json", captions="words.json")


number = st.one_of(st.integers(-2, 12), numbers)
outline = st.one_of(
    st.lists(st.lists(number, min_size=6, max_size=9), min_size=1, max_size=2),
    st.fixed_dictionaries(
        {"size": st.just([8, 6]), "counts": st.one_of(st.lists(number, max_size=6), st.text(max_size=9))}
    ),
    st.fixed_dictionaries(
        {"size": st.lists(number, max_size=3), "counts": st.one_of(st.text(max_size=5), junk)}
    ),
    junk,
)


@fuzz(
    15,
    outlines=st.lists(st.tuples(st.integers(1, 2), outline), max_size=2),
    size=st.one_of(st.just((8, 6)), st.tuples(leaves, leaves)),
)
def test_outlines_are_unreadable_or_drawn_in_the_classes(outlines, size):
    try:
        classes = CocoMasks(("cat", "dog")).read(Drawing(*size, tuple(outlines)))
    except ValueError:
        return
    assert classes.shape == size and classes.dtype == np.uint8
    assert set(np.unique(classes)) <= {0, *(index for index, _ in outlines)}
