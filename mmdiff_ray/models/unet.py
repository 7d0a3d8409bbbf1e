"""The U-Net: residual blocks with adaptive group norm, attention where the resolution is low."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.base import Features
from mmdiff_ray.models.layers import Attention, check_size, check_tokens, choose, group_norm, zeroed
from mmdiff_ray.registry import register


@dataclass(frozen=True)
class UNetOptions:
    """The sizes of a U-Net.

    width: channels at full resolution, so also of the feature map. multipliers: the channels of every level,
    in widths; each further level has half the resolution. blocks: residual blocks of every level, as many on
    the way down as on the way up (at the lowest level: in all). attention: the levels, from 0, that attend.
    embedding_channels: of the embedding of time and roles. head_channels: the fewest channels of one
    attention head. token_channels: where set, every attention also reads tokens of so many channels.
    """

    width: int
    multipliers: list[int]
    blocks: list[int]
    attention: list[int]
    embedding_channels: int
    head_channels: int = 64
    token_channels: int | None = None

    @property
    def channels(self) -> list[int]:
        """Return the channels of every level, full resolution first."""
        return [self.width * multiplier for multiplier in self.multipliers]

    @property
    def stride(self) -> int:
        """Return how many cells of the input lie along one cell of the lowest level."""
        return 2 ** (len(self.multipliers) - 1)


# Of 0.3, 1.2, 7.4, 46 and 134 million parameters; the first two are for CPUs.
PRESETS = {
    "nano": UNetOptions(
        width=16, multipliers=[1, 2, 4], blocks=[1, 1, 2], attention=[2], embedding_channels=64
    ),
    "tiny": UNetOptions(
        width=32, multipliers=[1, 2, 4], blocks=[1, 1, 2], attention=[1, 2], embedding_channels=128
    ),
    "small": UNetOptions(
        width=64, multipliers=[1, 2, 4], blocks=[2, 2, 3], attention=[1, 2], embedding_channels=256
    ),
    "base": UNetOptions(
        width=128, multipliers=[1, 2, 3, 4], blocks=[2, 2, 2, 3], attention=[2, 3], embedding_channels=512
    ),
    "large": UNetOptions(
        width=192, multipliers=[1, 2, 3, 4], blocks=[2, 2, 3, 4], attention=[2, 3], embedding_channels=768
    ),
}


@register("backbone", "unet")
class UNet(nn.Module):
    """Turn a noisy code into features, at full resolution and at every lower one.

    x and y of each cell, from -1 to 1, enter beside the code: codes that are the same in every cell can be
    told apart from what lies somewhere. Sources: Dhariwal and Nichol, 2021 ("ADM", the adaptive group norm);
    Karras et al., 2022 ("EDM", the residual blocks); Liu et al., "CoordConv", 2018.
    """

    def __init__(self, in_channels: int, size: tuple[int, int], preset: str, **options: Any) -> None:
        """Build a preset with single sizes replaced by options (see `UNetOptions`).

        size: (H, W) that will be used; others that are multiples of the stride work too. Raises ConfigError
        for unknown or contradicting options.
        """
        super().__init__()
        sizes = self.options = choose(PRESETS, preset, options)
        _check(sizes, size)
        channels = sizes.channels
        self.embedding_channels = sizes.embedding_channels
        self.feature_channels = channels[0]
        self.pooled_channels = channels[-1] + channels[0]
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.place = nn.Conv2d(2, channels[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(_Level(sizes, level, channels[level]) for level in range(len(channels) - 1))
        self.shrink = nn.ModuleList(nn.Conv2d(high, low, 2, stride=2) for high, low in pairwise(channels))
        self.bottom = _Level(sizes, len(channels) - 1, channels[-1])
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(low, high, 2, stride=2) for high, low in pairwise(channels)
        )
        self.up = nn.ModuleList(
            _Level(sizes, level, 2 * channels[level]) for level in range(len(channels) - 1)
        )

    @property
    def layers(self) -> list[nn.Module]:
        """Return the residual blocks and attentions of all levels."""
        levels: Any = [*self.down, self.bottom, *self.up]
        return [part for level in levels for part in (*level.blocks, *level.attentions)]

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None = None) -> Features:
        """Return the features of a noisy code.

        x: (B, in_channels, H, W); embedding: (B, embedding_channels); tokens: (B, N, token_channels), if any.
        Raises ValueError where H or W is not a multiple of the stride, or tokens are missing or not expected.
        """
        check_size(x.shape[2:], self.options.stride)
        check_tokens(tokens, self.options.token_channels)
        embedding = F.silu(embedding)
        x = self.stem(x) + self.place(coordinates(x))  # (B, C_0, H, W)
        skips = []
        for level, shrink in zip(self.down, self.shrink, strict=True):
            x = level(x, embedding, tokens)  # (B, C_l, H / 2^l, W / 2^l)
            skips.append(x)
            x = shrink(x)
        x = low = self.bottom(x, embedding, tokens)  # (B, C_L, H / stride, W / stride)
        for level, grow, skip in zip(reversed(self.up), reversed(self.grow), reversed(skips), strict=True):
            x = level(torch.cat([grow(x), skip], dim=1), embedding, tokens)  # (B, C_l, H / 2^l, W / 2^l)
        return Features(x, torch.cat([low.mean((2, 3)), x.mean((2, 3))], dim=1))


class _Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the options say so."""

    def __init__(self, sizes: UNetOptions, level: int, in_channels: int) -> None:
        super().__init__()
        channels, count = sizes.channels[level], sizes.blocks[level]
        ins = [in_channels] + [channels] * (count - 1)
        self.blocks = nn.ModuleList(_Block(first, channels, sizes.embedding_channels) for first in ins)
        attends = level in sizes.attention
        self.attentions = nn.ModuleList(_Attend(channels, sizes) for _ in range(count if attends else 0))

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x, embedding)
            if self.attentions:
                x = self.attentions[index](x, tokens)
        return x


