"""Images: drawing over backgrounds, resizing, and the discretised Gaussian."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.image import ImageModality, ImageOptions, draw, resized
from tests.modalities import tiny

SIZE = tiny.SIZE


@pytest.fixture
def image() -> ImageModality:
    return ImageModality("pixels", ImageOptions(type="image"), SIZE)


def context(visit: int = 0, **changes) -> RowContext:
    return RowContext(SIZE, seed=0, visit=visit, row_id=7, **changes)


def picture(alpha: int | np.ndarray, color: tuple[int, int, int] = (200, 100, 50)) -> Image.Image:
    array = np.empty((*SIZE, 4), np.uint8)
    array[..., :3] = color
    array[..., 3] = alpha
    return Image.fromarray(array)


def test_opaque_pixels_are_exact_and_transparent_ones_show_the_background():
    alpha = np.zeros(SIZE, np.uint8)
    alpha[:, :6] = 255
    for backgrounds in ("white", "random"):
        drawn = draw(resized(picture(alpha), SIZE), context(backgrounds=backgrounds, flip=False), "pixels")
        assert (drawn[:, :, :6] == np.array([200, 100, 50])[:, None, None]).all()
    assert (
        draw(resized(picture(alpha), SIZE), context(backgrounds="white", flip=False), "pixels")[:, :, 6:]
        == 255
    ).all()


@pytest.mark.parametrize("alpha", [0, 1, 64, 128, 200, 254])
def test_alpha_mixes_colour_and_background_within_rounding(alpha):
    drawn = draw(resized(picture(alpha), SIZE), context(backgrounds="white", flip=False), "pixels").astype(
        float
    )
    expected = np.array([200, 100, 50]) * alpha / 255 + 255 * (1 - alpha / 255)
    assert np.abs(drawn - expected[:, None, None]).max() <= 1.0


def test_colours_of_transparent_pixels_do_not_bleed_when_shrinking():
    array = np.zeros((SIZE[0] * 4, SIZE[1] * 4, 4), np.uint8)
    array[:, ::2] = (0, 0, 255, 255)
    array[:, 1::2] = (255, 0, 0, 0)
    drawn = draw(resized(Image.fromarray(array), SIZE), context(backgrounds="white", flip=False), "pixels")
    expected = np.array([127.5, 127.5, 255])[:, None, None]  # half blue, half white, and no red of its own
    assert np.abs(drawn.astype(float) - expected).max() <= 1.0


def test_another_visit_draws_another_background_and_the_same_visit_the_same():
    clear = picture(0)
    first = draw(resized(clear, SIZE), context(visit=1), "pixels")
    assert np.array_equal(first, draw(resized(clear, SIZE), context(visit=1), "pixels"))
    assert not np.array_equal(first, draw(resized(clear, SIZE), context(visit=2), "pixels"))
    assert not np.array_equal(first, draw(resized(clear, SIZE), context(visit=1), "other"))


def test_an_opaque_image_of_the_right_size_is_read_unchanged(image):
    array = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    read = image.read({"pixels": tiny.png(array)}, context(flip=False), {})
    assert np.array_equal(read, array.transpose(2, 0, 1))


def test_shrinking_averages_the_pixels_of_a_cell(image):
    array = np.random.default_rng(0).integers(0, 256, (SIZE[0] * 4, SIZE[1] * 4, 3), dtype=np.uint8)
    read = image.read({"pixels": tiny.png(array)}, context(flip=False), {})
    mean = array.reshape(SIZE[0], 4, SIZE[1], 4, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(read - mean).max() <= 1.0


def test_small_images_are_enlarged(image):
    array = np.full((3, 4, 3), 77, np.uint8)
    assert (image.read({"pixels": tiny.png(array)}, context(flip=False), {}) == 77).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_any_picture_mode_becomes_rgb(image, mode, tmp_path):
    source = Image.new("RGB", SIZE[::-1], (255, 255, 255))
    (source.convert("L").convert(mode) if mode == "I;16" else source.convert(mode)).save(tmp_path / "p.tiff")
    assert image.parse(str(tmp_path / "p.tiff")).shape == (3, *SIZE)


def test_half_of_the_visits_are_mirrored_and_none_without_flip():
    mirrored = [context(visit=visit).mirrored for visit in range(400)]
    assert 160 < sum(mirrored) < 240
    assert not any(context(visit=visit, flip=False).mirrored for visit in range(50))


def test_a_parsed_picture_is_neither_mirrored_nor_random(image, tmp_path):
    alpha = np.zeros(SIZE, np.uint8)
    alpha[:, :3] = 255
    picture(alpha).save(tmp_path / "p.png")
    parsed = image.parse(str(tmp_path / "p.png"))
    assert (parsed[:, :, :3] == np.array([200, 100, 50])[:, None, None]).all()
    assert (parsed[:, :, 3:] == 255).all()


def test_a_truncated_file_is_an_error(image):
    whole = tiny.png(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    with pytest.raises(OSError):
        image.read({"pixels": whole[: len(whole) // 2]}, context(), {})


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.02, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.2, 0.5, 1.0, 30.0])
def test_discretised_gaussian_sums_to_one_over_the_256_levels(image, sigma, mean):
    """sigma, mean: in pixels of [-1, 1]; from far below the step of 2/255 to far above the range."""
    image.code_mean.fill_(0.1)
    image.code_scale.fill_(0.4)
    levels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 3, 1, 1)
    code = torch.full((256, 3, 1, 1), (mean - 0.1) / 0.4)
    nats = image.code_negative_log_likelihood(code, torch.tensor(sigma / 0.4), levels)
    total = (-nats.double() / 3).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=2e-4 * max(1.0, sigma))


def test_discretised_gaussian_agrees_with_the_exact_one_in_double_precision(image):
    levels = torch.arange(256)
    sigma, mean = 0.05, 0.3
    edges = (levels.double() + 0.5) / 127.5 - 1
    edges[-1] = math.inf
    low = torch.cat([torch.tensor([-math.inf]).double(), edges[:-1]])
    normal = torch.distributions.Normal(torch.tensor(mean).double(), sigma)
    exact = -(normal.cdf(edges) - normal.cdf(low)).log()
    data = levels.to(torch.uint8)[:, None, None, None].expand(256, 3, 1, 1)
    ours = image.code_negative_log_likelihood(
        torch.full((256, 3, 1, 1), mean / 0.5), torch.tensor(sigma / 0.5), data
    )
    near = exact < 25  # beyond, the difference of two numbers near 1 has no digits left
    torch.testing.assert_close(ours[near].double() / 3, exact[near], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", [1e-6, 1e-4, 1e-2, 1.0, 100.0])
def test_likelihood_and_its_gradient_are_finite_in_the_far_tails(image, sigma):
    levels = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)[:, None, None, None].expand(5, 3, 1, 1)
    for mean in (-50.0, -1.0, 0.0, 0.99, 1.0, 50.0):
        code = torch.full((5, 3, 1, 1), mean / 0.5, requires_grad=True)
        nats = image.code_negative_log_likelihood(code, torch.tensor(sigma / 0.5), levels)
        nats.sum().backward()
        assert bool(nats.isfinite().all()) and bool((nats >= 0).all())
        assert bool(code.grad.isfinite().all())


@pytest.mark.parametrize("distance", [3.0, 30.0, 300.0, 3e4, 3e6])
def test_gradient_far_away_is_that_of_the_tail(image, distance):
    """d(-log p)/d mean at a level `distance` sigmas away is the normal's hazard rate at its nearer edge."""
    sigma, level = 1e-3, 128
    near = (level + 0.5) / 127.5 - 1
    code = torch.full((1, 3, 1, 1), (near + distance * sigma) / 0.5, requires_grad=True)
    data = torch.full((1, 3, 1, 1), level, dtype=torch.uint8)
    image.code_negative_log_likelihood(code, torch.tensor(sigma / 0.5), data).sum().backward()
    hazard = math.sqrt(2 / math.pi) / scipy.special.erfcx(distance / math.sqrt(2)) / sigma
    torch.testing.assert_close(code.grad / 0.5, torch.full_like(code, hazard), rtol=2e-3, atol=0)


