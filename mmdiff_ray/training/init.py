"""Initialize a model from another one, copying parameters with equal name and shape."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmdiff_ray.models.denoiser import Denoiser


class Match(NamedTuple):
    """Names of a model's parameters. same: the other model has them in the same shape; new: it does not."""

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
    """Copy matching parameters into a model. All others keep their random values; code scales also stay."""
    found = match(denoiser, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    parameters = dict(denoiser.named_parameters())
    for name in found.same:
        parameters[name].copy_(tensors[name])
    return found
