"""Noise schedules: their ends, their grids and their published formulas."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError, ScheduleConfig
from mmdiff_ray.diffusion.schedule import ABAR_FLOOR, interpolate, make_schedule, schedule_from_alphas

FAMILIES = registry.names("schedule")


def floored(abar: torch.Tensor) -> torch.Tensor:
    """Return abar as the schedules keep it, its last 1e-5 never reached."""
    return ABAR_FLOOR + (1 - ABAR_FLOOR) * abar


def of_diffusers(**options: Any) -> torch.Tensor:
    """Return abar_1 .. abar_1000 of a scheduler of diffusers."""
    return vars(DDPMScheduler(1000, **options))["alphas_cumprod"].double()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_falls_from_data_to_noise(family):
    schedule = make_schedule(ScheduleConfig(family=family), 1)
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    abar = schedule.abar(times)
    assert abar[0].item() == pytest.approx(1, abs=1e-12)
    assert 0 < abar[-1] < 1e-4
    assert (abar.diff() < 0).all()
    torch.testing.assert_close(schedule.sigma(times).square() + abar, torch.ones_like(abar))


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_of_the_first_step_keeps_its_digits(family):
    """1 - abar(1/T) is a difference of nearly equal numbers: within 1e-9 of what 50 digits give."""
    mpmath = pytest.importorskip("mpmath")
    schedule = make_schedule(ScheduleConfig(family=family), 1)
    t = torch.tensor([1e-3], dtype=torch.float64)
    with mpmath.workdps(50):
        exact = {
            "cosine": lambda x: (
                (mpmath.cos((x + 0.008) / 1.008 * mpmath.pi / 2) / mpmath.cos(0.008 / 1.008 * mpmath.pi / 2))
                ** 2
            ),
            "linear": lambda x: mpmath.exp(-(0.1 * x + 0.5 * 19.9 * x**2)),
            "sigmoid": lambda x: (
                (logistic(mpmath, 3) - logistic(mpmath, 6 * x - 3))
                / (logistic(mpmath, 3) - logistic(mpmath, -3))
            ),
        }[family](mpmath.mpf(1) / 1000)
        variance = float((1 - exact) * (1 - mpmath.mpf(ABAR_FLOOR)))
    assert schedule.sigma(t).square().item() == pytest.approx(variance, rel=1e-9)


def logistic(mpmath, x):
    return 1 / (1 + mpmath.exp(-x))


def test_cosine_is_the_squared_cosine_of_diffusers_before_clipping():
    """Nichol and Dhariwal cut every beta at 0.999; ours ends in a floor under abar; else they agree."""
    theirs = of_diffusers(beta_schedule="squaredcos_cap_v2")[:990]
    ours = make_schedule(ScheduleConfig(), 1)
    torch.testing.assert_close(ours.abar(ours.grid())[:990], floored(theirs), rtol=1e-3, atol=1e-6)


def test_linear_is_the_limit_of_the_linear_betas_of_diffusers():
    theirs = of_diffusers(beta_start=1e-4, beta_end=0.02)
    ours = make_schedule(ScheduleConfig(family="linear"), 1)
    torch.testing.assert_close(ours.abar(ours.grid()), floored(theirs), rtol=0.07, atol=1e-3)


def test_sigmoid_is_the_published_formula():
    """Jabri et al., 2022, algorithm 1: (v_end - sigmoid(..)) / (v_end - v_start)."""

    def published(t: float, start: float, end: float, tau: float) -> float:
        at = [1 / (1 + math.exp(-x / tau)) for x in (start, end, t * (end - start) + start)]
        return (at[1] - at[2]) / (at[1] - at[0])

    schedule = make_schedule(ScheduleConfig(family="sigmoid", start=0, end=3, power=0.7), 1)
    for t in (0.01, 0.4, 0.9):
        want = ABAR_FLOOR + (1 - ABAR_FLOOR) * published(t, 0, 3, 0.7)
        assert schedule.abar(torch.tensor([t], dtype=torch.float64)).item() == pytest.approx(want, rel=1e-12)


def test_table_of_alphas_gives_exactly_these_steps():
    a = torch.tensor([0.99, 0.5, 0.9, 0.001], dtype=torch.float64)
    schedule = schedule_from_alphas(a)
    assert schedule.steps == 4
    torch.testing.assert_close(schedule.abar(schedule.grid()), a.cumprod(0), rtol=1e-14, atol=0)


def test_interpolation_hits_every_grid_point_on_grids_that_floats_cannot_hold():
    for steps in (3, 7, 1000, 999):
        table = torch.rand(steps + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        torch.testing.assert_close(interpolate(times, table), table, rtol=0, atol=1e-12)


def test_option_that_a_family_does_not_have_is_an_error_that_names_those_it_has():
    with pytest.raises(
        ConfigError, match=r"schedule\.end: got 3\.0, but schedule\.family cosine takes start$"
    ):
        make_schedule(ScheduleConfig(end=3.0), 1)
