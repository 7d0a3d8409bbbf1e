import numpy as np
import pytest

from mmdiff_ray.evaluation import floors


def an_image(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


FILLS = [floors.mean_visible_colour, floors.nearest_visible_pixel, floors.biharmonic]


def test_the_hole_gets_the_mean_of_what_is_visible() -> None:
    image = np.array([[[10, 20, 200]], [[0, 5, 200]], [[255, 255, 200]]], dtype=np.uint8)  # (3, 1, 3)
    filled = floors.mean_visible_colour(image, np.array([[1, 1, 0]]))
    assert filled[:, 0, 2].tolist() == [15, 2, 255]  # 2.5 rounds to even
    assert np.array_equal(filled[:, :, :2], image[:, :, :2])
    assert filled.dtype == np.uint8


def test_the_mean_is_taken_image_by_image() -> None:
    images, visible = an_image(2, 4, 3, 5, 6), an_image(2, 4, 5, 6, seed=1) > 100
    filled = floors.mean_visible_colour(images, visible)
    for index in np.ndindex(2, 4):
        assert np.array_equal(filled[index], floors.mean_visible_colour(images[index], visible[index]))


def test_the_nearest_visible_pixel_is_the_one_that_a_search_finds() -> None:
    images, visible = an_image(3, 3, 7, 9), an_image(3, 7, 9, seed=1) > 180
    filled = floors.nearest_visible_pixel(images, visible)
    for image, shown, answer in zip(images, visible, filled, strict=True):
        seen = np.argwhere(shown)
        for y, x in np.ndindex(7, 9):
            distances = ((seen - (y, x)) ** 2).sum(axis=1)
            nearest = seen[distances == distances.min()]
            assert any(np.array_equal(answer[:, y, x], image[:, v, u]) for v, u in nearest)


@pytest.mark.parametrize("fill", FILLS)
def test_where_nothing_is_visible_all_is_mid_grey(fill) -> None:
    hidden = np.zeros((4, 4), dtype=np.uint8)
    assert (fill(an_image(3, 4, 4), hidden) == 128).all()
    assert (fill(an_image(3, 4, 4) / 255.0, hidden) == 0).all()


@pytest.mark.parametrize("fill", FILLS)
def test_what_is_visible_stays_and_the_image_given_is_not_touched(fill) -> None:
    image, visible = an_image(2, 3, 6, 6), an_image(2, 6, 6, seed=1) > 128
    before = image.copy()
    filled = fill(image, visible)
    assert np.array_equal(np.moveaxis(filled, 1, -1)[visible], np.moveaxis(before, 1, -1)[visible])
    assert np.array_equal(image, before)


@pytest.mark.parametrize("kind", [np.uint8, np.float64])
def test_a_gradient_of_colour_goes_on_smoothly_through_a_hole(kind: type) -> None:
    """A plane of colour is biharmonic: the fill gives it back, where the nearest pixel does not."""
    y, x = np.mgrid[0:16, 0:16]
    plane = np.stack([10 * x + 40, 8 * y + 60, 5 * x + 5 * y + 30])
    image = plane.astype(np.uint8) if kind == np.uint8 else plane / 127.5 - 1
    visible = np.ones((16, 16), dtype=bool)
    visible[5:11, 5:11] = False
    holed = np.where(visible, image, 0).astype(image.dtype)
    filled = floors.biharmonic(holed, visible)
    assert filled.dtype == image.dtype
    assert filled == pytest.approx(image, abs=1e-6)
    assert abs(floors.nearest_visible_pixel(holed, visible).astype(float) - image).max() > 0.1


def test_a_smooth_fill_stays_in_the_range_of_colours() -> None:
    """Beyond an edge the smooth surface rises above white: it is cut there, and does not wrap around."""
    image = np.zeros((3, 12, 12), dtype=np.uint8)
    image[:, :, 2:4] = 255
    visible = np.ones((12, 12), dtype=bool)
    visible[:, 4:] = False
    filled = floors.biharmonic(image, visible)
    assert (filled[:, :, 4] == 255).all() and (np.diff(filled[0, 6, 4:].astype(int)) <= 0).all()


def a_ring() -> np.ndarray:
    """Return a white picture with a red ring, uint8 (3, 7, 7), that encloses 9 white pixels."""
    image = np.full((3, 7, 7), 255, dtype=np.uint8)
    image[1:, 1:6, 1:6] = 0
    image[:, 2:5, 2:5] = 255
    return image


def test_threshold_finds_the_ring_and_fills_it() -> None:
    truth = np.zeros((7, 7), dtype=bool)
    truth[1:6, 1:6] = True
    assert np.array_equal(floors.threshold_fill(a_ring()), truth)


def test_bytes_and_unit_floats_have_the_same_foreground() -> None:
    images = an_image(2, 3, 8, 8)
    assert np.array_equal(floors.threshold_fill(images), floors.threshold_fill(images / 255.0))


@pytest.mark.parametrize(("level", "foreground"), [(152, True), (153, False)])
def test_the_threshold_is_six_tenths_of_white(level: int, foreground: bool) -> None:
    assert floors.threshold_fill(np.full((3, 1, 1), level, dtype=np.uint8)).item() is foreground


def test_floats_outside_the_unit_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]; got -1 to 1"):
        floors.threshold_fill(np.array([-1.0, 0, 1]).reshape(3, 1, 1))


