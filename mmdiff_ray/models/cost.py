"""What a network costs, counted without computing anything."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mmdiff_ray.models.context import total_shape


class Cost(NamedTuple):
    """parameters: how many there are; flops: floating point operations of one sample's forward pass.

    A multiplication and an addition count as two; a training step costs about three times the forward pass.
    """

    parameters: int
    flops: int


def describe(module: nn.Module, *sizes: tuple[int, ...]) -> Cost:
    """Return the cost of a module called on inputs of these sizes (without the batch), like (C, H, W), (E,).

    Works on any device, the meta device included, and allocates no activations.
    """
    weights = {
        name: weight.to("meta") for name, weight in (*module.named_parameters(), *module.named_buffers())
    }
    inputs = tuple(torch.empty(1, *size, device="meta") for size in sizes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(module, weights, inputs)
    return Cost(sum(weight.numel() for weight in module.parameters()), counter.get_total_flops())


def forward_flops(denoiser: Any) -> int:
    """Return the floating-point operations of one sample's pass through a denoiser's backbone."""
    backbone, channels = denoiser.backbone, denoiser.input_channels
    tokens = [total_shape(denoiser.contexts)] if denoiser.contexts else []
    return describe(backbone, (channels, *denoiser.size), (backbone.embedding_channels,), *tokens).flops
