"""Inspecting: the figures are the data set's, and the picture shows its pixels."""

import shutil

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.build import build
from mmdiff_ray.datasets.inspect import draw_rows, human_bytes, inspect, over_checkerboard, paint_mask


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("inspect") / "set")
    build("sprites", out, {"count": 50, "size": 32, "val_share": 0.2}, workers=0, progress=False)
    return out


def test_tables_say_what_the_manifest_says(built, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path = inspect(built, tmp_path / "deep" / "rows.png")
    shown = capsys.readouterr().out
    for words in ("train", "32x32 pixels, RGB", "7 classes", "9 numbers by sprites-factors", "circle"):
        assert words in shown
    assert "test" not in shown.split("columns")[0].split()  # there is none
    assert str(path) in shown.replace("\n", "")
    assert Image.open(path).size[0] > 600


def test_every_kind_of_column_is_described_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "depth" / "x").mkdir(parents=True)
    for name in "abcd":
        Image.new("RGB", (16, 16), "red").save(tmp_path / "in" / "x" / f"{name}.png")
        np.save(tmp_path / "depth" / "x" / f"{name}.npy", np.linspace(0, 5, 256).reshape(16, 16))
    np.savez(
        tmp_path / "v.npz", v=np.eye(4, dtype=np.float32), names=np.array([f"x/{n}.png" for n in "abcd"])
    )
    rows = [f'x/{name}.png,x,"[""one"", ""two""]",red|round,1,2,0.5' for name in "abcd"]
    (tmp_path / "list.csv").write_text("\n".join(["file,label,caption,tags,age,height,often", *rows]))
    options = {
        "source": str(tmp_path / "in"), "size": 16, "maps": f"depth={tmp_path}/depth",
        "metadata": str(tmp_path / "list.csv"), "labels_column": "tags", "vector_columns": "age,height",
        "weight_column": "often", "embeddings": f"look={tmp_path}/v.npz",
    }  # fmt: skip
    build("folder", str(tmp_path / "set"), options, workers=0, progress=False)
    inspect(str(tmp_path / "set"), tmp_path / "rows.png")
    shown = capsys.readouterr().out
    for words in (
        "16x16 pixels, 1 channel, 0 to 5", "2 names, 2.0 per row", "age, height", "1 numbers",
        "2.0 texts per row", "4 numbers by v.npz@", "1 name, the commonest 100 %",
    ):  # fmt: skip
        assert words in shown, words
    assert Image.open(tmp_path / "rows.png").size[0] > 600


@pytest.mark.parametrize("end", ["", "/"])
def test_picture_is_by_default_called_like_the_last_part_of_the_uri(built, tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built, tmp_path / "data" / "photos")
    assert str(inspect(f"data/photos{end}")) == "photos.png"
    assert (tmp_path / "photos.png").is_file()


@pytest.mark.parametrize("rows", [1, 3, 12, 400])
def test_any_number_of_rows_can_be_drawn(built, rows):
    assert draw_rows(built, rows).height > 100


def test_rows_that_lack_a_column_can_be_drawn(tmp_path):
    (tmp_path / "in" / "x").mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "in" / "x" / "a.png")
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "in" / "b.png")
    options = {"source": str(tmp_path / "in"), "size": 16}
    build("folder", str(tmp_path / "set"), options, workers=0, progress=False)
    drawn = np.asarray(draw_rows(str(tmp_path / "set"), 2)).reshape(-1, 3)
    for color in ((255, 0, 0), (0, 0, 255)):
        assert (drawn == color).all(1).sum() >= 64 * 64


def test_data_set_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="no data set at"):
        inspect(str(tmp_path / "nothing"))


def test_checkerboard_shows_through_where_there_is_no_alpha():
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[8:] = (10, 20, 30, 255)
    shown = over_checkerboard(pixels)
    assert {tuple(color) for color in shown[:8].reshape(-1, 3).tolist()} == {(226,) * 3, (255,) * 3}
    assert (shown[8:] == (10, 20, 30)).all()


def test_masks_are_painted_in_their_own_colours():
    classes = np.repeat(np.array([[0, 1, 2]], np.uint8), 3, axis=0)
    own = paint_mask(classes, {"classes": 3, "colors": [None, [1, 2, 3], [200, 100, 0]]})
    assert own[0, 1].tolist() == [1, 2, 3] and own[0, 2].tolist() == [200, 100, 0]
    assert own[0, 0].tolist() in ([226] * 3, [255] * 3)
    invented = paint_mask(classes, {"classes": 3})
    assert len({tuple(color) for color in invented[0].tolist()}) == 3


def test_bytes_are_written_for_people():
    assert [human_bytes(n) for n in (999, 11_600_000, 2.5e15)] == ["999 bytes", "11.6 MB", "2500.0 TB"]


def test_a_damaged_shard_is_named(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    for shard in copy.glob("*/*.parquet"):
        shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"copy/train/00000\.parquet cannot be read"):
        draw_rows(str(copy))