def test_gradient_pulls_the_mean_towards_the_data(image):
    data = torch.full((1, 3, 1, 1), 200, dtype=torch.uint8)
    for start in (-40.0, 40.0):
        code = torch.full((1, 3, 1, 1), start, requires_grad=True)
        image.code_negative_log_likelihood(code, torch.tensor(0.1), data).sum().backward()
        assert bool((code.grad.sign() == (1.0 if start > 0 else -1.0)).all())


def test_a_standard_deviation_per_sample_is_taken(image):
    data = torch.full((2, 3, *SIZE), 128, dtype=torch.uint8)
    nats = image.code_negative_log_likelihood(
        image.encode(data), torch.tensor([0.01, 1.0]).reshape(2, 1, 1, 1), data
    )
    assert nats[0] < nats[1]


def test_sigma_that_is_not_above_zero_is_refused():
    with pytest.raises(ConfigError, match=r"modalities\.pixels\.sigma \(0\.0\)"):
        ImageModality("pixels", ImageOptions(type="image", sigma=0.0), SIZE)


def test_a_row_and_a_given_file_of_other_proportions_show_the_same_middle_part(image, tmp_path):
    """Training on squashed pictures and asking with cropped ones would be two distributions."""
    array = np.random.default_rng(0).integers(0, 256, (SIZE[0] * 2, SIZE[1] * 4, 3), dtype=np.uint8)
    file = tmp_path / "wide.png"
    Image.fromarray(array).save(file)
    read = image.read({"pixels": file.read_bytes()}, context(flip=False), {})
    assert np.array_equal(read, image.parse(str(file)))
    middle = array[:, SIZE[1] : 3 * SIZE[1]].reshape(SIZE[0], 2, SIZE[1], 2, 3).mean((1, 3))
    assert np.abs(read - middle.transpose(2, 0, 1)).max() <= 1.0
