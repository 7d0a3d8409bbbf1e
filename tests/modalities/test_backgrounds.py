"""Backgrounds: in range, of all three kinds, and as varied as they should be."""

import numpy as np
import pytest

from mmdiff_ray.modalities.backgrounds import draw_background

SIZE = (9, 14)


def drawn(count: int) -> np.ndarray:
    return np.stack([draw_background(np.random.default_rng(seed), SIZE) for seed in range(count)])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (64, 64)])
def test_a_background_has_the_size_asked_for_and_colours_in_range(size):
    for seed in range(40):
        background = draw_background(np.random.default_rng(seed), size)
        assert background.shape == (*size, 3) and background.dtype == np.float32
        assert background.min() >= 0 and background.max() <= 1


def test_a_third_of_the_backgrounds_is_one_colour():
    flat = (np.ptp(drawn(600), axis=(1, 2)) < 1e-6).all(-1)
    assert 150 < flat.sum() < 250


def test_backgrounds_cover_all_colours():
    mean = drawn(400).mean((1, 2))
    assert (mean.min(0) < 0.1).all() and (mean.max(0) > 0.9).all()
    assert np.abs(mean.mean(0) - 0.5).max() < 0.06
