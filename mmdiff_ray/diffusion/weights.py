"""Weight profiles b(t), and the equivalent step weights w_t of the paper.

    b_t = sqrt(a_t) (b_{t-1} + w_t),  b_0 = 0   <=>   w_t = b_t / sqrt(a_t) - b_{t-1}

The code uses b, which is continuous, and derives w on the grid of each sampler. The recursion is from the
paper (MT-Diffusion, ICLR 2024, forward process). Profiles as functions of time, and their families, are ours.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmdiff_ray.config import ConfigError, WeightsConfig
from mmdiff_ray.diffusion.schedule import Schedule, interpolate
from mmdiff_ray.registry import look_up, register

Profile = Callable[[Tensor], Tensor]
"""t in [0, 1], any shape -> b(t), the same shape."""


def make_profile(name: str, config: WeightsConfig, schedule: Schedule) -> Profile:
    """Return the profile of a modality: the profile of its family times `scale`, or 1 if it is null.

    Raises ConfigError that names the key for invalid values.
    """
    scale = 1.0 if config.scale is None else config.scale
    key = f"modalities.{name}.weights"
    try:
        family = look_up("profile", config.family)
    except KeyError as error:
        raise ConfigError(f"{key}.family: {error.args[0]}") from None
    if not math.isfinite(scale) or not config.shape > 0:
        raise ConfigError(f"{key}: scale ({scale}) must be finite and shape ({config.shape}) above 0")
    try:
        profile = family(config, schedule)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    return lambda t: scale * profile(t)


def b_from_w(w: Tensor, a: Tensor) -> Tensor:
    """Compute b_1 .. b_T from step weights w_1 .. w_T (T, ...) on a grid of a_1 .. a_T (T,)."""
    b, steps = torch.zeros_like(w[0]), []
    for w_t, root in zip(w, a.sqrt(), strict=True):
        b = root * (b + w_t)
        steps.append(b)
    return torch.stack(steps)


def w_from_b(b: Tensor, a: Tensor) -> Tensor:
    """Compute w_1 .. w_T from a profile b_1 .. b_T (T, ...) on a grid of a_1 .. a_T (T,)."""
    before = torch.cat([torch.zeros_like(b[:1]), b[:-1]])
    return b / a.sqrt().reshape(-1, *[1] * (b.ndim - 1)) - before


@register("profile", "constant")
def constant(config: WeightsConfig, schedule: Schedule) -> Profile:
    """b = 1. It does not decay, so the prior check rejects it for generated modalities."""
    return lambda t: torch.ones_like(t)


@register("profile", "linear")
def linear_profile(config: WeightsConfig, schedule: Schedule) -> Profile:
    """b = 1 - t."""
    return lambda t: 1 - t


@register("profile", "cosine")
def cosine_profile(config: WeightsConfig, schedule: Schedule) -> Profile:
    """b = cos(pi t / 2)."""
    return lambda t: (math.pi / 2 * t).cos().clamp_min(0)


@register("profile", "power")
def power_profile(config: WeightsConfig, schedule: Schedule) -> Profile:
    """b = (1 - t)^shape."""
    return lambda t: (1 - t).clamp_min(0).pow(config.shape)


@register("profile", "sigmoid")
def sigmoid_profile(config: WeightsConfig, schedule: Schedule) -> Profile:
    """b is a sigmoid that falls from 1 to 0 around t = 1/2; shape: its steepness (6: smooth)."""

    def profile(t: Tensor) -> Tensor:
        top, bottom = torch.sigmoid(t.new_tensor([config.shape / 2, -config.shape / 2]))
        return (torch.sigmoid(config.shape * (0.5 - t)) - bottom) / (top - bottom)

    return profile


@register("profile", "clock")
def clock_profile(config: WeightsConfig, schedule: Schedule) -> Profile:
    """b = sigma(t) sqrt(abar(tau)) / sigma(tau), tau = shape t / (1 + (shape - 1) t).

    The modality has the signal-to-noise ratio of the anchor at time tau. shape 1: the same clock, b =
    sqrt(abar).
    shape below 1: the modality is denoised before the anchor; above 1: after it.
    """

    def profile(t: Tensor) -> Tensor:
        if config.shape == 1:
            return schedule.abar(t).sqrt()
        tau = config.shape * t / (1 + (config.shape - 1) * t)
        at = tau.clamp_min(1e-9)
        ratio = schedule.sigma(t.clamp_min(1e-9)) / schedule.sigma(at)
        return ratio * schedule.abar(at).sqrt()

    return profile


@register("profile", "knots")
def knots_profile(config: WeightsConfig, schedule: Schedule) -> Profile:
    """Piecewise linear b through `knots`, pairs [t, b] from t = 0 to t = 1."""
    if not config.knots or any(len(knot) != 2 for knot in config.knots):
        raise ValueError("family knots needs knots: [[0, b], ..., [1, b]]")
    times, values = (torch.tensor(column, dtype=torch.float64) for column in zip(*config.knots, strict=True))
    if times[0] != 0 or times[-1] != 1 or not (times.diff() > 0).all():
        raise ValueError(f"knots must rise in t from 0 to 1; got {times.tolist()}")
    if not values.isfinite().all():
        raise ValueError(f"knots must have finite b; got {values.tolist()}")

    def profile(t: Tensor) -> Tensor:
        x, y = times.to(t), values.to(t)
        right = torch.searchsorted(x, t.contiguous()).clamp(1, len(x) - 1)
        share = (t - x[right - 1]) / (x[right] - x[right - 1])
        return torch.lerp(y[right - 1], y[right], share)

    return profile


@register("profile", "step_weights")
def step_weights_profile(config: WeightsConfig, schedule: Schedule) -> Profile:
    """Compute b with the recursion from the step weights `w` on a grid of `grid` steps.

    w: one number for all steps, or `grid` numbers. Between grid points b is linear.
    """
    count = config.grid
    try:
        w = torch.as_tensor(config.w, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        w = torch.tensor(math.nan)
    if not w.isfinite().all() or w.ndim > 1 or (w.ndim == 1 and len(w) != count):
        raise ValueError(
            f"family step_weights needs w: a number, or a list of {count} (weights.grid) numbers"
        )
    times = torch.arange(0, count + 1, dtype=torch.float64) / count
    table = torch.cat([w.new_zeros(1), b_from_w(w.expand(count), schedule.log_abar(times).diff().exp())])
    return lambda t: interpolate(t, table)
