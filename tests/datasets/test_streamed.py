"""Parquet and WebDataset as others write them: read by row group and by tar, from folders and from S3."""

import io
import json
import tarfile
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.build import build, make_pipeline, render
from mmdiff_ray.datasets.options import pipeline_options
from mmdiff_ray.storage.filesystem import filesystem, write_atomic
from tests.datasets.reading import decode, read_rows

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]


def picture(index: int, suffix: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), COLORS[index % len(COLORS)]).save(buffer, suffix, quality=95)
    return buffer.getvalue()


def mask(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 24), index % 3, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make(name: str, source: str, out: str, workers: int = 0, **options):
    options = {"source": source, "size": "16", **options}
    built = build(name, out, options, workers=workers, progress=False)
    return built, read_rows(out)


def hub_table(rows: range, dictionary: bool = False) -> pa.Table:
    """Return rows as the Hugging Face Hub serves them."""
    labels = pa.array([index % 5 for index in rows], pa.int64())
    columns = {
        "image": pa.array([{"bytes": picture(index), "path": None} for index in rows]),
        "label": labels,
        "caption": pa.array([f"number {index}" for index in rows], pa.large_string()),
        "kind": pa.array([f" c{index % 2}" for index in rows]),
        "vector": pa.array([[float(index), 1.0, 2.0] for index in rows]),
        "seg": pa.array([mask(index) for index in rows]),
    }
    if dictionary:
        columns["kind"] = columns["kind"].dictionary_encode()
    features = {"label": {"_type": "ClassLabel", "names": list("abcde")}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.table(columns).replace_schema_metadata(metadata)


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=8)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "data"
    folder.mkdir()
    (folder / "train-00000-of-00002.parquet").write_bytes(parquet_bytes(hub_table(range(20))))
    (folder / "train-00001-of-00002.parquet").write_bytes(parquet_bytes(hub_table(range(20, 30), True)))
    (folder / "validation-00000-of-00001.parquet").write_bytes(parquet_bytes(hub_table(range(30, 36))))
    return folder


def test_files_of_the_hub_are_read_without_a_map(hub, tmp_path):
    built, rows = make("parquet", str(hub), str(tmp_path / "set"), val_share=0.0)
    columns = built.manifest.columns
    assert {name: facts["kind"] for name, facts in columns.items()} == {
        "pixels": "image", "label": "label", "text": "text",
    }  # fmt: skip
    assert columns["label"]["names"] == list("abcde")
    assert {name: split.rows for name, split in built.manifest.splits.items()} == {
        "train": 30,
        "val": 6,
        "test": 0,
    }
    by_text = {row["text"]: row for row in rows.values()}
    for index in (0, 7, 8, 19, 20, 35):
        row = by_text[f"number {index}"]
        assert row["label"] == index % 5
        assert abs(decode(row["pixels"]).astype(int) - COLORS[index % 5]).max() == 0


def test_a_map_names_fields_and_kinds(hub, tmp_path):
    words = ["--map", "pixels=image", "mask=seg:mask", "label=kind", "look=vector", "--mask-classes", "x,y,z"]
    options = pipeline_options(words)
    assert options["map"] == "pixels=image,mask=seg:mask,label=kind,look=vector"
    built, rows = make("parquet", str(hub / "*.parquet"), str(tmp_path / "set"), **options)
    columns = built.manifest.columns
    assert columns["mask"]["names"] == ["x", "y", "z"] and columns["look"]["dim"] == 3
    assert columns["label"]["names"] == ["c0", "c1"]
    for row in rows.values():
        index = int(row["look"][0])
        assert (decode(row["mask"]) == index % 3).all() and row["label"] == index % 2
    assert sorted(int(row["look"][0]) for row in rows.values()) == list(range(36))


def test_a_label_outside_the_stated_classes_costs_its_row(hub, tmp_path):
    built, rows = make("parquet", str(hub), str(tmp_path / "set"), classes="a,b,c,d", bad_limit="10")
    assert len(rows) == 36 - 7 and len(built.bad) == 7
    assert set(built.bad.values()) == {"label: got 4, which is none of the 4 classes"}


