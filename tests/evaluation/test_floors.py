"""Trivial rules against brute-force searches and closed forms."""

import numpy as np
import pytest

from mmdiff_ray.evaluation import floors


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


FILLS = [floors.mean_visible_colour, floors.nearest_visible_pixel, floors.biharmonic]


def test_the_hole_gets_the_mean_of_each_images_visible_pixels() -> None:
    image = np.array([[[10, 20, 200]], [[0, 5, 200]], [[255, 255, 200]]], dtype=np.uint8)  # (3, 1, 3)
    filled = floors.mean_visible_colour(np.stack([image, image]), np.array([[[1, 1, 0]], [[0, 1, 0]]]))
    assert filled[:, :, 0, 2].tolist() == [[15, 2, 255], [20, 5, 255]]  # 2.5 rounds to even


def test_the_nearest_visible_pixel_is_the_one_that_a_search_finds() -> None:
    images, visible = random_images(3, 3, 7, 9), random_images(3, 7, 9, seed=1) > 180
    filled = floors.nearest_visible_pixel(images, visible)
    for image, shown, answer in zip(images, visible, filled, strict=True):
        seen = np.argwhere(shown)
        for y, x in np.ndindex(7, 9):
            distances = ((seen - (y, x)) ** 2).sum(axis=1)
            nearest = seen[distances == distances.min()]
            assert any(np.array_equal(answer[:, y, x], image[:, v, u]) for v, u in nearest)


@pytest.mark.parametrize("fill", FILLS)
def test_visible_pixels_stay_and_an_image_without_any_becomes_mid_grey(fill) -> None:
    images, visible = random_images(3, 3, 6, 6), random_images(3, 6, 6, seed=1) > 128
    visible[2] = False
    before = images.copy()
    filled = fill(images, visible)
    assert filled.dtype == np.uint8 and (filled[2] == 128).all()
    assert np.array_equal(np.moveaxis(filled, 1, -1)[visible], np.moveaxis(before, 1, -1)[visible])
    assert np.array_equal(images, before)


def test_a_colour_gradient_continues_smoothly_through_a_hole() -> None:
    """A plane of colour is biharmonic: the fill gives it back, where the nearest pixel does not."""
    y, x = np.mgrid[0:16, 0:16]
    image = np.stack([10 * x + 40, 8 * y + 60, 5 * x + 5 * y + 30]).astype(np.uint8)[None]
    visible = np.ones((1, 16, 16), dtype=bool)
    visible[:, 5:11, 5:11] = False
    holed = np.where(visible, image, 0).astype(np.uint8)
    assert np.array_equal(floors.biharmonic(holed, visible), image)
    assert not np.array_equal(floors.nearest_visible_pixel(holed, visible), image)


def test_a_smooth_fill_is_clipped_to_the_range_of_colours() -> None:
    """Beyond an edge the smooth surface rises above white: it is clipped there, and does not wrap around."""
    image = np.zeros((1, 3, 12, 12), dtype=np.uint8)
    image[:, :, :, 2:4] = 255
    visible = np.ones((1, 12, 12), dtype=bool)
    visible[:, :, 4:] = False
    filled = floors.biharmonic(image, visible)[0]
    assert (filled[:, :, 4] == 255).all() and (np.diff(filled[0, 6, 4:].astype(int)) <= 0).all()


def test_threshold_finds_a_ring_and_fills_it() -> None:
    image = np.full((1, 3, 7, 7), 255, dtype=np.uint8)
    image[:, 1:, 1:6, 1:6] = 0
    image[:, :, 2:5, 2:5] = 255
    truth = np.zeros((1, 7, 7), dtype=bool)
    truth[:, 1:6, 1:6] = True
    assert np.array_equal(floors.threshold_fill(image), truth)


@pytest.mark.parametrize(("level", "foreground"), [(152, True), (153, False)])
def test_the_threshold_is_six_tenths_of_white(level: int, foreground: bool) -> None:
    assert floors.threshold_fill(np.full((1, 3, 1, 1), level, dtype=np.uint8)).item() is foreground


def test_every_pixel_gets_the_palette_colour_that_a_search_finds() -> None:
    images = random_images(2, 3, 8, 8)
    colours = [None, (255, 0, 0), (0, 128, 0), None, (20, 30, 250), (250, 250, 250)]
    classes = floors.nearest_palette_colour(images, colours)
    assert classes.shape == (2, 8, 8) and classes.dtype == np.uint8
    for b, y, x in np.ndindex(2, 8, 8):
        pixel = images[b, :, y, x].astype(int)
        distances = {k: int(((pixel - colour) ** 2).sum()) for k, colour in enumerate(colours) if colour}
        assert distances[int(classes[b, y, x])] == min(distances.values())


def test_the_majority_class_is_the_most_frequent() -> None:
    assert floors.majority_class([3, 9, 0, 9]) == 1


def test_labels_are_voted_for_by_the_nearest_rows_and_a_tie_goes_to_the_nearest():
    known = np.array([[1, 0], [0.9, 0.1], [0.8, 0.3], [0, 1], [0.1, 2], [-1, 0]], np.float32)
    labels = np.array([7, 2, 2, 5, 5, 5])
    queries = np.array([[2, 0], [0, 0.1]], np.float32)
    assert floors.nearest_labels(queries, known, labels, k=3).tolist() == [2, 5]
    assert floors.nearest_labels(queries, known, labels, k=2).tolist() == [7, 5]


def test_no_unit_vector_is_nearer_to_all_embeddings_than_their_mean() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(50, 6)) + np.array([1.0, 0, 0, 0, 0, 0])
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    others = rng.normal(size=(2000, 6))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    mean = floors.mean_embedding(embeddings)
    assert np.linalg.norm(mean) == pytest.approx(1, abs=1e-6)
    assert (embeddings @ mean).mean() > (embeddings @ others.T).mean(axis=0).max()
    with pytest.raises(ValueError, match="no direction"):
        floors.mean_embedding(np.array([[1.0, 0], [-1.0, 0]]))


def test_unlike_border_finds_a_disc_over_a_gradient_and_fills_its_hole():
    y, x = np.mgrid[:32, :32]
    background = np.stack([4 * x + 40, 3 * y + 60, 100 + 0 * x]).astype(np.uint8)
    ring = ((y - 16) ** 2 + (x - 16) ** 2 <= 81) & ((y - 16) ** 2 + (x - 16) ** 2 > 9)
    image = np.where(ring, np.array([250, 10, 10], np.uint8)[:, None, None], background)
    disc = (y - 16) ** 2 + (x - 16) ** 2 <= 81
    assert np.array_equal(floors.unlike_border(image[None])[0], disc)
