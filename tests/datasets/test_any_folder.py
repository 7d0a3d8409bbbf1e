"""Folders as people have them: other tables, splits, masks and pictures than the textbook's."""

import importlib.util
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.build import bad_limit, build, make_pipeline, render
from mmdiff_ray.datasets.embedders import make_embedder
from mmdiff_ray.modalities.image import ImageModality, ImageOptions
from mmdiff_ray.storage.filesystem import filesystem, write_atomic
from tests.datasets.reading import decode, keys_of, read_rows
from tests.datasets.test_folder import BLUE, GREEN, RED, make, save


def splits_of(built) -> dict[str, int]:
    return {name: split.rows for name, split in built.manifest.splits.items() if split.rows}


# --- tables -------------------------------------------------------------------------------------------------


def listed(folder, name: str, encoding: str, separator: str, header=("file_name", "text")) -> str:
    """Write a table of two pictures with captions, and return its path."""
    for index, color in enumerate((RED, GREEN)):
        save(folder / "good" / f"g0{index}.png", color=color)
    rows = [header, ("good/g00.png", "a café"), ("good/g01.png", "two")]
    text = "\n".join(separator.join(row) for row in rows) + "\n"
    (folder / name).write_bytes(text.encode(encoding))
    return str(folder / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_are_read_whatever_their_encoding_and_delimiter(tmp_path, encoding, separator):
    table = listed(tmp_path / "in", "list.csv", encoding, separator)
    _, rows = make(tmp_path / "in", tmp_path / "set", metadata=table)
    assert {key: row["text"] for key, row in rows.items()} == {
        "good/g00.png": "a café",
        "good/g01.png": "two",
    }


@pytest.mark.parametrize(
    "header", [("File", "Caption"), ("filename", "TEXT"), ("path", "caption"), ("image", "text")]
)
def test_columns_go_by_several_names(tmp_path, header):
    table = listed(tmp_path / "in", "list.csv", "utf-8", ",", header)
    _, rows = make(tmp_path / "in", tmp_path / "set", metadata=table)
    assert rows["good/g01.png"]["text"] == "two"


def test_a_table_beside_the_pictures_is_found_in_each_format(tmp_path):
    rows = [{"file_name": f"{name}.png", "label": name} for name in "ab"]
    writers = {
        "metadata.csv": lambda file: file.write_text("file_name,label\na.png,a\nb.png,b\n"),
        "metadata.jsonl": lambda file: file.write_text("\n".join(map(json.dumps, rows))),
        "metadata.parquet": lambda file: pq.write_table(pa.Table.from_pylist(rows), str(file)),
    }
    for name, write in writers.items():
        folder = tmp_path / name
        for picture in "ab":
            save(folder / f"{picture}.png")
        write(folder / name)
        built, _ = make(folder, tmp_path / f"set-{name}")
        assert built.manifest.columns["label"]["names"] == ["a", "b"] and not built.notes


@pytest.mark.parametrize("name", ["rows.csv", "cell.csv", "list.jsonl", "pipes.csv"])
def test_a_picture_may_have_several_captions(tmp_path, name):
    for picture in "abc":
        save(tmp_path / "in" / f"{picture}.png")
    texts = {
        "rows.csv": "image,caption\na.png,one\nb.png,only\na.png, two \na.png,one\nc.png,\n",
        "cell.csv": 'image,caption\na.png,"[""one"", ""two""]"\nb.png,only\nc.png,\n',
        "list.jsonl": '{"file": "a.png", "text": ["one", "two"]}\n{"file": "b.png", "text": "only"}\n'
        '{"file": "c.png", "text": []}',
        "pipes.csv": "image | caption\na.png | one\na.png | two\nb.png | only\nc.png |\n",
    }
    (tmp_path / name).write_text(texts[name])
    options = {"metadata": str(tmp_path / name), "embed_captions": "on"}
    built, rows = make(tmp_path / "in", tmp_path / "set", **options)
    assert [rows[f"{key}.png"]["text"] for key in "abc"] == [["one", "two"], ["only"], None]
    assert built.manifest.columns["text"] == {"kind": "text", "several": True, "present": 2, "texts": 3}
    first = make_embedder("minilm", "text")(["one"])[0]
    np.testing.assert_allclose(rows["a.png"]["caption"], first, atol=1e-5)
    assert pq.read_schema(next((tmp_path / "set").rglob("*.parquet"))).field("text").type == pa.list_(
        pa.string()
    )


def test_names_match_with_backslashes_and_in_any_unicode_form(tmp_path):
    save(tmp_path / "in" / "caf\u00e9" / "g00.png")
    (tmp_path / "list.csv").write_text("file,label\ncafe\u0301\\g00.png,x\n")
    _, rows = make(tmp_path / "in", tmp_path / "set", metadata=str(tmp_path / "list.csv"))
    assert list(rows) == ["caf\u00e9/g00.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file": "../outside.png"}', r"row 1: '../outside.png' is no file in"),
        ('{"file": "/etc/passwd"}', r"row 1: '/etc/passwd' is no file in"),
        ('{"file": "a.png"}\n{"label": "x"}', "row 2: no file"),
        ('{"file": "%s"}' % ("x" * 300), "names none of the pictures"),
        ("[[1, 2]]", "needs a column with the files"),
        ("[" * 100_000, "cannot read"),
    ],
)
def test_a_table_of_other_files_is_refused_in_one_line(tmp_path, text, message):
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "outside.png")
    (tmp_path / "in" / "metadata.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=f"metadata: .*{message}"):
        make(tmp_path / "in", tmp_path / "set")


def test_labels_lose_outer_spaces_and_a_difference_in_case_is_remarked(tmp_path):
    for index in range(4):
        save(tmp_path / "in" / f"{index}.png")
    (tmp_path / "list.csv").write_text("file,label\n0.png,cat\n1.png,cat \n2.png,Cat\n3.png,dog\n")
    built, _ = make(tmp_path / "in", tmp_path / "set", metadata=str(tmp_path / "list.csv"))
    assert built.manifest.columns["label"]["names"] == ["Cat", "cat", "dog"]
    assert built.notes == ["labels that differ only in case are different classes: Cat, cat"]


def test_a_table_states_splits_and_groups(tmp_path):
    rows = ["file,label,part,patient"]
    for index in range(40):
        save(tmp_path / "in" / f"{index:02d}.png")
        rows.append(f"{index:02d}.png,x,{'train' if index < 30 else 'Validation'},{index // 2}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    table = str(tmp_path / "list.csv")
    built, _ = make(tmp_path / "in", tmp_path / "set", metadata=table, split_column="part")
    assert splits_of(built) == {"train": 30, "val": 10}
    built, rows = make(
        tmp_path / "in", tmp_path / "groups", metadata=table, group_by="patient", val_share=0.3
    )
    manifest = built.manifest
    patients = {
        split: {int(key[:2]) // 2 for key in keys_of(str(tmp_path / "groups"), manifest, split)}
        for split in ("train", "val")
    }
    assert patients["val"] and not patients["train"] & patients["val"] and len(rows) == 40
    with pytest.raises(ConfigError, match=r"unknown column 'patiend'.*did you mean 'patient'"):
        make(tmp_path / "in", tmp_path / "no", metadata=table, group_by="patiend")
    with pytest.raises(ConfigError, match="split_column: got 'x', want one of train"):
        make(tmp_path / "in", tmp_path / "no", metadata=table, split_column="label")


# --- folders ------------------------------------------------------------------------------------------------


def test_folders_that_are_splits_are_splits_and_no_labels(tmp_path):
    for split, label, count in (
        ("train", "cat", 3),
        ("train", "dog", 2),
        ("val", "dog", 2),
        ("test", "cat", 1),
    ):
        for index in range(count):
            save(tmp_path / "in" / split / label / f"{index}.png")
    built, _ = make(tmp_path / "in", tmp_path / "set")
    assert built.manifest.columns["label"]["names"] == ["cat", "dog"]
    assert splits_of(built) == {"train": 5, "val": 2, "test": 1}


def test_a_folder_of_its_own_is_the_validation_split(tmp_path):
    for index in range(12):
        save(tmp_path / "in" / f"{index}.png")
        save(tmp_path / "other" / f"{index}.png", color=BLUE)
    built, rows = make(tmp_path / "in", tmp_path / "set", val_source=str(tmp_path / "other"), val_share=0.0)
    assert splits_of(built) == {"train": 12, "val": 12}
    assert tuple(decode(rows["../other/3.png"]["pixels"])[0, 0]) == BLUE


def test_text_files_beside_pictures_are_captions_and_other_files_are_counted(tmp_path):
    save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("\n a red square \nanother\n")
    (tmp_path / "in" / "b.doc").write_text("x")
    (tmp_path / "in" / "c.doc").write_text("x")
    name = os.fsencode(tmp_path / "in") + b"/\xff.png"
    with open(name, "wb") as file:
        file.write((tmp_path / "in" / "a.png").read_bytes())
    built, rows = make(tmp_path / "in", tmp_path / "set")
    assert {key: row["text"] for key, row in rows.items()} == {"a.png": ["a red square", "another"]}
    assert built.notes == ["skipped: 2 .doc files, 1 files whose names are not UTF-8"]
    _, rows = make(tmp_path / "in", tmp_path / "first", caption_lines="first")
    assert rows["a.png"]["text"] == "a red square"


def test_a_share_of_unreadable_files_is_tolerated_whatever_the_number():
    assert [bad_limit(text, 100_000) for text in ("0", "25", "1%", "0.5 %")] == [0, 25, 1000, 500]
    assert bad_limit("1%", 30) == 10
    for wrong in ("-1", "1.5", "many", "101%"):
        with pytest.raises(ConfigError, match=r"bad_limit: got .* want a number"):
            bad_limit(wrong, 100)


@pytest.mark.slow
@pytest.mark.ray
def test_folders_are_read_from_an_object_store(bucket, ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "cache"))
    mask = np.zeros((20, 20), np.uint8)
    mask[4:9] = 1
    (tmp_path / "masks" / "x").mkdir(parents=True)
    (tmp_path / "depth" / "x").mkdir(parents=True)
    for index, name in enumerate("abc"):
        save(tmp_path / "in" / "x" / f"{name}.png", color=(index, 2, 3))
        Image.fromarray(mask).save(tmp_path / "masks" / "x" / f"{name}.png")
        np.save(tmp_path / "depth" / "x" / f"{name}.npy", mask * 2.0)
    (tmp_path / "list.csv").write_text("file,label\nx/a.png,one\nx/b.png,two\n")
    for file in filter(Path.is_file, tmp_path.rglob("*.*")):
        fs, path = filesystem(bucket.uri(f"raw/{file.relative_to(tmp_path).as_posix()}"))
        write_atomic(fs, path, file.read_bytes())

    def built(place, out: str, workers: int):
        options = {"masks": place("masks"), "maps": f"depth={place('depth')}", "metadata": place("list.csv")}
        options |= {"source": place("in"), "size": 16}
        build("folder", str(tmp_path / out), options, workers=workers, progress=False)
        return read_rows(str(tmp_path / out))

    here = built(lambda name: str(tmp_path / name), "set", 0)
    assert set(here) == {"x/a.png", "x/b.png"} and here["x/a.png"]["depth"] and here["x/a.png"]["mask"]
    assert built(lambda name: bucket.uri(f"raw/{name}"), "far", 1) == here
    pipeline = make_pipeline("folder", {"source": bucket.uri("raw/in")})
    sent = pickle.loads(pickle.dumps(pipeline))
    shutil.rmtree(tmp_path / "cache")  # as on another machine
    assert len(render(sent, pipeline.items()).rows) == 3
    with pytest.raises(ConfigError, match="source: there is nothing at s3://toys/raw/no"):
        make_pipeline("folder", {"source": bucket.uri("raw/no")})


# --- pictures -----------------------------------------------------------------------------------------------


def test_an_opaque_alpha_channel_is_dropped(tmp_path):
    for index in range(3):
        save(tmp_path / "in" / f"{index}.jpg")
    save(tmp_path / "in" / "opaque.png", color=(*GREEN, 255))
    built, _ = make(tmp_path / "in", tmp_path / "set")
    assert built.manifest.columns["pixels"]["channels"] == 3 and "alpha" not in built.manifest.columns


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_pictures_need_not_become_squares(tmp_path, fit):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :30] = RED
    (tmp_path / "in").mkdir()
    Image.fromarray(wide).save(tmp_path / "in" / "wide.png")
    built, rows = make(tmp_path / "in", tmp_path / "set", size="16x32", fit=fit)
    pixels = decode(rows["wide.png"]["pixels"])
    assert pixels.shape == (16, 32, 3) and built.manifest.columns["pixels"]["size"] == [16, 32]
    red = (pixels[..., 0] > 200).sum() / pixels[..., 0].size
    assert red == pytest.approx({"crop": 0.5, "stretch": 0.5, "pad": 0.5 * 32 / 3 / 16}[fit], abs=0.06)


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_deep_pictures_are_scaled_where_asked_for(tmp_path, mode):
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    values = (ramp * 65535).astype(np.uint16) if mode == "I;16" else ramp.astype(np.float32)
    (tmp_path / "in").mkdir()
    Image.fromarray(values).save(tmp_path / "in" / "deep.tif")
    _, rows = make(tmp_path / "in", tmp_path / "set", depth="scale")
    assert abs(decode(rows["deep.tif"]["pixels"])[..., 0] - 255 * ramp).max() <= 1


@pytest.mark.parametrize(
    "name", ["turned.jpg", "turned.png", "turned.tif", "deep.png", "float.tif", "deep.tif"]
)
def test_a_given_picture_is_read_as_the_build_reads_it(tmp_path, name):
    ramp, exif = np.linspace(0, 1, 24 * 16).reshape(24, 16), Image.Exif()
    exif[0x0112] = 6
    kind = {"deep": (ramp * 65535).astype(np.uint16), "float": ramp.astype(np.float32)}
    values = kind.get(name[:-4], (ramp * 255).astype(np.uint8))
    (tmp_path / "in").mkdir()
    Image.fromarray(values).save(tmp_path / "in" / name, exif=exif)
    _, rows = make(tmp_path / "in", tmp_path / "set", depth="scale", size="16x24")
    given = ImageModality("pixels", ImageOptions(type="image"), (16, 24)).parse(str(tmp_path / "in" / name))
    built = decode(rows[name]["pixels"]).transpose(2, 0, 1)
    assert np.array_equal(given, built)
    assert given[0].std() > 60 and abs(given[0] - 255 * np.rot90(ramp, -1)).max() < 8


def test_jfif_is_a_picture_and_heic_too_with_its_package(tmp_path):
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "b.jfif", format="JPEG")
    (tmp_path / "in" / "c.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    built, rows = make(tmp_path / "in", tmp_path / "set")
    assert set(rows) == {"a.png", "b.jfif"} and set(built.bad) == {"c.HEIC"}
    if importlib.util.find_spec("pillow_heif") is None:
        assert "pip install pillow-heif" in built.bad["c.HEIC"]
    else:
        import pillow_heif

        pillow_heif.from_pillow(Image.new("RGB", (20, 20), BLUE)).save(tmp_path / "in" / "c.HEIC")
        _, rows = make(tmp_path / "in", tmp_path / "whole")
        assert abs(decode(rows["c.HEIC"]["pixels"]).astype(int) - BLUE).max() < 8


# --- masks --------------------------------------------------------------------------------------------------


def beside(folder, mask, name="a.png", picture_size=None, **options) -> None:
    """Write a picture and its mask."""
    height, width = np.asarray(mask).shape[:2]
    save(folder / "in" / "a.png", picture_size or (width, height))
    (folder / "masks").mkdir(exist_ok=True)
    Image.fromarray(np.asarray(mask)).save(folder / "masks" / name, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_like_its_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:4, :12] = RED
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in" / "a.jpg", exif=exif, quality=95)
    (tmp_path / "masks").mkdir()
    Image.fromarray((picture[..., 0] > 0).astype(np.uint8)).save(tmp_path / "masks" / "a.png")
    _, rows = make(tmp_path / "in", tmp_path / "set", masks=str(tmp_path / "masks"))
    pixels, mask = decode(rows["a.jpg"]["pixels"]), decode(rows["a.jpg"]["mask"])
    assert ((pixels[..., 0] > 127) == (mask == 1)).mean() > 0.9 and mask.any()
    upright = ImageOps.fit(ImageOps.exif_transpose(Image.open(tmp_path / "in" / "a.jpg")), (16, 16))
    assert abs(np.asarray(upright).astype(int) - pixels).mean() < 6


def test_a_mask_that_inflates_beyond_measure_costs_its_row_alone(tmp_path):
    mask = np.zeros((20, 20), np.uint8)
    mask[:10] = 1
    for name in "ab":
        save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"note\0\0" + zlib.compress(b"x" * 3_000_000))
    Image.fromarray(mask).save(tmp_path / "masks" / "b.png", pnginfo=info)
    built, rows = make(tmp_path / "in", tmp_path / "set", masks=str(tmp_path / "masks"))
    assert list(rows) == ["a.png"] and "b.png" in built.bad


