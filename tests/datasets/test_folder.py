"""A user's own folder: nested folders, CSV, alpha, masks beside, formats, sizes and broken files."""

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.build import build, make_pipeline
from tests.datasets.reading import decode, read_rows

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path, size=(20, 20), color=RED, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "RGBA" if len(color) == 4 else "RGB"
    Image.new(mode, size, color).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    save(folder / "cats" / "a.png")
    save(folder / "cats" / "deep" / "b.jpg", (33, 21), GREEN)
    save(folder / "dogs" / "c.webp", (9, 40), BLUE, lossless=True)
    save(folder / ".hidden" / "d.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def make(source, out, **options):
    options = {"source": str(source), "size": 16, **options}
    built = build("folder", str(out), options, workers=0, progress=False)
    return built, read_rows(str(out))


def test_top_level_folders_are_the_labels(photos, tmp_path):
    built, rows = make(photos, tmp_path / "set")
    names = built.manifest.columns["label"]["names"]
    assert names == ["cats", "dogs"]
    labels = {key: names[row["label"]] for key, row in rows.items()}
    assert labels == {"cats/a.png": "cats", "cats/deep/b.jpg": "cats", "dogs/c.webp": "dogs"}
    assert set(built.manifest.columns) == {"pixels", "label"}


def test_pictures_of_any_size_and_format_become_squares(photos, tmp_path):
    built, rows = make(photos, tmp_path / "set")
    assert built.manifest.columns["pixels"]["size"] == [16, 16]
    for key, color in (("cats/a.png", RED), ("cats/deep/b.jpg", GREEN), ("dogs/c.webp", BLUE)):
        pixels = decode(rows[key]["pixels"])
        assert pixels.shape == (16, 16, 3)
        assert abs(pixels.astype(int) - color).max() <= 3


def test_middle_of_a_picture_is_used_undistorted(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (10, 200, 30)
    (tmp_path / "in").mkdir()
    Image.fromarray(wide).save(tmp_path / "in" / "wide.png")
    _, rows = make(tmp_path / "in", tmp_path / "set", size=20)
    assert np.array_equal(decode(rows["wide.png"]["pixels"]), wide[:, 20:40])


def test_picture_taken_sideways_is_turned_upright(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in" / "x.png", exif=exif)
    _, rows = make(tmp_path / "in", tmp_path / "set")
    assert np.array_equal(decode(rows["x.png"]["pixels"]), np.rot90(picture, -1))


def test_pictures_without_folders_have_no_label(tmp_path):
    save(tmp_path / "in" / "a.png")
    built, _ = make(tmp_path / "in", tmp_path / "set")
    assert set(built.manifest.columns) == {"pixels"}


def test_alpha_is_kept_and_becomes_a_mask(tmp_path):
    drawn = np.zeros((16, 16, 4), np.uint8)
    drawn[4:12, 4:12] = (0, 90, 200, 255)
    (tmp_path / "in").mkdir()
    Image.fromarray(drawn).save(tmp_path / "in" / "shape.png")
    save(tmp_path / "in" / "photo.jpg")
    built, rows = make(tmp_path / "in", tmp_path / "set")
    assert built.manifest.columns["pixels"]["channels"] == 4
    assert np.array_equal(decode(rows["shape.png"]["pixels"]), drawn)
    assert np.array_equal(decode(rows["shape.png"]["alpha"]), drawn[..., 3] // 255)
    assert decode(rows["photo.jpg"]["alpha"]).all()


def test_masks_none_keeps_alpha_in_the_picture_alone(tmp_path):
    save(tmp_path / "in" / "a.png", color=(1, 2, 3, 0))
    built, rows = make(tmp_path / "in", tmp_path / "set", masks="none")
    assert set(built.manifest.columns) == {"pixels"}
    assert decode(rows["a.png"]["pixels"]).shape == (16, 16, 4)


def test_masks_alpha_wants_a_picture_with_alpha(photos, tmp_path):
    with pytest.raises(ConfigError, match="masks=alpha, but no picture"):
        make(photos, tmp_path / "set", masks="alpha")


def test_index_masks_beside_the_pictures_are_cut_like_them(tmp_path):
    classes = np.zeros((20, 40), np.uint8)
    classes[:, 10:20], classes[:, 20:30] = 2, 5
    save(tmp_path / "in" / "x" / "a.jpg", (40, 20))
    save(tmp_path / "in" / "x" / "b.jpg", (40, 20))
    (tmp_path / "masks" / "x").mkdir(parents=True)
    Image.fromarray(classes).save(tmp_path / "masks" / "x" / "a.png")
    built, rows = make(tmp_path / "in", tmp_path / "set", size=20, masks=str(tmp_path / "masks"))
    assert built.manifest.columns["mask"]["classes"] == 6
    assert built.manifest.columns["mask"]["present"] == 1
    assert np.array_equal(decode(rows["x/a.jpg"]["mask"]), classes[:, 10:30])
    assert rows["x/b.jpg"]["mask"] is None


def test_black_and_white_masks_have_two_classes(tmp_path):
    save(tmp_path / "in" / "a.jpg", (16, 16))
    (tmp_path / "masks").mkdir()
    white = np.zeros((16, 16), np.uint8)
    white[3:9] = 255
    Image.fromarray(white).save(tmp_path / "masks" / "a.png")
    built, rows = make(tmp_path / "in", tmp_path / "set", masks=str(tmp_path / "masks"))
    assert built.manifest.columns["mask"]["names"] == ["background", "foreground"]
    assert np.array_equal(decode(rows["a.jpg"]["mask"]), white // 255)


def test_colour_masks_become_classes_that_remember_their_colours(tmp_path):
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[:, 4:8], mask[:, 8:] = RED, BLUE
    save(tmp_path / "in" / "a.jpg", (16, 16))
    (tmp_path / "in" / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "in" / "masks" / "a.png")
    built, rows = make(tmp_path / "in", tmp_path / "set", masks=str(tmp_path / "in" / "masks"))
    facts = built.manifest.columns["mask"]
    assert list(rows) == ["a.jpg"]
    assert facts["names"] == ["#000000", "#0000ff", "#ff0000"]
    assert np.array_equal(np.array(facts["colors"])[decode(rows["a.jpg"]["mask"])], mask)


def test_smoothed_masks_are_refused(tmp_path):
    save(tmp_path / "in" / "a.jpg")
    (tmp_path / "masks").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "masks" / "a.png")
    with pytest.raises(ConfigError, match="more than 256 colours"):
        make(tmp_path / "in", tmp_path / "set", masks=str(tmp_path / "masks"))


def test_masks_folder_without_a_match_is_refused(photos, tmp_path):
    save(tmp_path / "masks" / "other.png")
    with pytest.raises(ConfigError, match=r"no file in .* has the relative name of a picture"):
        make(photos, tmp_path / "set", masks=str(tmp_path / "masks"))


def test_mask_of_another_size_is_a_bad_row(tmp_path):
    save(tmp_path / "in" / "a.jpg", (20, 20))
    save(tmp_path / "in" / "b.jpg", (20, 20))
    for name, size in (("a", (20, 20)), ("b", (20, 10))):
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask = np.arange(size[0] * size[1]).reshape(size[::-1]) % 3
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    built, rows = make(tmp_path / "in", tmp_path / "set", masks=str(tmp_path / "masks"))
    assert list(rows) == ["a.jpg"]
    assert built.bad == {"b.jpg": "its mask has 20x10 pixels, the picture 20x20"}


def test_csv_gives_labels_and_captions_and_lists_the_rows(photos, tmp_path):
    (tmp_path / "list.csv").write_text(
        "file,label,caption\ncats/a.png,tabby,a red cat\ndogs/c.webp,,\n", encoding="utf-8-sig"
    )
    built, rows = make(photos, tmp_path / "set", csv=str(tmp_path / "list.csv"), embed_captions="on")
    assert set(rows) == {"cats/a.png", "dogs/c.webp"}
    assert built.manifest.columns["label"]["names"] == ["tabby"]
    assert rows["cats/a.png"]["text"] == "a red cat"
    assert np.linalg.norm(rows["cats/a.png"]["caption"]) == pytest.approx(1, abs=1e-5)
    assert rows["cats/a.png"]["label"] == 0
    assert [rows["dogs/c.webp"][column] for column in ("label", "text", "caption")] == [None, None, None]


def test_file_that_the_csv_lists_and_is_not_there_is_a_bad_row(photos, tmp_path):
    (tmp_path / "list.csv").write_text("file,label\ncats/a.png,x\ncats/z.png,y\n")
    built, rows = make(photos, tmp_path / "set", csv=str(tmp_path / "list.csv"))
    assert list(rows) == ["cats/a.png"]
    assert "No such file" in built.bad["cats/z.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na.png,x\n", "needs a column with the files"),
        ("file,label\n", "it has 0 rows"),
        ("file\na.png\na.png\n", "lists 1 of its files twice"),
        ("file,label\na.png,x\n,y\n", "row 2: no file"),
        (
            "file,lable\ncats/a.png,x\n",
            "list.csv: unknown column 'lable'; known: file, label, caption; did you mean 'label'[?]$",
        ),
        ("file,label,Captions\ncats/a.png,x,y\n", "unknown column 'Captions'.*did you mean 'caption'"),
        ("file,width\ncats/a.png,9\n", "unknown column 'width'; known: file, label, caption$"),
        (
            "file,label\na.png,x\nphotos/b.jpg,y\n",
            "names none of the pictures in .*photos; got 'a.png', want .* as 'cats/a.png'",
        ),
    ],
)
def test_csv_mistakes_are_named(photos, tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        make(photos, tmp_path / "set", csv=str(tmp_path / "list.csv"))


@pytest.mark.parametrize(
    "head", ["file,label,width,labels", "file,caption,width,filename", "file,label,caption,capture"]
)
def test_other_columns_are_passed_over_beside_a_label_or_a_caption(photos, tmp_path, head):
    (tmp_path / "list.csv").write_text(f"{head}\ncats/a.png,x,y,z\n")
    built, rows = make(photos, tmp_path / "set", csv=str(tmp_path / "list.csv"))
    row = dict(zip(head.split(","), ["cats/a.png", "x", "y", "z"], strict=True))
    assert built.manifest.columns.get("label", {}).get("names") == (
        [row["label"]] if "label" in row else None
    )
    assert rows["cats/a.png"].get("text") == row.get("caption")


def test_pictures_that_the_csv_does_not_name_are_counted(photos, tmp_path):
    (tmp_path / "list.csv").write_text("file,label\n./cats/a.png,x\n")
    built, _ = make(photos, tmp_path / "set", csv=str(tmp_path / "list.csv"))
    assert built.notes == ["skipped: 1 .txt files", "2 pictures are not in list.csv and left out"]
    (tmp_path / "list.csv").write_text("file,label\ncats/a.png,x\ncats/deep/b.jpg,x\ndogs/c.webp,x\n")
    assert make(photos, tmp_path / "whole", csv=str(tmp_path / "list.csv"))[0].notes == [
        "skipped: 1 .txt files"
    ]


def test_list_of_files_alone_chooses_pictures(photos, tmp_path):
    (tmp_path / "list.csv").write_text("file\ndogs/c.webp\n")
    assert list(make(photos, tmp_path / "set", csv=str(tmp_path / "list.csv"))[1]) == ["dogs/c.webp"]


def test_broken_files_are_counted_and_left_out(photos, tmp_path):
    (photos / "cats" / "empty.png").write_bytes(b"")
    (photos / "cats" / "text.jpg").write_text("not a picture")
    whole = (photos / "cats" / "a.png").read_bytes()
    (photos / "cats" / "cut.png").write_bytes(whole[: len(whole) // 2])
    built, rows = make(photos, tmp_path / "set")
    assert set(built.bad) == {"cats/empty.png", "cats/text.jpg", "cats/cut.png"}
    assert len(rows) == 3
    with pytest.raises(ConfigError, match=r"3 items .* more than bad_limit \(2\)"):
        make(photos, tmp_path / "other", bad_limit=2)


def test_pictures_of_more_than_8_bits_are_not_silently_clipped(tmp_path):
    save(tmp_path / "in" / "a.png")
    Image.fromarray(np.full((16, 16), 4000, np.uint16)).save(tmp_path / "in" / "deep.png")
    built, _ = make(tmp_path / "in", tmp_path / "set")
    assert "more than 8 bits" in built.bad["deep.png"]


def test_look_embeds_the_stored_picture(photos, tmp_path):
    from mmdiff_ray.datasets.embedders import make_embedder

    built, rows = make(photos, tmp_path / "set", look="efficientnet-lite0")
    assert built.manifest.columns["look"]["dim"] == 1280
    stored = Image.fromarray(decode(rows["cats/a.png"]["pixels"]))
    want = make_embedder("efficientnet-lite0", "image")([stored])[0]
    np.testing.assert_allclose(rows["cats/a.png"]["look"], want, atol=1e-5)


def test_captions_to_embed_need_a_csv(photos):
    with pytest.raises(ConfigError, match="no picture has a caption; give metadata=FILE"):
        make_pipeline("folder", {"source": str(photos), "embed_captions": "on"}).stages()


def test_missing_source_is_named(tmp_path):
    with pytest.raises(ConfigError, match="source is missing"):
        make_pipeline("folder", {})
    with pytest.raises(ConfigError, match="no folder"):
        make_pipeline("folder", {"source": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match="no picture in"):
        make_pipeline("folder", {"source": str(tmp_path)})
