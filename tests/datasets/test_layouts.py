"""Tiny folders in the layouts of COCO and Cityscapes: which pictures are rows, and what their masks hold."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.build import build, make_pipeline
from mmdiff_ray.datasets.layouts import CITYSCAPES, CocoMasks, Drawing
from tests.datasets.reading import decode, read_rows

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}]
CAR, CAT, BRUSH = 1, 2, 3


def save(file: Path, size=(16, 16), color=(10, 20, 30)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)


def box(left: int, top: int, right: int, bottom: int) -> list[int]:
    return [left, top, right, top, right, bottom, left, bottom]


def an_annotation(image: int, category: int, segmentation, area: float) -> dict:
    return {"image_id": image, "category_id": category, "segmentation": segmentation, "area": area}


def runs_of(mask: np.ndarray) -> dict:
    """Return a mask's runs of zeros and ones by turns, down the columns, from zeros on."""
    flat = mask.T.ravel()
    counts, last = [0], 0
    for value in flat.tolist():
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"counts": counts, "size": list(mask.shape)}


# --- COCO ---------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path):
    pytest.importorskip("pycocotools", reason="pip install 'mmdiff-ray[coco]'")
    folder = tmp_path / "photos"
    for name, size in (("a.jpg", (16, 16)), ("b.jpg", (16, 16)), ("c.jpg", (24, 16))):
        save(folder / name, size)
    save(folder / "unlisted.jpg")
    some = np.zeros((16, 16), np.uint8)
    some[3:6, 4:9] = some[10, 12] = 1
    images = [
        {"id": 7, "file_name": "a.jpg", "width": 16, "height": 16},
        {"id": 5, "file_name": "b.jpg", "width": 16, "height": 16},
        {"id": 6, "file_name": "c.jpg", "width": 24, "height": 16},
    ]
    annotations = [
        an_annotation(7, 17, [box(4, 4, 8, 8)], 16),
        an_annotation(7, 3, [box(2, 2, 12, 12), box(13, 13, 15, 16)], 106),
        an_annotation(5, 90, runs_of(some), 16),
    ]
    (tmp_path / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    words = [
        {"id": 9, "image_id": 7, "caption": "later"},
        {"id": 2, "image_id": 7, "caption": " A cat on a car. "},
        {"id": 3, "image_id": 5, "caption": "a brush"},
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": words}))
    return tmp_path, some


def make(source: Path, out: Path, **options):
    options = {"source": str(source), "size": 16, **options}
    built = build("folder", str(out), options, workers=0, progress=False)
    return built, read_rows(str(out))


def make_coco(folder: Path, **options):
    annotations = str(folder / "instances.json")
    return make(folder / "photos", folder / "set", layout="coco", annotations=annotations, **options)


def test_coco_masks_have_a_class_for_each_category_and_small_things_lie_on_top(coco):
    folder, some = coco
    built, rows = make_coco(folder)
    assert built.manifest.columns["mask"]["names"] == ["background", "car", "cat", "toothbrush"]
    expected = np.zeros((16, 16), np.uint8)
    expected[2:12, 2:12] = expected[13:16, 13:15] = CAR
    expected[4:8, 4:8] = CAT
    assert np.array_equal(decode(rows["a.jpg"]["mask"]), expected)
    assert np.array_equal(decode(rows["b.jpg"]["mask"]), BRUSH * some)


def test_coco_rows_are_the_listed_pictures_and_one_without_annotations_is_background(coco):
    folder, _ = coco
    built, rows = make_coco(folder)
    assert set(rows) == {"a.jpg", "b.jpg", "c.jpg"}
    assert set(built.manifest.columns) == {"pixels", "mask"}
    assert not decode(rows["c.jpg"]["mask"]).any()


def test_packed_runs_hold_what_plain_ones_do(coco):
    from pycocotools import mask as tool

    folder, some = coco
    file = folder / "instances.json"
    content = json.loads(file.read_text())
    packed = tool.encode(np.asfortranarray(some))
    runs = {"size": packed["size"], "counts": packed["counts"].decode()}
    content["annotations"][2]["segmentation"] = runs
    file.write_text(json.dumps(content))
    assert np.array_equal(decode(make_coco(folder)[1]["b.jpg"]["mask"]), BRUSH * some)


def test_all_captions_of_a_picture_are_its_text(coco):
    folder, _ = coco
    _, rows = make_coco(folder, captions=str(folder / "captions.json"))
    assert {key: row["text"] for key, row in rows.items()} == {
        "a.jpg": ["A cat on a car.", "later"],
        "b.jpg": ["a brush"],
        "c.jpg": None,
    }


@pytest.mark.parametrize(
    "outline, box, drawn",
    [
        ([[1, 2, 3, 4]], None, 0),
        ([], None, 0),
        ([[]], [2, 3, 0, 4], 0),
        (None, [2, 3, 4, 5], 20),
        ([[1, 2, 3, 4]], [2, 3, 4, 5], 20),
    ],
)
def test_an_object_without_an_outline_is_its_box_and_one_with_neither_costs_no_picture(
    coco, outline, box, drawn
):
    folder, _ = coco
    file = folder / "instances.json"
    content = json.loads(file.read_text())
    changed = content["annotations"][2]
    changed |= {"segmentation": outline, "bbox": box}
    if outline is None:
        del changed["segmentation"]
    file.write_text(json.dumps(content))
    built, rows = make_coco(folder)
    assert set(rows) == {"a.jpg", "b.jpg", "c.jpg"} and not built.bad
    assert int((decode(rows["b.jpg"]["mask"]) > 0).sum()) == drawn
    lost = [note for note in built.notes if "neither outline nor box" in note]
    assert lost == ([] if drawn else ["1 of 3 objects have neither outline nor box"])


def test_categories_of_one_name_are_one_class_and_a_reserved_name_is_changed(coco):
    folder, _ = coco
    file = folder / "instances.json"
    content = json.loads(file.read_text())
    names = [category["name"] for category in content["categories"]]
    content["categories"].append({"id": 95, "name": names[0]})
    content["categories"].append({"id": 96, "name": "background"})
    file.write_text(json.dumps(content))
    built, _ = make_coco(folder)
    known = built.manifest.columns["mask"]["names"]
    assert len(known) == len(set(known)) == len(names) + 2
    assert {"background", "background (category)"} <= set(known)
    assert len([note for note in built.notes if "one class" in note or "is called" in note]) == 2


def test_picture_of_another_size_than_annotated_is_a_bad_row(coco):
    folder, _ = coco
    save(folder / "photos" / "c.jpg", (20, 16))
    assert "its mask has 24x16 pixels, the picture 20x16" in make_coco(folder)[0].bad["c.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "annotations: cannot read"),
        ("[]", "holds list; want a COCO file with lists of images, annotations, categories"),
        ('{"annotations": []}', r"holds \['annotations'\]; want a COCO file"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}',
            "lists 0 images and 1 categories",
        ),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "x"}]}',
            r"no COCO file of instances \(KeyError: 'file_name'\)",
        ),
        (
            '{"images": [], "annotations": [{"category_id": 4, "image_id": 1, "bbox": [0, 0, 1, 1]}], '
            '"categories": [{"id": 1, "name": "x"}]}',
            r"no COCO file of instances \(KeyError: 4\)",
        ),
    ],
)
def test_other_files_than_cocos_are_refused(coco, content, message):
    folder, _ = coco
    (folder / "instances.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        make_coco(folder)


# --- Cityscapes ---------------------------------------------------------------------------------------------


def write_city(source: Path, part: str, city: str, name: str, ids: np.ndarray | None) -> None:
    save(source / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png", (32, 16))
    if ids is not None:
        file = source / "gtFine" / part / city / f"{name}_gtFine_labelIds.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(file)


@pytest.fixture
def city(tmp_path):
    ids = np.zeros((16, 32), np.uint8)
    ids[:, 8:16], ids[4:8, 16:24], ids[8:, 16:20], ids[8:, 20:24] = 7, 26, 33, 9
    source = tmp_path / "cityscapes"
    write_city(source, "train", "aachen", "aachen_000000_000019", ids)
    write_city(source, "val", "ulm", "ulm_000001_000019", None)
    write_city(source, "test", "bonn", "bonn_000002_000019", 0 * ids)
    return source, ids


def test_cityscapes_masks_have_the_benchmarks_classes_and_all_else_is_unlabelled(city, tmp_path):
    source, ids = city
    built, rows = make(source, tmp_path / "set", layout="cityscapes")
    facts = built.manifest.columns["mask"]
    assert facts["classes"] == 20 and facts["names"][0] == "unlabelled" and facts["present"] == 1
    mask = decode(rows["leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"]["mask"])
    names = np.array(facts["names"])[mask]
    middle = ids[:, 8:24]
    for number, name in {0: "unlabelled", 9: "unlabelled", 7: "road", 26: "car", 33: "bicycle"}.items():
        assert set(names[middle == number]) == {name}
    assert facts["colors"][facts["names"].index("person")] == [220, 20, 60]


def test_cityscapes_pictures_are_labelled_by_city_and_masks_of_the_test_part_are_none(city, tmp_path):
    built, rows = make(city[0], tmp_path / "set", layout="cityscapes")
    names = built.manifest.columns["label"]["names"]
    assert {key.split("/")[1]: names[row["label"]] for key, row in rows.items()} == {
        "train": "aachen",
        "val": "ulm",
        "test": "bonn",
    }
    assert {key.split("/")[1] for key, row in rows.items() if row["mask"] is not None} == {"train"}


def test_there_are_nineteen_classes_of_different_names_and_colours():
    assert len(CITYSCAPES) == len({name for name, _ in CITYSCAPES.values()}) == 19
    assert len({color for _, color in CITYSCAPES.values()}) == 19


def test_masks_in_colour_are_no_ids(city, tmp_path):
    source, _ = city
    save(source / "gtFine" / "val" / "ulm" / "ulm_000001_000019_gtFine_labelIds.png", (32, 16))
    built, _ = make(source, tmp_path / "set", layout="cityscapes")
    assert list(built.bad) == ["leftImg8bit/val/ulm/ulm_000001_000019_leftImg8bit.png"]
    assert "must hold ids of 8 bits; got mode RGB" in next(iter(built.bad.values()))


def test_packed_runs_are_what_pycocotools_decodes():
    tool = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for share in (0, 0.03, 0.5, 0.97, 1):
        mask = np.asfortranarray((rng.random((40, 60)) < share).astype(np.uint8))
        packed = {"size": [40, 60], "counts": tool.encode(mask)["counts"].decode()}
        for outline in (packed, runs_of(mask)):
            read = CocoMasks(("cat",)).read(Drawing(40, 60, ((1, outline),)))
            assert np.array_equal(read, mask)


@pytest.mark.parametrize(
    "outline",
    [
        [[0, 0, 1e9, 0, 1e9, 1e9]],
        [[0, 0, float("nan"), 0, 5, 5]],
        {"size": [8, 8], "counts": [3, 2]},
        {"size": [8, 8], "counts": [0, 2**40]},
        {"size": [8, 8], "counts": [70, -6]},
        {"size": [10**6, 10**6], "counts": "04"},
        {"size": [8, 8], "counts": "zzzz"},
        {"size": [8, 8], "counts": "P"},
        {"size": [8, 8]},
    ],
)
def test_outlines_that_crash_pycocotools_or_draw_garbage_are_unreadable(outline):
    with pytest.raises(ValueError, match="its outline of class 'cat'"):
        CocoMasks(("cat",)).read(Drawing(8, 8, ((1, outline),)))


@pytest.mark.parametrize("size", [(10**6, 10**6), (0, 8), (-1, 8), (2.5, 8), (None, 8)])
def test_a_picture_that_declares_an_absurd_size_is_unreadable(size):
    with pytest.raises(ValueError, match="want a height and width"):
        CocoMasks(("cat",)).read(Drawing(*size, ()))


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/passwd", "", 7, None])
def test_a_coco_file_names_pictures_of_its_folder_alone(coco, tmp_path, name):
    source, file = coco[0] / "photos", coco[0] / "instances.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = name
    file.write_text(json.dumps(content))
    save(tmp_path / "outside.jpg")
    with pytest.raises(ConfigError, match="is no COCO file of instances"):
        make_pipeline("folder", {"source": str(source), "layout": "coco", "annotations": str(file)})


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "voc"}, "layout: got 'voc', want one of plain, coco, cityscapes"),
        ({"layout": "cityscapes"}, "has no leftImg8bit/PART/CITY"),
        ({"layout": "cityscapes", "masks": "alpha"}, "masks: only layout=plain reads it"),
        ({"layout": "coco", "csv": "x.csv"}, "csv: only layout=plain reads it"),
        ({"layout": "coco"}, "annotations is missing"),
        ({"annotations": "x.json"}, "annotations: only layout=coco reads it; got layout=plain"),
        ({"layout": "cityscapes", "captions": "x.json"}, "captions: only layout=coco reads it"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, message):
    save(tmp_path / "in" / "a.png")
    with pytest.raises(ConfigError, match=message):
        make_pipeline("folder", {"source": str(tmp_path / "in"), **options})
