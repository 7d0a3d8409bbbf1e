"""What modality types share: class codes and the randomness of rows."""

import itertools

import numpy as np
import pytest
import torch

from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.base import RowContext, class_codes


@pytest.mark.parametrize("classes", [2, 3, 4, 10, 24, 25, 256, 1000, 4096, 8192])
def test_class_codes_are_different_and_of_plus_and_minus_one(classes):
    codes = class_codes(classes)
    assert codes.shape == (classes, max(1, int(np.ceil(np.log2(classes)))))
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    assert len(torch.unique(codes, dim=0)) == classes


@pytest.mark.parametrize("channels", [13, 16, 40])
def test_class_codes_in_many_channels_are_different_and_far_apart(channels):
    codes = class_codes(50, channels)
    distance = (codes[:, None] != codes[None]).sum(-1) + 999 * torch.eye(50)
    assert codes.shape == (50, channels) and distance.min() >= channels // 4


def test_two_classes_are_opposite_in_any_number_of_channels():
    for channels in (1, 2, 7, 20):
        first, second = class_codes(2, channels)
        assert torch.equal(first, -second)


@pytest.mark.parametrize(("classes", "channels", "least"), [(8, 4, 2), (16, 8, 4), (2, 5, 5)])
def test_more_channels_are_used_for_distance(classes, channels, least):
    """The least distances are those of the best codes of these sizes (even weight, extended Hamming)."""
    codes = class_codes(classes, channels)
    pairs = itertools.combinations(codes, 2)
    assert min(int((first != second).sum()) for first, second in pairs) >= least


def test_too_few_channels_are_refused_with_the_least():
    with pytest.raises(ConfigError, match=r"modalities\.x\.code_channels \(4\) cannot tell 17 .* at least 5"):
        class_codes(17, 4, "modalities.x.code_channels")
    with pytest.raises(ConfigError, match="at least 1"):
        class_codes(2, 0)


def test_a_rows_randomness_depends_on_seed_visit_row_and_purpose_alone():
    base = {"size": (4, 4), "seed": 1, "visit": 2, "row_id": 3}
    first = RowContext(**base).generator("hole").random(4)
    assert np.array_equal(
        first, RowContext(**{**base, "size": (8, 8), "flip": False}).generator("hole").random(4)
    )
    for change in ({"seed": 2}, {"visit": 3}, {"row_id": 4}, {"row_id": 3 + 2**32}, {"row_id": -3}):
        assert not np.array_equal(first, RowContext(**{**base, **change}).generator("hole").random(4))
    assert not np.array_equal(first, RowContext(**base).generator("mirror").random(4))
