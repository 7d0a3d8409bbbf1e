"""The U-Net's own claims."""

import pytest
import torch

from mmdiff_ray.config import ConfigError
from mmdiff_ray.models.cost import describe
from mmdiff_ray.models.unet import PRESETS, UNet, coordinates

MILLIONS = {"nano": 0.3, "tiny": 1.2, "small": 7.4, "base": 46.1, "large": 134.2}


def test_coordinates_run_from_corner_to_corner():
    place = coordinates(torch.zeros(3, 4, 5, 9))
    assert place.shape == (1, 2, 5, 9)
    assert place[0, :, 0, 0].tolist() == [-1, -1]
    assert place[0, :, 0, -1].tolist() == [1, -1]
    assert place[0, :, -1, 4].tolist() == [0, 1]


def test_cells_of_a_constant_input_can_be_told_apart():
    torch.manual_seed(0)
    backbone = UNet(3, (16, 16), "nano")
    x = torch.ones(1, 3, 16, 16)
    map_ = backbone(x, torch.zeros(1, backbone.embedding_channels)).map
    inner = map_[0, :, 4:12:4, 4:12:4].flatten(1)  # a stride apart and off the padded border: else all alike
    assert torch.cdist(inner.T, inner.T).add(torch.eye(4)).min() > 1e-2


def test_every_cell_of_the_map_sees_the_whole_input():
    torch.manual_seed(0)
    backbone = UNet(3, (16, 16), "nano")
    with torch.no_grad():
        for weight in backbone.parameters():
            weight += 0.05 * torch.randn_like(weight)
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    features = backbone(x, torch.zeros(1, backbone.embedding_channels))
    (gradient,) = torch.autograd.grad(features.map[0, :, 0, 0].sum(), x)
    assert (gradient[0].abs().sum(0) > 0).all()


def test_pooled_features_are_the_means_of_the_lowest_and_the_full_resolution():
    torch.manual_seed(0)
    backbone = UNet(3, (16, 16), "nano")
    features = backbone(torch.randn(2, 3, 16, 16), torch.zeros(2, backbone.embedding_channels))
    assert torch.equal(features.pooled[:, -backbone.feature_channels :], features.map.mean((2, 3)))
    assert features.pooled.shape[1] == backbone.feature_channels + backbone.options.channels[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": [1, 2]}, r"blocks \(\[1, 2\]\) must have one number"),
        ({"blocks": [1, 0, 1]}, "at least 1"),
        ({"attention": [3]}, "no level 3; there are the levels 0 to 2"),
        (
            {"multipliers": [1, 2, 2, 2, 2, 2], "blocks": [1] * 6},
            r"must be multiples of the backbone's stride \(32\)",
        ),
    ],
)
def test_contradicting_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        UNet(3, (16, 16), "nano", **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_documented_number_of_parameters(preset):
    with torch.device("meta"):
        backbone = UNet(8, (64, 64), preset)
    parameters = describe(backbone, (8, 64, 64), (backbone.embedding_channels,)).parameters
    assert round(parameters / 1e6, 1) == MILLIONS[preset]
