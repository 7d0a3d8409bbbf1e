"""Costs, against counts by hand."""

import torch
from torch import nn

from mmdiff_ray.models.cost import describe
from mmdiff_ray.models.dit import DiT
from mmdiff_ray.models.layers import Attention


def test_a_convolution_costs_two_operations_per_weight_and_cell():
    cost = describe(nn.Conv2d(3, 8, 3, padding=1), (3, 16, 12))
    assert cost.parameters == 3 * 8 * 9 + 8
    assert cost.flops == 2 * 3 * 8 * 9 * 16 * 12


def test_attention_costs_its_four_matrices_and_two_products():
    tokens, channels = 10, 16
    flops = describe(Attention(channels, 8), (tokens, channels)).flops
    assert flops == 2 * 4 * tokens * channels**2 + 2 * 2 * tokens**2 * channels


def test_a_large_network_is_counted_on_the_meta_device():
    with torch.device("meta"):
        backbone = DiT(8, (64, 64), "large")
    cost = describe(backbone, (8, 64, 64), (backbone.embedding_channels,))
    assert cost.parameters > 4e8
    in_blocks = 2 * 24 * 12 * 1024**2 * 32**2 + 24 * 4 * 32**4 * 1024
    assert in_blocks < cost.flops < 1.02 * in_blocks


def test_counting_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    backbone = DiT(3, (8, 8), "nano")
    before = [weight.clone() for weight in backbone.parameters()]
    describe(backbone, (3, 8, 8), (backbone.embedding_channels,))
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True))
    assert (
        backbone(torch.randn(1, 3, 8, 8), torch.randn(1, backbone.embedding_channels)).map.device.type
        == "cpu"
    )
