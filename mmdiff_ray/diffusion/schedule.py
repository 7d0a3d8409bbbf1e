"""Noise schedules abar(t) on continuous time t in [0, 1]; a grid of T steps uses them at t = k / T.

abar(0) = 1 (data), abar(1) close to 0 (noise). Schedules return log abar, so that products over many steps
and 1 - abar near t = 0 stay exact. Pass float64 times; results have the dtype of t.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdiff_ray.config import ConfigError, ScheduleConfig
from mmdiff_ray.registry import look_up, register

ABAR_FLOOR = 1e-5
"""abar(1). Above 0 so that ratios of adjacent steps stay finite; costs 5e-6 nats per dimension."""


@dataclass(frozen=True)
class Schedule:
    """A noise schedule. log_abar: t -> log abar(t), any shape. steps: T of the grid for exact terms."""

    log_abar: Callable[[Tensor], Tensor]
    steps: int

    def abar(self, t: Tensor) -> Tensor:
        """Return abar(t), the remaining fraction of the anchor's variance."""
        return self.log_abar(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """Return sqrt(1 - abar(t)), the standard deviation of the noise."""
        return (-torch.expm1(self.log_abar(t))).clamp_min(0).sqrt()

    def grid(self) -> Tensor:
        """Return the times 1/T, 2/T, ..., 1 in float64, (T,)."""
        return torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps


def make_schedule(config: ScheduleConfig, modalities: int) -> Schedule:
    """Return the configured schedule. modalities: N + 1, by which `paper_fraction` divides every alpha_t.

    Raises ConfigError for a parameter that the family does not have.
    Source: MT-Diffusion (ICLR 2024), transition of the forward process, a_t = alpha_t / (N + 1).
    """
    family = look_up("schedule", config.family)
    given = {
        key: getattr(config, key) for key in ("start", "end", "power") if getattr(config, key) is not None
    }
    known = inspect.signature(family).parameters
    for key, value in given.items():
        if key not in known:
            takes = ", ".join(known) or "no parameters"
            raise ConfigError(
                f"schedule.{key}: got {value}, but schedule.family {config.family} takes {takes}"
            )
    raw = family(**given)

    def log_abar(t: Tensor) -> Tensor:
        value = torch.log(ABAR_FLOOR + (1 - ABAR_FLOOR) * raw(t))
        return value - config.steps * t * math.log(modalities) if config.paper_fraction else value

    return Schedule(log_abar, config.steps)


def schedule_from_alphas(a: Sequence[float] | Tensor) -> Schedule:
    """Return the schedule whose grid steps are exactly a_1 .. a_T; between grid points log abar is linear."""
    table = torch.cat(
        [torch.zeros(1, dtype=torch.float64), torch.as_tensor(a, dtype=torch.float64).log().cumsum(0)]
    )
    return Schedule(lambda t: interpolate(t, table), len(table) - 1)


def interpolate(t: Tensor, table: Tensor) -> Tensor:
    """Evaluate the piecewise linear function through table[k] at t = k / (len - 1), for t in [0, 1]."""
    position = t.clamp(0, 1) * (len(table) - 1)
    left = (position + 1e-9).floor().clamp(max=len(table) - 2).long()  # k / T * T may be below k
    table = table.to(position)
    return torch.lerp(table[left], table[left + 1], position - left)


@register("schedule", "cosine")
def cosine(start: float = 0.008) -> Callable[[Tensor], Tensor]:
    """abar = cos^2, offset by `start` at the data end. Source: Nichol and Dhariwal, 2021, equation 17."""

    def abar(t: Tensor) -> Tensor:
        phase = (t + start) / (1 + start) * math.pi / 2
        return (phase.cos() / math.cos(start / (1 + start) * math.pi / 2)).square().clamp(0, 1)

    return abar


@register("schedule", "linear")
def linear(start: float = 0.1, end: float = 20.0) -> Callable[[Tensor], Tensor]:
    """abar = exp(-integral of beta), beta rising linearly from `start` to `end` per unit time.

    The limit of DDPM's 1e-4 .. 0.02 over 1000 steps. Source: Song et al., 2021, variance preserving process.
    """

    def abar(t: Tensor) -> Tensor:
        return torch.exp(-(start * t + 0.5 * (end - start) * t.square()))

    return abar


@register("schedule", "sigmoid")
def sigmoid(start: float = -3.0, end: float = 3.0, power: float = 1.0) -> Callable[[Tensor], Tensor]:
    """abar = a falling sigmoid from `start` to `end`, at temperature `power`. Source: Jabri et al., 2022."""

    def abar(t: Tensor) -> Tensor:
        top, bottom = 1 / (1 + math.exp(-start / power)), 1 / (1 + math.exp(-end / power))
        value = torch.sigmoid((t * (end - start) + start) / power)
        return ((bottom - value) / (bottom - top)).clamp(0, 1)

    return abar