@pytest.mark.parametrize("interrupted_at", [6, 21, 35])
def test_an_interrupted_build_of_parts_goes_on_to_the_same_rows(hub, tmp_path, monkeypatch, interrupted_at):
    from mmdiff_ray.data.shards import ShardWriter

    split = {"val_share": "0.3", "test_share": "0.2"}
    whole = make("parquet", str(hub), str(tmp_path / "whole"), **split)[1]
    add, added = ShardWriter.add, []

    def failing(self, row, *place):
        added.append(row["key"])
        if len(added) == interrupted_at:
            raise KeyboardInterrupt
        return add(self, row, *place)

    monkeypatch.setattr("mmdiff_ray.datasets.build.ShardWriter", partial(ShardWriter, rows_per_shard=4))
    with monkeypatch.context() as patch:  # some splits have written shards, others hold rows in memory
        patch.setattr(ShardWriter, "add", failing)
        with pytest.raises(KeyboardInterrupt):
            make("parquet", str(hub), str(tmp_path / "cut"), **split)
    rows = make("parquet", str(hub), str(tmp_path / "cut"), **split)[1]
    assert sorted(rows) == sorted(whole) and len(rows) == 36


def test_a_limit_ends_the_reading(hub, tmp_path):
    assert len(make("parquet", str(hub), str(tmp_path / "set"), limit=11)[1]) == 11


# --- WebDataset ---------------------------------------------------------------------------------------------