def test_every_pixel_gets_the_palette_colour_that_a_search_finds() -> None:
    image = an_image(2, 3, 8, 8)
    colours = [None, (255, 0, 0), (0, 128, 0), None, (20, 30, 250), (250, 250, 250)]
    answer = floors.nearest_palette_colour(image, colours)
    assert answer.shape == (2, 8, 8) and answer.dtype == np.uint8
    for b, y, x in np.ndindex(2, 8, 8):
        pixel = image[b, :, y, x].astype(int)
        distances = {k: int(((pixel - colour) ** 2).sum()) for k, colour in enumerate(colours) if colour}
        assert distances[int(answer[b, y, x])] == min(distances.values())


def test_outside_the_foreground_all_is_class_zero() -> None:
    image = a_ring()
    answer = floors.nearest_palette_colour(
        image, [None, (255, 0, 0), (255, 255, 255)], floors.threshold_fill(image)
    )
    truth = np.zeros((7, 7), dtype=np.uint8)
    truth[1:6, 1:6] = 1
    truth[2:5, 2:5] = 2
    assert np.array_equal(answer, truth)


def test_the_majority_class_is_the_most_frequent() -> None:
    assert floors.majority_class([3, 9, 0, 9]) == 1


def test_no_unit_vector_is_nearer_to_all_embeddings_than_their_mean() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(50, 6)) + np.array([1.0, 0, 0, 0, 0, 0])
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    others = rng.normal(size=(2000, 6))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    mean = floors.mean_embedding(embeddings)
    assert np.linalg.norm(mean) == pytest.approx(1, abs=1e-6)
    assert (embeddings @ mean).mean() > (embeddings @ others.T).mean(axis=0).max()


def test_embeddings_that_cancel_out_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no direction"):
        floors.mean_embedding(np.array([[1.0, 0], [-1.0, 0]]))


def test_unlike_border_finds_a_disc_over_a_gradient_and_fills_its_hole():
    y, x = np.mgrid[:32, :32]
    background = np.stack([4 * x + 40, 3 * y + 60, 100 + 0 * x]).astype(np.uint8)
    ring = ((y - 16) ** 2 + (x - 16) ** 2 <= 81) & ((y - 16) ** 2 + (x - 16) ** 2 > 9)
    image = np.where(ring, np.array([250, 10, 10], np.uint8)[:, None, None], background)
    disc = (y - 16) ** 2 + (x - 16) ** 2 <= 81
    assert np.array_equal(floors.unlike_border(image[None])[0], disc)