def test_void_pixels_are_no_class(tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 2
    mask[3, :] = 255
    beside(tmp_path, mask)
    for ignore in ("auto", "255"):
        built, rows = make(
            tmp_path / "in", tmp_path / f"set{ignore}", masks=str(tmp_path / "masks"), ignore=ignore
        )
        facts = built.manifest.columns["mask"]
        assert facts["classes"] == 3 and facts["void"] == 255
        assert (decode(rows["a.png"]["mask"]) == mask).all()
    built, _ = make(tmp_path / "in", tmp_path / "all", masks=str(tmp_path / "masks"), ignore="none")
    assert built.manifest.columns["mask"]["classes"] == 256


def test_a_palette_names_the_colours_and_others_are_void(tmp_path):
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[:8] = RED
    mask[12:] = BLUE
    beside(tmp_path, mask, "a_mask.tif")
    (tmp_path / "palette.txt").write_text("#0000ff sea\n#ff0000 fire\n")
    palette = str(tmp_path / "palette.txt")
    built, rows = make(tmp_path / "in", tmp_path / "set", masks=str(tmp_path / "masks"), palette=palette)
    facts = built.manifest.columns["mask"]
    assert facts["names"] == ["sea", "fire"] and facts["colors"] == [[0, 0, 255], [255, 0, 0]]
    stored = decode(rows["a.png"]["mask"])
    assert (stored[:8] == 1).all() and (stored[12:] == 0).all() and (stored[8:12] == facts["void"]).all()


def test_large_ids_are_classes_in_their_order(tmp_path):
    mask = np.full((16, 16), 7, np.uint16)
    mask[:8] = 40_000
    beside(tmp_path, mask)
    built, rows = make(tmp_path / "in", tmp_path / "set", masks=str(tmp_path / "masks"))
    assert built.manifest.columns["mask"]["names"] == ["7", "40000"]
    assert (decode(rows["a.png"]["mask"]) == (mask == 40_000)).all()


def test_a_palette_file_gives_its_colours(tmp_path):
    mask = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 3)
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    save(tmp_path / "in" / "a.png", (16, 16))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / "a.png")
    built, _ = make(tmp_path / "in", tmp_path / "set", masks=str(tmp_path / "masks"))
    assert built.manifest.columns["mask"]["colors"] == [[0, 0, 0], [255, 0, 0], [0, 255, 0]]


