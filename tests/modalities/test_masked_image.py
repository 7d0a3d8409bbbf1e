"""Masked images: how much is missing, and that what is visible is the image."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.masked_image import HOLES, MaskedImageModality, MaskedImageOptions, draw_hole
from tests.modalities import tiny


def masked(size: tuple[int, int] = tiny.SIZE, **options) -> MaskedImageModality:
    return MaskedImageModality("masked", MaskedImageOptions(type="masked_image", **options), size)


@pytest.mark.parametrize("kind", [kind for kind in HOLES if kind != "half"])
@pytest.mark.parametrize("size", [(2, 2), (8, 12), (16, 16), (64, 64)])
def test_holes_cover_the_ratio_asked_for_within_a_cell(kind, size):
    cells = size[0] * size[1]
    for seed, ratio in enumerate([0.001, 0.1, 0.33, 0.5, 0.75, 0.95, 0.999]):
        hole = draw_hole(np.random.default_rng(seed), kind, ratio, size)
        assert hole.shape == size and hole.dtype == bool
        assert 1 <= hole.sum() <= cells - 1
        assert abs(hole.sum() - ratio * cells) <= 1


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (8, 12)])
def test_half_holes_are_one_of_the_four_halves(size):
    holes = [draw_hole(np.random.default_rng(seed), "half", 0.2, size) for seed in range(60)]
    assert len({hole.tobytes() for hole in holes}) == 4
    for hole in holes:
        assert abs(hole.sum() - hole.size / 2) <= max(size) / 2
        assert len(np.unique(hole, axis=0)) == 1 or len(np.unique(hole, axis=1)[0]) == 1


def test_kinds_of_holes_have_their_shapes():
    """Share of cells whose right neighbour is alike: scattered holes are rough, blocks are not."""

    def smoothness(kind: str) -> float:
        holes = [draw_hole(np.random.default_rng(seed), kind, 0.4, (32, 32)) for seed in range(20)]
        return float(np.mean([(hole[:, 1:] == hole[:, :-1]).mean() for hole in holes]))

    assert smoothness("scatter") < 0.6
    assert smoothness("blocks") > 0.9 and smoothness("freeform") > 0.85 and smoothness("half") > 0.95


def test_holes_reach_every_cell():
    for kind in HOLES:
        count = sum(draw_hole(np.random.default_rng(seed), kind, 0.4, tiny.SIZE) for seed in range(300))
        assert (count > 20).all() and (count < 280).all()


def test_visible_pixels_are_the_images_and_the_hole_is_empty():
    batch = tiny.rows(tiny.instances(), 40)
    image, hidden = batch.data["pixels"], batch.data["masked"]
    visible = hidden[:, 3:] == 255
    assert set(hidden[:, 3].unique().tolist()) == {0, 255}
    assert torch.equal(hidden[:, :3], torch.where(visible, image, 0))
    share = (~visible).float().mean((1, 2, 3))
    assert share.min() > 0.09 and share.max() < 0.76 and share.std() > 0.1


def test_code_is_0_in_the_hole_and_condition_says_where_it_is():
    modality, batch = masked(), tiny.rows(tiny.instances(), 40)
    data = batch.data["masked"]
    modality.calibrate(data)
    code, condition = modality.encode(data), modality.condition(data)
    hole = (data[:, 3:] == 0).expand(-1, 3, -1, -1)
    assert (code[hole] == 0).all() and (code[~hole] != 0).float().mean() > 0.9
    assert torch.equal(condition[:, :3], code)
    assert torch.equal(condition[:, 3:] > 0, data[:, 3:] > 0)


def test_it_is_made_from_its_source_alone():
    modality = masked(source="photo")
    assert modality.made_from == "photo" and modality.columns == () and modality.only_given
    with pytest.raises(TypeError, match="masked is only ever given"):
        modality.from_code(torch.zeros(1, 3, *tiny.SIZE))


def test_alpha_below_one_half_is_the_hole_of_a_picture(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (*tiny.SIZE, 4), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "p.png")
    parsed = masked().parse(str(tmp_path / "p.png"))
    hole = array[..., 3] < 128
    assert np.array_equal(parsed[3] == 0, hole)
    assert np.array_equal(parsed[:3], np.where(hole, 0, array[..., :3].transpose(2, 0, 1)))


def test_white_in_a_second_picture_is_the_hole_and_transparency_becomes_white(tmp_path):
    picture, hole = np.zeros((*tiny.SIZE, 4), np.uint8), np.zeros(tiny.SIZE, np.uint8)
    picture[:, :6], hole[:3] = (10, 20, 30, 255), 255
    Image.fromarray(picture).save(tmp_path / "p.png")
    Image.fromarray(hole).save(tmp_path / "h.png")
    parsed = masked().parse(f"{tmp_path / 'p.png'},{tmp_path / 'h.png'}")
    assert (parsed[3] == np.where(hole, 0, 255)).all() and (parsed[:3, :3] == 0).all()
    assert (parsed[:3, 3:, :6] == np.array([10, 20, 30])[:, None, None]).all()
    assert (parsed[:3, 3:, 6:] == 255).all()


def test_a_picture_without_a_hole_is_refused(tmp_path):
    Image.new("RGB", (12, 8)).save(tmp_path / "p.png")
    with pytest.raises(ConfigError, match=r"masked: .*p\.png has no hole"):
        masked().parse(str(tmp_path / "p.png"))
    with pytest.raises(ConfigError, match=r"masked: no file .*none\.png"):
        masked().parse(f"{tmp_path / 'p.png'},{tmp_path / 'none.png'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holes": ["blocks", "ring"]}, r"masked\.holes: got .*'ring'.*want some of blocks"),
        ({"holes": []}, r"masked\.holes"),
        ({"ratio": [0.5]}, r"masked\.ratio"),
        ({"ratio": [0.6, 0.5]}, r"masked\.ratio"),
        ({"ratio": [0.0, 0.5]}, r"masked\.ratio"),
        ({"size": (1, 9)}, r"masked: got a space of \(1, 9\) cells"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        masked(**options)
