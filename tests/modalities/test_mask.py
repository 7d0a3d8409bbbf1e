"""Masks: votes of pixels, alignment with the image, the categorical likelihood, files."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.mask import MaskModality, MaskOptions
from tests.modalities import tiny


def mask(classes: int = 5, size: tuple[int, int] = tiny.SIZE, **options) -> MaskModality:
    return MaskModality("palette", MaskOptions(type="mask", classes=classes, **options), size)


def context(size: tuple[int, int] = tiny.SIZE, flip: bool = False, visit: int = 0) -> RowContext:
    return RowContext(size, seed=0, visit=visit, row_id=3, flip=flip)


def read(modality: MaskModality, array: np.ndarray, **changes) -> np.ndarray:
    return modality.read({"palette": tiny.png(array)}, context(modality.size, **changes), {})


def test_every_cell_takes_the_class_most_of_its_pixels_have():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 5, (tiny.SIZE[0] * 5, tiny.SIZE[1] * 5), dtype=np.uint8)
    fitted = read(mask(), array)
    for row, column in itertools.product(*map(range, tiny.SIZE)):
        counts = np.bincount(array[row * 5 : row * 5 + 5, column * 5 : column * 5 + 5].ravel(), minlength=5)
        assert fitted[row, column] == counts.argmax()


def test_a_thin_line_of_one_class_loses_against_the_rest_of_its_cells():
    array = np.zeros((32, 48), np.uint8)
    array[:, ::4] = 3  # a quarter of the pixels of every cell, where the nearest pixel could hit it
    assert (read(mask(), array) == 0).all()


def test_sizes_that_the_cells_do_not_divide_are_voted_on_as_well():
    array = np.zeros((35, 53), np.uint8)
    array[: 35 // 2, :] = 2
    array[::9, ::9] = 4  # specks, 1 % of the pixels
    fitted = read(mask(), array)
    assert fitted.shape == tiny.SIZE
    assert (fitted[:3] == 2).all() and (fitted[5:] == 0).all()


def test_small_masks_are_enlarged_by_repetition():
    array = (np.arange(6, dtype=np.uint8) % 5).reshape(2, 3)
    assert np.array_equal(read(mask(), array), array.repeat(4, 0).repeat(4, 1))


def test_a_mask_of_the_right_size_is_read_unchanged():
    array = np.random.default_rng(0).integers(0, 5, tiny.SIZE, dtype=np.uint8)
    assert np.array_equal(read(mask(), array), array)


@pytest.mark.parametrize("size", [tiny.SIZE, (tiny.SIZE[0] * 4, tiny.SIZE[1] * 4)])
def test_image_and_mask_are_mirrored_together(size):
    modalities = tiny.instances()
    for visit in range(12):
        row = tiny.raw_row(5, size)
        white = RowContext(tiny.SIZE, seed=0, visit=visit, row_id=5, backgrounds="white")
        plain = RowContext(tiny.SIZE, seed=0, visit=visit, row_id=5, backgrounds="white", flip=False)
        seen, straight = tiny.read(modalities, row, white), tiny.read(modalities, row, plain)
        turn = slice(None, None, -1 if white.mirrored else None)
        for name in ("pixels", "alpha", "palette"):
            assert np.array_equal(seen[name], straight[name][..., turn])


def test_both_directions_occur():
    assert {context(flip=True, visit=visit).mirrored for visit in range(20)} == {True, False}


@pytest.mark.parametrize("array", [np.full((8, 12), 5), np.zeros((8, 12, 3))])
def test_a_mask_with_unknown_classes_or_colours_is_an_error_with_both_numbers(array):
    with pytest.raises(ValueError, match=r"palette.*want \(h, w\) with classes below 5"):
        read(mask(), array.astype(np.uint8))


def test_likelihood_is_that_of_independent_cells_and_sums_to_one():
    modality = mask(3, (1, 2))
    prediction = torch.randn(1, 3, 1, 2, generator=torch.Generator().manual_seed(0))
    share = prediction.softmax(1)[0, :, 0]
    total = 0.0
    for first, second in itertools.product(range(3), repeat=2):
        data = torch.tensor([[[first, second]]], dtype=torch.uint8)
        nats = modality.negative_log_likelihood(prediction, data)
        assert float((-nats).exp()) == pytest.approx(float(share[first, 0] * share[second, 1]), rel=1e-5)
        total += float((-nats).exp())
    assert total == pytest.approx(1, abs=1e-6)
    assert modality.elements == 2


@pytest.mark.parametrize("classes", [2, 3, 25, 256])
def test_codes_of_all_classes_read_back(classes):
    modality = mask(classes, (16, 16))
    data = (torch.arange(256) % classes).reshape(1, 16, 16).to(torch.uint8)
    assert torch.equal(modality.from_code(modality.encode(data)), data)


def test_colours_of_the_data_set_are_shown_and_others_differ():
    modality = mask(3, colors=[None, [1, 2, 3], None])
    shown = modality.picture(torch.tensor([[[0, 1, 2]]], dtype=torch.uint8))
    assert shown.shape == (1, 1, 3, 3) and shown[0, 0, 1].tolist() == [1, 2, 3]
    palette = mask(25).palette
    assert len({tuple(color) for color in palette.tolist()}) == 25


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
def test_any_black_and_white_picture_is_a_mask_of_two_classes(mode, tmp_path):
    array = np.zeros(tiny.SIZE, np.uint8)
    array[2:5, 3:9] = 255
    Image.fromarray(array).convert(mode).save(tmp_path / "p.png")
    parsed = mask(2).parse(str(tmp_path / "p.png"))
    assert np.array_equal(parsed, array // 255)


def test_a_colour_picture_is_no_mask_of_many_classes(tmp_path):
    Image.new("RGB", (12, 8), (3, 200, 200)).save(tmp_path / "p.png")
    with pytest.raises(ConfigError, match=r"p\.png: mask palette: got shape \(8, 12, 3\)"):
        mask(5).parse(str(tmp_path / "p.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": None}, r"palette\.classes \(None\)"),
        ({"classes": 257}, r"palette\.classes \(257\)"),
        ({"classes": 5, "code_channels": 2}, r"palette\.code_channels \(2\).*at least 3"),
        ({"classes": 3, "colors": [[1, 2, 3]]}, r"palette\.colors: got 1, want 3"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        mask(**options)


def test_a_number_of_classes_that_differs_from_the_data_set_is_refused():
    with pytest.raises(ConfigError, match=r"palette\.classes \(7\) differs from the data set's 5"):
        MaskModality.resolve("palette", MaskOptions(type="mask", classes=7), tiny.COLUMNS)


def test_a_row_and_a_given_file_of_other_proportions_show_the_same_middle_part(tmp_path):
    array = np.random.default_rng(0).integers(0, 5, (tiny.SIZE[0] * 3, tiny.SIZE[1]), dtype=np.uint8)
    file = tmp_path / "tall.png"
    Image.fromarray(array).save(file)
    assert np.array_equal(read(mask(), array), array[tiny.SIZE[0] : 2 * tiny.SIZE[0]])
    assert np.array_equal(read(mask(), array), mask().parse(str(file)))


def test_void_pixels_have_no_vote_and_a_cell_of_them_alone_is_void():
    array = np.zeros((tiny.SIZE[0] * 4, tiny.SIZE[1] * 4), np.uint8)
    array[:4, :4] = 255
    array[4:8, :4] = [[255, 255, 255, 3]] * 4
    fitted = read(mask(void=255), array)
    assert fitted[0, 0] == 255 and fitted[1, 0] == 3 and (fitted.ravel()[2:] != 255).all()
    with pytest.raises(ValueError, match="classes up to 255"):
        read(mask(), array)


def test_void_cells_have_an_empty_code_no_loss_and_no_say_in_the_figures():
    modality = mask(void=255)
    data = torch.randint(0, 5, (2, *tiny.SIZE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    void = torch.zeros_like(data, dtype=torch.bool)
    void[0, :3] = True
    marked = torch.where(void, 255, data).to(torch.uint8)
    assert torch.equal(modality.void(marked), void) and mask().void(data) is None
    codes = modality.encode(marked)
    assert (codes.abs().sum(1)[void] == 0).all() and torch.equal(codes[1], modality.encode(data)[1])
    logits = torch.randn(2, 5, *tiny.SIZE, generator=torch.Generator().manual_seed(1))
    cells = torch.nn.functional.cross_entropy(logits, data.long(), reduction="none")
    assert torch.allclose(modality.negative_log_likelihood(logits, marked), (cells * ~void).sum((1, 2)))
    found = modality.metrics(data, marked)["cell_accuracy"]
    assert found.sum == found.count == int((~void).sum())
    assert (modality.picture(marked)[void.numpy()] == (255, 0, 255)).all()
