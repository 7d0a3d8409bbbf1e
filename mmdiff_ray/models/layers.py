"""Parts that the backbones share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError, options

Options = TypeVar("Options")


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to a context.

    head_channels: the fewest channels of one head. zero: whether the output starts as nothing, for a residual
    branch that no gate closes. Queries and keys have unit RMS per head (times one learned scale), so that
    logits stay bounded in bfloat16. Source: Dehghani et al., "Scaling Vision Transformers to 22 Billion
    Parameters", 2023.
    """

    def __init__(
        self, channels: int, head_channels: int, context_channels: int | None = None, zero: bool = True
    ) -> None:
        super().__init__()
        self.heads = _parts(channels, channels // head_channels)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(context_channels or channels, 2 * channels)
        self.scale = nn.Parameter(torch.ones(channels // self.heads))
        out = nn.Linear(channels, channels)
        self.out = zeroed(out) if zero else out

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return what x (B, N, C) reads from the context (B, M, D), by default from itself: (B, N, C)."""
        query = self._split(self.query(x))  # (B, heads, N, C / heads)
        key, value = map(self._split, self.key_value(x if context is None else context).chunk(2, dim=-1))
        query, key = _unit(query) * self.scale, _unit(key)
        read = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
        return self.out(read.transpose(1, 2).flatten(2))  # (B, N, C)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _unit(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def zeroed(layer: nn.Linear | nn.Conv2d) -> Any:
    """Return the layer with zero weights and bias: the last of a residual branch, which starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Return a group norm with as many groups of at least 4 channels as there are, at most 32."""
    return nn.GroupNorm(_parts(channels, min(32, channels // 4)), channels, affine=affine)


def _parts(channels: int, most: int) -> int:
    """Return the largest number of equal parts, at most `most`, that channels can be cut into."""
    return next((parts for parts in range(most, 0, -1) if channels % parts == 0), 1)


def choose(presets: Mapping[str, Options], preset: str, values: Mapping[str, Any]) -> Options:
    """Return a preset with single sizes replaced.

    Raises ConfigError for an unknown preset or size, or a wrong type.
    """
    if preset not in presets:
        raise ConfigError(f"model.preset: unknown {preset!r}; known: {', '.join(presets)}")
    chosen: Any = presets[preset]
    return options(type(chosen), {**dataclasses.asdict(chosen), **values}, "model.options")


def check_size(size: Sequence[int], stride: int) -> None:
    """Raise ConfigError, a ValueError, for a height or width that is no multiple of the stride."""
    height, width = size
    if height % stride or width % stride or not height or not width:
        raise ConfigError(
            f"height x width ({height} x {width}) must be multiples of the backbone's stride ({stride}); "
            "change space.height and space.width, or model.options"
        )


def check_tokens(tokens: Tensor | None, token_channels: int | None) -> None:
    """Raise ValueError where tokens (B, N, D) and the backbone's `token_channels` disagree."""
    got = None if tokens is None else tokens.shape[-1]
    if got != token_channels:
        raise ValueError(f"tokens have {got} channels, but model.options.token_channels is {token_channels}")
