"""Manifests, shards, columns that are written, and the Parquet files of others."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from mmdiff_ray.config import from_plain
from mmdiff_ray.data.check import resolve_modalities
from mmdiff_ray.data.manifest import MANIFEST, Manifest, from_json, read_manifest, to_json
from mmdiff_ray.data.parquet import _footer
from mmdiff_ray.data.plan import Piece, Window
from mmdiff_ray.data.shards import ShardWriter, verify
from mmdiff_ray.datasets.build import build
from mmdiff_ray.datasets.inspect import draw_rows, tables
from tests.data import samples
from tests.fuzz.cases import Refused, answer, changed, damaged, fuzz, junk, words

WRITTEN: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """A data set of 16 rows in four row groups of one shard."""
    uri = str(tmp_path_factory.mktemp("fuzz") / "data")
    samples.write(uri, range(16), val_share=0)
    return uri


def plain_manifest() -> dict[str, Any]:
    """Return a manifest as plain values, without its statistics."""
    shard = {
        "path": "train/00000.parquet",
        "rows": 16,
        "bytes": 900,
        "sha256": "ab" * 32,
        "footer_crc32": 7,
        "row_groups": [8, 8],
    }
    splits = {
        "train": {"rows": 16, "bytes": 900, "shards": [shard]},
        "val": {"rows": 0, "bytes": 0, "shards": []},
    }
    columns = {
        "pixels": {"kind": "image", "channels": 4, "size": [8, 8], "present": 16},
        "alpha": {
            "kind": "mask",
            "classes": 2,
            "names": ["a", "b"],
            "pixel_share": [0.5, 0.5],
            "present": 16,
        },
        "category": {"kind": "label", "names": samples.LABELS, "counts": [5, 5, 6], "present": 16},
        "look": {"kind": "embedding", "dim": 4, "codec": "toy", "mean_norm": 1.0, "present": 12},
        "caption": {"kind": "text", "present": 16},
    }
    return {"format_version": 1, "name": "toy", "columns": columns, "splits": splits}


CONFIG = {
    "space": {"height": 8, "width": 8},
    "modalities": samples.MODALITIES,
    "tasks": {"joint": {"roles": {"pixels": "generated", "alpha": "generated", "category": "generated"}}},
    "data": {"sources": [{"uri": "data"}]},
    "evaluate": {"evaluators": []},
}


@fuzz(35, plain=changed(plain_manifest()))
def test_a_manifest_is_refused_or_names_files_of_its_folder_and_fits_modalities(plain):
    manifest = answer(lambda: from_json(json.dumps(plain)))
    if isinstance(manifest, Refused):
        return
    assert from_json(to_json(manifest)) == manifest and manifest.digest
    for split in manifest.splits.values():
        for shard in split.shards:
            assert shard.rows >= 0 and sum(shard.row_groups) == shard.rows
            path = os.path.normpath(Path("/data", shard.path))
            assert path.startswith("/data/") and shard.path.isprintable()
    answer(lambda: resolve_modalities(from_plain(CONFIG), [manifest]))
    answer(lambda: tables("data", manifest))


@fuzz(10, text=damaged(json.dumps(plain_manifest()).encode()))
def test_a_damaged_manifest_is_refused_or_read(text):
    answer(lambda: from_json(text))


@fuzz(25, change=st.data())
def test_rows_of_a_damaged_shard_are_as_written_or_marked_as_bad(data, change, tmp_path):
    if data not in WRITTEN:
        (shard,) = read_manifest(data).splits["train"].shards
        pieces = tuple(Piece(shard.row_group(i), 0, n) for i, n in enumerate(shard.row_groups))
        window = Window(0, 0, pieces)
        WRITTEN[data] = window, samples.reader([data]).read(window), Path(data, shard.path).read_bytes()
    window, rows, shard_bytes = WRITTEN[data]
    assert rows["real"].all()
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(data, copy)
    (file,) = copy.glob("train/*")
    file.write_bytes(change.draw(damaged(shard_bytes)))
    _footer.cache_clear()
    found = samples.reader([str(copy)]).read(window)
    real = found["real"]
    assert (found["error"][~real] != "").all() and (found["ids"][real] == rows["ids"][real]).all()
    for name, values in rows.items():
        if name.startswith(("data/", "present/")):
            assert np.array_equal(found[name][real], values[real]), name
    same = file.read_bytes() == shard_bytes
    assert (verify(str(copy)) == []) == same
    answer(lambda: draw_rows(str(copy), 1))


value = st.one_of(
    junk, st.binary(max_size=40), damaged(samples.row(1)["pixels"], 40), damaged(samples.row(1)["alpha"], 40)
)
columns = st.sampled_from(["pixels", "alpha", "category", "look", "caption"])


@fuzz(20, rows=st.lists(st.dictionaries(st.one_of(columns, columns, words), value, max_size=3), max_size=4))
def test_a_value_is_refused_by_its_column_or_read_back(rows, tmp_path):
    uri = str(tmp_path / "written")
    shutil.rmtree(uri, ignore_errors=True)
    writer = ShardWriter(uri, "toy", samples.COLUMNS, val_share=0)
    taken = [
        number
        for number, row in enumerate(rows)
        if not isinstance(answer(lambda: writer.add({"key": f"r{number}", **row})), Refused)  # noqa: B023
    ]
    manifest = answer(writer.close)
    if isinstance(manifest, Refused):
        assert not taken and not Path(uri, MANIFEST).exists()
        return
    assert sum(split.rows for split in manifest.splits.values()) == len(taken) and verify(uri) == []
    assert read_manifest(uri) == manifest


def foreign() -> bytes:
    """Return a Parquet file as others write them."""
    rows = [samples.row(number) for number in range(6)]
    table = pa.table(
        {
            "image": [{"bytes": row["pixels"], "path": row["key"]} for row in rows],
            "label": [number % 3 for number in range(6)],
            "text": [row["caption"] for row in rows],
            "vector": [[0.5, 1.0]] * 6,
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=3)
    return sink.getvalue()


FOREIGN = foreign()
MAPS = (
    "",
    "pixels=image label=label text=text",
    "pixels=image look=vector:embedding",
    "pixels=text",
    "pixels=image label=vector:label",
)


@fuzz(15, content=damaged(FOREIGN), columns=st.sampled_from(MAPS))
def test_a_damaged_parquet_file_of_others_is_refused_or_built_from(content, columns):
    Path("f.parquet").write_bytes(content)
    build_stream("parquet", source="f.parquet", map=columns)


def build_stream(name: str, **options: str) -> None:
    """Build from a streamed source; what is refused leaves no data set, and what is built is whole."""
    shutil.rmtree("out", ignore_errors=True)
    given = {"size": "8", "bad_limit": "100%", "val_share": 0, **options}
    built = answer(lambda: build(name, "out", given, workers=0, progress=False))
    if isinstance(built, Refused):
        assert not Path("out", MANIFEST).exists()
    else:
        assert isinstance(built.manifest, Manifest) and verify("out") == []


def tar() -> bytes:
    """Return a tar file in WebDataset's layout."""
    sink, vector = io.BytesIO(), io.BytesIO()
    np.save(vector, np.ones(2, np.float32))
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for number in range(2):
            row = samples.row(number)
            fields = {
                "png": row["pixels"],
                "cls": b"1",
                "txt": b"a cat",
                "npy": vector.getvalue(),
                "json": b'{"a": 1}',
            }
            for suffix, content in fields.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return sink.getvalue()


TAR_MAPS = (
    "",
    "pixels=png label=cls text=txt look=npy",
    "pixels=png label=json.a",
    "pixels=txt",
    "pixels=png look=txt:embedding",
)


@fuzz(10, content=damaged(tar()), columns=st.sampled_from(TAR_MAPS))
def test_a_damaged_tar_file_is_refused_or_built_from(content, columns):
    Path("f.tar").write_bytes(content)
    build_stream("webdataset", source="f.tar", map=columns)
