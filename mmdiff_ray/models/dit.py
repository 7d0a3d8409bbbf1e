"""The diffusion transformer: a sequence of patches, blocks modulated by the embedding.

`dit` merges all channels of a patch into one vector; `dit_tokens` gives every modality patches of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.base import Features
from mmdiff_ray.models.layers import Attention, check_size, check_tokens, choose, zeroed
from mmdiff_ray.registry import register


@dataclass(frozen=True)
class DiTOptions:
    """The sizes of a diffusion transformer.

    width: channels of a patch's vector, so also of the pooled features. depth: blocks. head_channels: the
    fewest channels of one attention head. patch: cells along one side of a patch. mlp_ratio: hidden channels
    of a block's perceptron, in widths. feature_channels: of the feature map. embedding_channels: of the
    embedding of time and roles. token_channels: where set, every block also attends to tokens of so many
    channels.
    """

    width: int
    depth: int
    head_channels: int = 64
    patch: int = 2
    mlp_ratio: float = 4.0
    feature_channels: int = 64
    embedding_channels: int = 256
    token_channels: int | None = None


# Of 0.3, 1.8, 32, 129, 456 and 673 million parameters; the first two are for CPUs.
PRESETS = {
    "nano": DiTOptions(64, 4, head_channels=32, feature_channels=16, embedding_channels=64),
    "tiny": DiTOptions(128, 6, feature_channels=32, embedding_channels=128),
    "small": DiTOptions(384, 12, feature_channels=96, embedding_channels=384),
    "base": DiTOptions(768, 12, feature_channels=128, embedding_channels=768),
    "large": DiTOptions(1024, 24, feature_channels=128, embedding_channels=1024),
    "xlarge": DiTOptions(1152, 28, head_channels=72, feature_channels=128, embedding_channels=1152),
}


@register("backbone", "dit")
class DiT(nn.Module):
    """Turn a noisy code into features by attention among its patches.

    At the start every block is the identity and the embedding changes nothing (adaLN-Zero). Positions are
    computed from the height and width of the input. Source: Peebles and Xie, "Scalable Diffusion Models with
    Transformers", 2023; small, base, large and xlarge have the width, depth and heads of its S, B, L and XL.
    """

    def __init__(self, in_channels: int, size: tuple[int, int], preset: str, **options: Any) -> None:
        """Build a preset with single sizes replaced by options (see `DiTOptions`).

        size: (H, W) that will be used; others that are multiples of the patch work too. Raises ConfigError
        for unknown or contradicting options.
        """
        super().__init__()
        sizes = self.options = choose(PRESETS, preset, options)
        _check(sizes, size)
        self.embedding_channels = sizes.embedding_channels
        self.feature_channels = sizes.feature_channels
        self.pooled_channels = sizes.width
        self.patch = nn.Conv2d(in_channels, sizes.width, sizes.patch, stride=sizes.patch)
        self.blocks = nn.ModuleList(_Block(sizes) for _ in range(sizes.depth))
        self.modulation = zeroed(nn.Linear(sizes.embedding_channels, 2 * sizes.width))
        self.out = nn.Linear(sizes.width, sizes.patch**2 * sizes.feature_channels)

    @property
    def layers(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.blocks)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None = None) -> Features:
        """Return the features of a noisy code.

        x: (B, in_channels, H, W); embedding: (B, embedding_channels); tokens: (B, N, token_channels), if any.
        Raises ValueError where H or W is not a multiple of the patch, or tokens are missing or not expected.
        """
        check_size(x.shape[2:], self.options.patch)
        check_tokens(tokens, self.options.token_channels)
        x = self.patch(x)  # (B, width, h, w), h = H / patch, w = W / patch
        cells = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + positions(cells, self.options.width, x.device)  # (B, h w, width)
        x = _transform(self, x, embedding, tokens)
        return Features(_unpatch(self, x, cells), x.mean(1))  # (B, F, H, W), (B, width)


@register("backbone", "dit_tokens")
class DiTTokens(nn.Module):
    """A diffusion transformer in which every modality has patches of its own: nothing is merged in channels.

    What merging is compared with: with the same width and depth, N modalities make N times as many tokens.
    A modality's head sees its own patches alone, which attend to all.
    """

    separate = True

    def __init__(
        self, groups: Mapping[str, Sequence[int]], size: tuple[int, int], preset: str, **options: Any
    ) -> None:
        """Build a preset with single sizes replaced by options (see `DiTOptions`).

        groups: modality instance -> its channels of the input. size: as for `DiT`. Raises ConfigError for
        unknown or contradicting options.
        """
        super().__init__()
        sizes = self.options = choose(PRESETS, preset, options)
        _check(sizes, size)
        self.groups = {name: list(channels) for name, channels in groups.items()}
        self.embedding_channels = sizes.embedding_channels
        self.feature_channels = sizes.feature_channels
        self.pooled_channels = sizes.width
        self.patches: Any = nn.ModuleDict(
            {
                name: nn.Conv2d(len(channels), sizes.width, sizes.patch, stride=sizes.patch)
                for name, channels in self.groups.items()
            }
        )
        self.names = nn.Parameter(torch.randn(len(groups), sizes.width) * 0.5)
        self.blocks = nn.ModuleList(_Block(sizes) for _ in range(sizes.depth))
        self.modulation = zeroed(nn.Linear(sizes.embedding_channels, 2 * sizes.width))
        self.out = nn.Linear(sizes.width, sizes.patch**2 * sizes.feature_channels)

    @property
    def layers(self) -> list[nn.Module]:
        """Return the blocks."""
        return list(self.blocks)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None = None) -> dict[str, Features]:
        """Return the features of every modality, by instance. Arguments and errors as of `DiT`."""
        check_size(x.shape[2:], self.options.patch)
        check_tokens(tokens, self.options.token_channels)
        cells = [length // self.options.patch for length in x.shape[2:]]
        places = positions(cells, self.options.width, x.device)  # (h w, width)
        sequences = [
            self.patches[name](x[:, channels]).flatten(2).transpose(1, 2) + places + self.names[index]
            for index, (name, channels) in enumerate(self.groups.items())
        ]  # (B, h w, width) each
        read = _transform(self, torch.cat(sequences, dim=1), embedding, tokens)
        return {
            name: Features(_unpatch(self, part, cells), part.mean(1))
            for name, part in zip(self.groups, read.chunk(len(self.groups), dim=1), strict=True)
        }


def _transform(backbone: Any, x: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
    """Return a sequence (B, N, width) after all blocks, and shifted and scaled by the embedding."""
    embedding = F.silu(embedding)
    for block in backbone.blocks:
        x = block(x, embedding, tokens)
    shift, scale = backbone.modulation(embedding)[:, None].chunk(2, dim=-1)  # (B, 1, width) each
    return _normal(x) * (1 + scale) + shift


def _unpatch(backbone: Any, x: Tensor, cells: Sequence[int]) -> Tensor:
    """Return the feature map (B, F, H, W) of the patches (B, h w, width) of a grid of h x w cells."""
    patches = backbone.out(x).transpose(1, 2).unflatten(2, cells)  # (B, F patch^2, h, w)
    return F.pixel_shuffle(patches, backbone.options.patch)


class _Block(nn.Module):
    """Attention, then a perceptron, each shifted, scaled and gated by the embedding; gates start closed."""

    def __init__(self, sizes: DiTOptions) -> None:
        super().__init__()
        hidden = round(sizes.width * sizes.mlp_ratio)
        self.modulation = zeroed(nn.Linear(sizes.embedding_channels, 6 * sizes.width))
        self.attention = Attention(sizes.width, sizes.head_channels, zero=False)
        self.perceptron = nn.Sequential(
            nn.Linear(sizes.width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, sizes.width)
        )
        self.read = None
        if sizes.token_channels is not None:
            self.read = Attention(sizes.width, sizes.head_channels, sizes.token_channels)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
        parts = self.modulation(embedding)[:, None].chunk(6, dim=-1)  # six of (B, 1, width)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        x = x + gate_1 * self.attention(_normal(x) * (1 + scale_1) + shift_1)  # (B, h w, width)
        if self.read is not None:
            x = x + self.read(_normal(x), tokens)
        return x + gate_2 * self.perceptron(_normal(x) * (1 + scale_2) + shift_2)


def positions(cells: Sequence[int], channels: int, device: torch.device) -> Tensor:
    """Return sine-cosine codes of the rows and columns of a grid of height x width cells, (h * w, channels).

    A quarter of the channels each: sine of the row, of the column, cosine of the row, of the column. Source:
    Vaswani et al., 2017, one dimension of a grid after the other.
    """
    height, width = cells
    quarter = channels // 4
    frequencies = torch.exp(torch.arange(quarter, device=device) * (-math.log(10_000) / quarter))
    rows = torch.arange(height, device=device)[:, None] * frequencies  # (height, quarter)
    columns = torch.arange(width, device=device)[:, None] * frequencies
    grid = torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1)
    return torch.cat([grid.sin(), grid.cos()], dim=-1).flatten(0, 1)  # (height * width, channels)


def _normal(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _check(sizes: DiTOptions, size: tuple[int, int]) -> None:
    """Raise ConfigError for sizes that contradict each other or the diffusion space."""
    if sizes.width % 4:
        raise ConfigError(
            f"model.options.width ({sizes.width}) must be a multiple of 4 (sine, cosine; row, column)"
        )
    check_size(size, sizes.patch)
