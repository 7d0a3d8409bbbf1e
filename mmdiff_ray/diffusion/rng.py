"""Random numbers keyed by (seed, purpose, visit, sample id).

They are equal at any world size, batch split and restart, so no random state is ever saved.

The generator is counter-based: SplitMix64 (Steele, Lea and Flood, 2014) over a key per sample, in wrapping
int64 arithmetic. The key is mixed after each of its parts (seed and id, visit, purpose) is added. If the
parts were added before mixing, different pairs of id and purpose could get the same numbers.
"""

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.diffusion.constants import constant

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_A = 0xBF58476D1CE4E5B9 - 2**64
_MIX_B = 0x94D049BB133111EB - 2**64


def uniform(seed: int, purpose: str, visits: Tensor, ids: Tensor, count: int) -> Tensor:
    """Return `count` uniform numbers in [0, 1) for every sample, float64 (B, count).

    visits, ids: (B,) int64. Numbers of different purposes are independent.
    """
    if ids.device.type == "cpu":  # numpy calls cost a third of torch's
        key, counter = _key(seed, purpose, visits, ids), np.arange(1, count + 1) * _GOLDEN
        return torch.from_numpy(_shift(_mix(key[:, None] + counter), 11) * 2.0**-53)
    return _bits(seed, purpose, visits, ids, count).double() * 2.0**-53


def normal(seed: int, purpose: str, visits: Tensor, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal numbers for every sample, float32 (B, *shape), by the Box-Muller transform."""
    count = math.prod(shape)
    half = (count + 1) // 2
    bits = _bits(seed, purpose, visits, ids, 2 * half)
    radius = (((bits[:, :half] >> 29).float() + 0.5) * 2.0**-24).log().mul(-2).sqrt()
    angle = (bits[:, half:] >> 29).float() * (2 * math.pi * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].reshape(len(ids), *shape)


def _bits(seed: int, purpose: str, visits: Tensor, ids: Tensor, count: int) -> Tensor:
    """Return non-negative integers below 2^53, int64 (B, count)."""
    key = _key(seed, purpose, visits, ids)
    key = key if isinstance(key, Tensor) else torch.from_numpy(key)
    counter = torch.arange(1, count + 1, device=ids.device, dtype=torch.int64) * _GOLDEN
    return _shift(_mix(key[:, None] + counter), 11)


def _key(seed: int, purpose: str, visits: Tensor, ids: Tensor) -> Any:
    """Return a 64-bit key per sample, (B,): a numpy array for samples on the CPU, else a tensor."""
    numbers: Any = ids.numpy() if ids.device.type == "cpu" else ids
    gone: Any = visits.numpy() if visits.device.type == "cpu" else visits
    key = _mix(numbers + _wrap(seed * 0x5851F42D4C957F2D))
    key = _mix(key ^ (gone * _GOLDEN))
    return _mix(key + _purpose_key(purpose))


@constant
def _purpose_key(purpose: str) -> int:
    """Hash the name of a purpose to a 64-bit integer."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little", signed=True)


def _mix(x: Any) -> Any:
    """Mix int64 numbers; torch and numpy wrap in the same way."""
    x = (x ^ _shift(x, 30)) * _MIX_A
    x = (x ^ _shift(x, 27)) * _MIX_B
    return x ^ _shift(x, 31)


def _shift(x: Any, bits: int) -> Any:
    """Logical right shift; >> on int64 would keep the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