class _Block(nn.Module):
    """A residual block, its second norm scaled and shifted by the embedding; its branch starts as nothing."""

    def __init__(self, in_channels: int, channels: int, embedding_channels: int) -> None:
        super().__init__()
        self.norm_1 = group_norm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_channels, 2 * channels)
        self.norm_2 = group_norm(channels, affine=False)
        self.conv_2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        branch = self.conv_1(F.silu(self.norm_1(x)))  # (B, C, H, W)
        branch = self.conv_2(F.silu(self.norm_2(branch) * (1 + scale) + shift))
        return self.skip(x) + branch


class _Attend(nn.Module):
    """Attention among all cells, then, where there are tokens, of the cells to them."""

    def __init__(self, channels: int, sizes: UNetOptions) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.own = Attention(channels, sizes.head_channels)
        self.read = None
        if sizes.token_channels is not None:
            self.read = Attention(channels, sizes.head_channels, sizes.token_channels)
            self.read_norm = group_norm(channels)

    def forward(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        x = x + _over_cells(self.own, self.norm(x))
        if self.read is not None:
            x = x + _over_cells(self.read, self.read_norm(x), tokens)
        return x


def coordinates(x: Tensor) -> Tensor:
    """Return the place of every cell of x (B, C, H, W): x and y from -1 to 1, (1, 2, H, W)."""
    rows, columns = (torch.linspace(-1, 1, length, device=x.device, dtype=x.dtype) for length in x.shape[2:])
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"))[None]


def _over_cells(attention: Attention, x: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Return the attention of the cells of x, (B, C, H, W) in and out."""
    return attention(x.flatten(2).transpose(1, 2), tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def _check(sizes: UNetOptions, size: tuple[int, int]) -> None:
    """Raise ConfigError for sizes that contradict each other or the diffusion space."""
    levels = len(sizes.multipliers)
    if len(sizes.blocks) != levels or not levels or min(sizes.blocks) < 1:
        raise ConfigError(
            f"model.options.blocks ({sizes.blocks}) must have one number, at least 1, for each of "
            f"the {levels} multipliers ({sizes.multipliers})"
        )
    for level in sizes.attention:
        if not 0 <= level < levels:
            raise ConfigError(
                f"model.options.attention: no level {level}; there are the levels 0 to {levels - 1}"
            )
    check_size(size, sizes.stride)
