"""Maps beside the pictures of a folder: names, units, ranges, unknown pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.build import make_pipeline
from tests.datasets.test_folder import RED, make, save

DEPTH = np.linspace(500, 4000, 16 * 16).reshape(16, 16).astype(np.uint16)


def beside(folder, **maps: np.ndarray) -> dict[str, str]:
    """Write two pictures, and maps of the first as folders of `folder`; return the option that names them."""
    for name in "ab":
        save(folder / "in" / "x" / f"{name}.jpg", (16, 16))
    for column, values in maps.items():
        (folder / "in" / column / "x").mkdir(parents=True)
        np.save(folder / "in" / column / "x" / f"a_{column}.npy", values)
    return {"maps": ", ".join(f"{column}={folder / 'in' / column}" for column in maps)}


def loaded(row, column: str) -> np.ndarray:
    return np.load(io.BytesIO(row[column]))


def test_maps_are_found_by_name_and_have_the_range_of_all_files(tmp_path):
    option = beside(tmp_path, depth=DEPTH / 1000, flow=np.dstack([DEPTH, -1.0 * DEPTH]))
    built, rows = make(tmp_path / "in", tmp_path / "set", map_content="flow=flow", **option)
    depth, flow = built.manifest.columns["depth"], built.manifest.columns["flow"]
    assert set(rows) == {"x/a.jpg", "x/b.jpg"} and "flow" not in built.manifest.columns["label"]["names"]
    assert (depth["channels"], depth["range"], depth["content"]) == (1, [0.5, 4.0], "values")
    assert (flow["channels"], flow["range"], flow["content"]) == (2, [-4000.0, 4000.0], "flow")
    np.testing.assert_allclose(loaded(rows["x/a.jpg"], "depth"), DEPTH[None] / 1000, rtol=1e-6)
    assert rows["x/b.jpg"]["depth"] is None and depth["present"] == 1


def test_units_void_values_and_ranges_are_stated(tmp_path):
    option, raw = beside(tmp_path), DEPTH.copy()
    raw[:4] = 0
    (tmp_path / "in" / "depth" / "x").mkdir(parents=True)
    Image.fromarray(raw).save(tmp_path / "in" / "depth" / "x" / "a.png")
    option = {"maps": f"depth={tmp_path / 'in' / 'depth'}", "map_unit": "0.001", "map_void": "0"}
    built, rows = make(tmp_path / "in", tmp_path / "set", **option)
    facts = built.manifest.columns["depth"]
    assert facts["range"] == pytest.approx([DEPTH[4, 0] / 1000, 4]) and facts["unit"] == 0.001
    assert facts["known_share"] == 0.75 and np.isnan(loaded(rows["x/a.jpg"], "depth")[0, :4]).all()
    built, rows = make(tmp_path / "in", tmp_path / "cut", **option, map_range="depth=1:3")
    known = (raw >= 1000) & (raw <= 3000)
    assert np.array_equal(~np.isnan(loaded(rows["x/a.jpg"], "depth")[0]), known)


def test_a_map_is_turned_and_cut_like_its_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:, :12] = RED
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in" / "a.jpg", exif=exif, quality=95)
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "a.npy", picture[..., 0] / 255)
    _, rows = make(tmp_path / "in", tmp_path / "set", maps=f"red={tmp_path / 'maps'}", fit="pad")
    red, pixels = loaded(rows["a.jpg"], "red")[0], np.asarray(Image.open(io.BytesIO(rows["a.jpg"]["pixels"])))
    known = ~np.isnan(red)
    assert known.mean() == pytest.approx(2 / 3, abs=0.1) and known.any(1).all() and not known.any(0).all()
    assert ((pixels[..., 0] > 127) == (red > 0.5))[known].mean() > 0.9


def test_a_map_of_another_size_or_a_broken_one_is_a_bad_row(tmp_path):
    option = beside(tmp_path, depth=DEPTH)
    np.save(tmp_path / "in" / "depth" / "x" / "b_depth.npy", DEPTH[:8])
    save(tmp_path / "in" / "x" / "c.jpg", (16, 16))
    (tmp_path / "in" / "depth" / "x" / "c_depth.npy").write_bytes(b"none")
    built, rows = make(tmp_path / "in", tmp_path / "set", **option)
    assert list(rows) == ["x/a.jpg"]
    assert built.bad["x/b.jpg"] == "its map has 16x8 pixels, the picture 16x16" and "x/c.jpg" in built.bad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": "{}"}, "maps: got .*, want COLUMN=FOLDER"),
        ({"maps": "mask={}/in/depth"}, "maps: a map cannot be called mask"),
        ({"maps": "depth={}/none"}, "maps: no folder .*none; want COLUMN=FOLDER"),
        ({"maps": "depth={}/empty"}, r"maps: no file in .*; a picture a/b.jpg wants a/b.npy, a/b_depth.npy"),
        ({"map_content": "heat"}, "map_content: unknown 'heat'; known: values, normals, flow"),
        ({"map_unit": "mm"}, "map_unit: got 'mm', want a number"),
        ({"map_void": "normals=0"}, "map_void: unknown map 'normals'; known: depth"),
        ({"map_range": "3"}, r"map_range: got \['3'\], want \[lowest, highest\]"),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, options, message):
    given = {**beside(tmp_path, depth=DEPTH), **options}
    given["maps"] = given["maps"].format(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        make_pipeline("folder", {"source": str(tmp_path / "in"), **given})
