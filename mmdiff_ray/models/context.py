"""The tokens that a backbone attends to: those of given instances that have any, as texts do."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmdiff_ray.config import ConfigError
from mmdiff_ray.diffusion.process import GIVEN, Roles
from mmdiff_ray.modalities.base import Modality

Shapes = Mapping[str, tuple[int, int]]
"""instance -> the number of its tokens and their channels."""


def context_shapes(modalities: Mapping[str, Modality]) -> dict[str, tuple[int, int]]:
    """Return the shapes of the instances that have tokens. Raises ConfigError for different channels."""
    shapes = {name: one.context_shape for name, one in modalities.items() if one.context_shape}
    if len({channels for _, channels in shapes.values()}) > 1:
        found = ", ".join(f"{name} {channels}" for name, (_, channels) in shapes.items())
        raise ConfigError(
            f"modalities.*.context_channels: one attention reads all tokens, so all must be equal (or 0); "
            f"got {found}"
        )
    return shapes


def total_shape(shapes: Shapes) -> tuple[int, int]:
    """Return the number of all tokens and their channels."""
    counts, channels = zip(*shapes.values(), strict=True)
    return sum(counts), channels[0]


def context_of(tokens: Mapping[str, Tensor], roles: Roles, shapes: Shapes) -> Tensor:
    """Return all tokens, (B, N, D): zeros for an instance that is not given.

    tokens: of the given instances at least, instance -> (B, n, D).
    """
    parts = []
    for name, shape in shapes.items():
        given = roles[name] == GIVEN
        absent = torch.zeros(len(given), *shape, device=given.device)
        parts.append(tokens[name] * given[:, None, None] if name in tokens else absent)
    return torch.cat(parts, dim=1)