def tar_bytes(rows: range, compression: str = "") -> bytes:
    """Return a tar as img2dataset and WebDataset write it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for index in rows:
            vector = io.BytesIO()
            np.save(vector, np.float32([index, 1]))
            for suffix, data in (
                ("jpg", picture(index, "JPEG")),
                ("cls", str(index % 3).encode()),
                ("json", json.dumps({"caption": f"number {index}", "width": 24}).encode()),
                ("seg.png", mask(index)),
                ("npy", vector.getvalue()),
            ):
                member = tarfile.TarInfo(f"part/{index:06d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    (folder / "00000.tar").write_bytes(tar_bytes(range(8)))
    (folder / "00001.tar.gz").write_bytes(tar_bytes(range(8, 13), "gz"))
    (folder / "00000_stats.json").write_text("{}")
    return folder


def test_tars_are_read_without_a_map(tars, tmp_path):
    built, rows = make("webdataset", str(tars), str(tmp_path / "set"))
    assert {name: facts["kind"] for name, facts in built.manifest.columns.items()} == {
        "pixels": "image", "label": "label", "text": "text",
    }  # fmt: skip
    assert built.manifest.columns["label"]["names"] == ["0", "1", "2"] and len(rows) == 13
    for row in rows.values():
        index = int(row["text"].removeprefix("number "))
        assert row["label"] == index % 3
        assert abs(decode(row["pixels"]).astype(int) - COLORS[index % 5]).max() < 12


def test_a_map_names_suffixes_and_keys(tars, tmp_path):
    words = "pixels=jpg mask=seg.png:mask look=npy text=json.caption"
    built, rows = make(
        "webdataset", str(tars / "*.tar"), str(tmp_path / "set"), map=words, mask_classes="a,b,c"
    )
    assert built.manifest.columns["mask"]["names"] == ["a", "b", "c"] and len(rows) == 8
    for row in rows.values():
        index = int(row["text"].removeprefix("number "))
        assert (decode(row["mask"]) == index % 3).all() and float(row["look"][0]) == index


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("parquet", {"source": ""}, "source is missing"),
        ("parquet", {"source": "nothing/*"}, r"source: no file matches nothing/\*"),
        ("parquet", {"map": "pixels=picture"}, "map: unknown field 'picture'; known: image"),
        ("parquet", {"map": "pixels"}, "map: got 'pixels', want COLUMN=FIELD"),
        ("parquet", {"map": "label=label"}, "map: no field becomes pixels"),
        ("parquet", {"map": "pixels=image,mask=seg:mask"}, "mask_classes is missing"),
        ("parquet", {"annotated": 0.5}, "annotated and part"),
        ("webdataset", {}, "holds no .tar file"),
    ],
)
def test_what_cannot_be_read_is_one_line(hub, tmp_path, name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_pipeline(name, {"source": str(hub), **options})


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ConfigError, match=r"source: cannot read .*a\.parquet"):
        make_pipeline("parquet", {"source": str(tmp_path)})
    sound = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x" * 99] * 9, "label": [1] * 9, "words": [{"a": 1}] * 9}), sound)
    (tmp_path / "a.parquet").write_bytes(sound.getvalue())
    with pytest.raises(ConfigError, match=r"source: cannot read .*a\.parquet"):
        make_pipeline("parquet", {"source": str(tmp_path), "map": "pixels=image label=words:label"})
    torn = bytearray(sound.getvalue())
    torn[4:40] = b"\xff" * 36
    (tmp_path / "a.parquet").write_bytes(torn)
    pipeline = make_pipeline("parquet", {"source": str(tmp_path), "map": "pixels=image"})
    with pytest.raises(ConfigError, match=r"source: cannot read .*a\.parquet"):
        render(pipeline, pipeline.items())
    (tmp_path / "a.tar").write_bytes(tar_bytes(range(3))[:2000])
    with pytest.raises(ConfigError, match=r"source: cannot read .*a\.tar"):
        make_pipeline("webdataset", {"source": str(tmp_path / "*.tar")})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", ["parquet", "webdataset"])
def test_both_stream_through_ray_from_an_object_store(name, hub, tars, bucket, ray_cluster, tmp_path):
    folder, pattern = (hub, "*.parquet") if name == "parquet" else (tars, "*.tar*")
    for file in folder.glob(pattern):
        fs, path = filesystem(bucket.uri(f"{name}/{file.name}"))
        write_atomic(fs, path, file.read_bytes())
    here = make(name, str(folder / pattern), str(tmp_path / "set"))[1]
    there = make(name, bucket.uri(name), str(tmp_path / "far"), workers=1)[1]
    assert {key: row["text"] for key, row in there.items()} == {key: row["text"] for key, row in here.items()}
    assert all(there[key]["pixels"] == here[key]["pixels"] for key in here)


def test_void_pixels_of_masks_are_no_class_and_other_values_cost_their_row(tmp_path):
    def png(*values: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.repeat(np.uint8([values]), 16, 0).repeat(16 // len(values), 1)).save(buffer, "PNG")
        return buffer.getvalue()

    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    masks = [png(0, 1, 255, 1), png(0, 1), png(0, 7)]
    pq.write_table(pa.table({"image": [picture.getvalue()] * 3, "seg": masks}), tmp_path / "in.parquet")
    options = {"map": "pixels=image,mask=seg", "mask_classes": "2"}
    for ignore, rows_kept, void in (("255", 2, 255), ("7", 2, 255), ("none", 1, None)):
        out = str(tmp_path / f"set{ignore}")
        built, rows = make("parquet", str(tmp_path / "in.parquet"), out, ignore=ignore, **options)
        facts = built.manifest.columns["mask"]
        assert (len(rows), facts.get("void"), facts["classes"]) == (rows_kept, void, 2)
        held = {value for row in rows.values() for value in np.unique(decode(row["mask"])).tolist()}
        assert held == ({0, 1, 255} if void else {0, 1})
    assert "which is none of 2" in next(iter(built.bad.values()))


def test_masks_and_maps_are_turned_like_their_picture(tmp_path):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    drawn = np.zeros((16, 24, 3), np.uint8)
    drawn[:, :12] = 255
    Image.fromarray(drawn).save(buffer, "JPEG", exif=exif, quality=95)
    masks = io.BytesIO()
    Image.fromarray(drawn[..., 0] // 255).save(masks, "PNG")
    wrong = io.BytesIO()
    Image.new("L", (9, 9)).save(wrong, "PNG")
    depth = (drawn[..., 0] / 255).tolist()
    table = {
        "image": [buffer.getvalue()] * 2,
        "seg": [masks.getvalue(), wrong.getvalue()],
        "depth": [depth] * 2,
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    options = {"map": "pixels=image,mask=seg,depth=depth:map", "mask_classes": "2", "map_range": "0:1"}
    built, rows = make("parquet", str(tmp_path / "in.parquet"), str(tmp_path / "set"), **options)
    (row,) = rows.values()
    pixels = decode(row["pixels"])[..., 0] > 127
    assert ((decode(row["mask"]) == 1) == pixels).mean() > 0.9
    assert ((np.load(io.BytesIO(row["depth"]))[0] > 0.5) == pixels).mean() > 0.9
    assert list(built.bad.values()) == ["mask: its mask has 9x9 pixels, the picture 16x24"]


# --- real numbers and sets of labels ------------------------------------------------------------------------

DEPTH = np.linspace(500, 4000, 20 * 24).reshape(20, 24).astype(np.uint16)
MORE = {
    "map": "pixels=image,text=texts,tags=tags:labels,words=words:labels,place=place:vector,"
    "depth=depth:map,far=far:map"
}
STATED = {"map_range": "depth=0.5:4, far=0:9", "map_unit": "depth=0.001", "map_void": "depth=0"}


def depth_png(index: int) -> bytes:
    """Return a depth map in millimetres as a 16-bit PNG, whose first rows are unknown."""
    raw, buffer = DEPTH.copy(), io.BytesIO()
    raw[:index] = 0
    Image.fromarray(raw).save(buffer, "PNG")
    return buffer.getvalue()


def check_more(built, rows) -> None:
    assert {tuple(row["text"]) for row in rows.values()} == {("one", "two"), ("only",)}
    columns = built.manifest.columns
    assert columns["tags"]["names"] == ["a", "b", "c"] and columns["words"]["names"] == ["0", "1", "2"]
    assert (columns["place"]["kind"], columns["place"]["dim"]) == ("vector", 2)
    assert (columns["depth"]["range"], columns["depth"]["unit"]) == ([0.5, 4.0], 0.001)
    for index, row in enumerate(sorted(rows.values(), key=lambda row: row["place"][0])):
        assert row["place"].tolist() == [index, 0.5]
        assert row["tags"] == ([0, 2] if index % 2 else [1]) and row["words"] == list(range(index % 4))
        depth, far = (np.load(io.BytesIO(row[name]))[0] for name in ("depth", "far"))
        assert depth.shape == far.shape == (16, 16) and (far == min(index, 8)).all()
        assert np.isnan(depth[0]).all() == (index >= 1) and np.nanmax(depth) == pytest.approx(4, abs=0.15)


def test_maps_vectors_and_sets_of_labels_come_from_parquet(tmp_path):
    table = pa.table(
        {
            "image": [{"bytes": picture(index), "path": None} for index in range(6)],
            "tags": ["a| c" if index % 2 else "b" for index in range(6)],
            "words": [list(range(index % 4)) for index in range(6)],
            "place": [[float(index), 0.5] for index in range(6)],
            "texts": [["one", " two "] if index % 2 else ["only", ""] for index in range(6)],
            "depth": [depth_png(index) for index in range(6)],
            "far": [[[float(index)] * 24] * 20 for index in range(6)],
        }
    )
    (tmp_path / "in.parquet").write_bytes(parquet_bytes(table))
    check_more(*make("parquet", str(tmp_path / "in.parquet"), str(tmp_path / "set"), **MORE, **STATED))
    with pytest.raises(ConfigError, match=r"map_range is missing; .* of depth: map_range=depth=0"):
        make_pipeline("parquet", {"source": str(tmp_path / "in.parquet"), "map": "depth=depth:map"})


def test_maps_vectors_and_sets_of_labels_come_from_tar_files(tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for index in range(6):
            far, place = io.BytesIO(), {"place": [index, 0.5], "words": list(range(index % 4))}
            place["texts"] = ["one", "two"] if index % 2 else ["only"]
            np.save(far, np.full((20, 24), float(index)))
            files = {
                "png": picture(index),
                "depth.png": depth_png(index),
                "far.npy": far.getvalue(),
                "json": json.dumps({**place, "tags": ["c", "a"] if index % 2 else ["b"]}).encode(),
            }
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{index:03d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    words = (
        MORE["map"].replace("image", "png").replace("=depth:", "=depth.png:").replace("=far:", "=far.npy:")
    )
    for field in ("tags", "words", "place", "texts"):
        words = words.replace(f"={field}", f"=json.{field}", 1)
    check_more(*make("webdataset", str(tmp_path / "in.tar"), str(tmp_path / "set"), map=words, **STATED))
