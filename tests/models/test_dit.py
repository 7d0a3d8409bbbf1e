"""The diffusion transformer's own claims."""

import math

import pytest
import torch

from mmdiff_ray.config import ConfigError
from mmdiff_ray.models.cost import describe
from mmdiff_ray.models.dit import PRESETS, DiT, DiTTokens, positions

MILLIONS = {"nano": 0.3, "tiny": 1.8, "small": 32.4, "base": 129.1, "large": 456.0, "xlarge": 672.6}


def test_positions_are_sines_and_cosines_of_row_and_column():
    codes = positions((3, 5), 8, torch.device("cpu"))
    row, column = 2, 3
    expected = [
        *(math.sin(place * rate) for place in (row, column) for rate in (1, 0.01)),
        *(math.cos(place * rate) for place in (row, column) for rate in (1, 0.01)),
    ]
    assert codes[row * 5 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_no_two_positions_of_an_oblong_grid_are_alike():
    codes = positions((4, 24), 32, torch.device("cpu"))
    assert (torch.cdist(codes, codes) + torch.eye(len(codes))).min() > 0.1


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_patch_comes_back_where_it_was(patch):
    torch.manual_seed(0)
    backbone = DiT(3, (8, 16), "nano", patch=patch)  # untrained blocks are the identity: patches stay apart
    x, embedding = torch.randn(1, 3, 8, 16), torch.zeros(1, backbone.embedding_channels)
    changed = x.clone()
    changed[:, :, 4 : 4 + patch, 8 : 8 + patch] += 1
    moved = (backbone(x, embedding).map - backbone(changed, embedding).map).abs().sum((0, 1)) > 1e-6
    expected = torch.zeros(8, 16, dtype=torch.bool)
    expected[4 : 4 + patch, 8 : 8 + patch] = True
    assert torch.equal(moved, expected)


def test_a_width_that_positions_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"width \(66\) must be a multiple of 4"):
        DiT(3, (8, 8), "nano", width=66)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_documented_number_of_parameters(preset):
    with torch.device("meta"):
        backbone = DiT(8, (64, 64), preset)
    parameters = describe(backbone, (8, 64, 64), (backbone.embedding_channels,)).parameters
    assert round(parameters / 1e6, 1) == MILLIONS[preset]


def test_separate_modalities_have_patches_of_their_own_that_attend_to_each_other():
    torch.manual_seed(0)
    backbone = DiTTokens({"pixels": [0, 1, 2], "mask": [3, 4]}, (8, 8), "nano")
    x, embedding = torch.randn(2, 5, 8, 8), torch.randn(2, backbone.embedding_channels)
    changed = x.clone()
    changed[:, 3:] += 1

    def moved(name: str) -> bool:
        before, after = backbone(x, embedding)[name], backbone(changed, embedding)[name]
        return not torch.allclose(before.map, after.map, atol=1e-5)

    assert moved("mask") and not moved("pixels")  # untrained blocks are the identity: patches stay apart
    with torch.no_grad():
        for weight in backbone.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    assert moved("pixels")


def test_separate_modalities_cost_as_much_as_there_are_more_tokens():
    merged, apart = DiT(6, (16, 16), "nano"), DiTTokens({"a": [0, 1, 2], "b": [3, 4, 5]}, (16, 16), "nano")
    flops = [describe(backbone, (6, 16, 16), (64,)).flops for backbone in (merged, apart)]
    assert 2 < flops[1] / flops[0] < 3
