"""Start from another model's weights: those whose names and shapes match."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmdiff_ray.models.denoiser import Denoiser


class Match(NamedTuple):
    """Parameters of a model that another has with the same name and shape, and those that it has not."""

    same: list[str]
    new: list[str]

    def __str__(self) -> str:
        named = f"; new: {', '.join(self.new[:5])}{', ...' if len(self.new) > 5 else ''}" if self.new else ""
        return f"{len(self.same)} of {len(self.same) + len(self.new)} tensors{named}"


def match(denoiser: Denoiser, shapes: Mapping[str, tuple[int, ...]]) -> Match:
    """Compare a model's parameters with another's. shapes: name -> shape of the other's tensors."""
    found = Match([], [])
    for name, parameter in denoiser.named_parameters():
        (found.same if shapes.get(name) == tuple(parameter.shape) else found.new).append(name)
    return found


@torch.no_grad()
def load_matching(denoiser: Denoiser, tensors: Mapping[str, Tensor]) -> Match:
    """Copy what matches into a model; the rest keeps its random start, and codes keep their scales."""
    found = match(denoiser, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    parameters = dict(denoiser.named_parameters())
    for name in found.same:
        parameters[name].copy_(tensors[name])
    return found