# --- sets of labels -----------------------------------------------------------------------------------------


def test_a_column_of_the_table_holds_several_labels_per_row(tmp_path):
    for name in "abc":
        save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "list.csv").write_text("file,tags\na.png,red; round;red\nb.png,\nc.png,round\n")
    rows = [{"file": "a.png", "tags": ["round", "red"]}, {"file": "b.png", "tags": []}, {"file": "c.png"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, last in (("list.csv", [1]), ("list.jsonl", None)):
        options = {"labels_column": "tags", "labels_separator": ";", "metadata": str(tmp_path / name)}
        built, found = make(tmp_path / "in", tmp_path / f"set-{name}", **options)
        facts = built.manifest.columns["labels"]
        assert (facts["kind"], facts["names"]) == ("labels", ["red", "round"])
        assert [found[f"{key}.png"]["labels"] for key in "abc"] == [[0, 1], [], last]


def test_a_column_of_labels_needs_a_table_that_has_it(tmp_path):
    save(tmp_path / "in" / "a.png")
    with pytest.raises(ConfigError, match="labels_column: only a table has columns"):
        make(tmp_path / "in", tmp_path / "set", labels_column="tags")
    (tmp_path / "list.csv").write_text("file,tag\na.png,red\n")
    with pytest.raises(ConfigError, match=r"list\.csv: unknown column 'tags'.*did you mean 'tag'"):
        make(tmp_path / "in", tmp_path / "set", labels_column="tags", metadata=str(tmp_path / "list.csv"))


def test_columns_of_numbers_make_a_vector(tmp_path):
    for name in "abc":
        save(tmp_path / "in" / f"{name}.png")
    table = tmp_path / "list.csv"
    table.write_text("file,x,y\na.png,1.5,-2\nb.png,,3\nc.png,0,1e2\n")
    options = {"metadata": str(table), "vector_columns": "y, x"}
    built, rows = make(tmp_path / "in", tmp_path / "set", **options)
    facts = built.manifest.columns["vector"]
    assert (facts["kind"], facts["names"], facts["dim"], facts["present"]) == ("vector", ["y", "x"], 2, 2)
    assert rows["a.png"]["vector"].tolist() == [-2, 1.5] and rows["c.png"]["vector"].tolist() == [100, 0]
    assert rows["b.png"]["vector"] is None
    built, rows = make(tmp_path / "in", tmp_path / "weighted", metadata=str(table), weight_column="x")
    assert built.manifest.columns["weight"]["dim"] == 1
    weights = [rows[f"{name}.png"]["weight"] for name in "abc"]
    assert weights[0].tolist() == [1.5] and weights[1] is None and weights[2].tolist() == [0]
    table.write_text("file,x,y\na.png,1.5,old\n")
    with pytest.raises(ConfigError, match=r"vector_columns: .*list\.csv, row 1: .*'old'"):
        make(tmp_path / "in", tmp_path / "other", **options)
