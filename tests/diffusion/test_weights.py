"""Weight profiles b(t) and the step weights they stand for."""

import pytest
import torch

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError, ScheduleConfig, WeightsConfig
from mmdiff_ray.diffusion.schedule import Schedule, make_schedule
from mmdiff_ray.diffusion.weights import b_from_w, make_profile, w_from_b

KNOTS = [[0.0, 0.5], [0.3, 1.2], [0.6, 0.2], [1.0, 0.0]]
EXAMPLES = {
    "constant": WeightsConfig("constant", scale=0.7),
    "linear": WeightsConfig("linear"),
    "cosine": WeightsConfig("cosine", scale=2.0),
    "power": WeightsConfig("power", shape=3.0),
    "sigmoid": WeightsConfig("sigmoid", shape=8.0),
    "clock": WeightsConfig("clock", shape=0.25),
    "knots": WeightsConfig("knots", knots=KNOTS),
    "step_weights": WeightsConfig("step_weights", w=[0.5, -0.2, 0.0, 0.3], grid=4),
}


def steps_of(schedule: Schedule, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the times k / steps and the a of every step between them."""
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    return times[1:], schedule.log_abar(times).diff().exp()


def test_every_registered_family_has_an_example_here():
    assert sorted(EXAMPLES) == registry.names("profile")


@pytest.mark.parametrize("steps", [1, 3, 25, 1000])
@pytest.mark.parametrize("noise", registry.names("schedule"))
@pytest.mark.parametrize("family", sorted(EXAMPLES))
def test_step_weights_and_profile_are_inverse_on_any_grid(family, noise, steps):
    schedule = make_schedule(ScheduleConfig(family=noise), 1)
    times, a = steps_of(schedule, steps)
    b = make_profile("x", EXAMPLES[family], schedule)(times)
    torch.testing.assert_close(b_from_w(w_from_b(b, a), a), b, rtol=1e-12, atol=1e-12)
    w = torch.randn(steps, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
    torch.testing.assert_close(w_from_b(b_from_w(w, a), a), w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", sorted(EXAMPLES))
def test_profile_is_a_function_of_each_time_alone(family):
    """Any shape of times, any grid: the same b at the same t, in the dtype of t."""
    profile = make_profile("x", EXAMPLES[family], make_schedule(ScheduleConfig(), 1))
    t = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lone = torch.stack([profile(value.reshape(1))[0] for value in t.flatten()])
    torch.testing.assert_close(profile(t), lone.reshape(3, 5), rtol=1e-14, atol=0)
    assert profile(t.float()).dtype == torch.float32


@pytest.mark.parametrize("family", sorted(set(EXAMPLES) - {"constant", "step_weights"}))
def test_family_for_generated_modalities_vanishes_at_noise(family):
    profile = make_profile("x", EXAMPLES[family], make_schedule(ScheduleConfig(), 1))
    assert abs(profile(torch.ones(1, dtype=torch.float64)).item()) < 0.004


@pytest.mark.parametrize(
    ("family", "t", "want"),
    [
        ("constant", 0.5, 0.7),
        ("linear", 0.25, 0.75),
        ("cosine", 1 / 3, 2 * 0.75**0.5),
        ("power", 0.5, 0.125),
        ("sigmoid", 0.5, 0.5),
        ("knots", 0.45, 0.7),
        ("knots", 0.3, 1.2),
    ],
)
def test_families_are_their_formulas(family, t, want):
    profile = make_profile("x", EXAMPLES[family], make_schedule(ScheduleConfig(), 1))
    assert profile(torch.tensor([t], dtype=torch.float64)).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("shape", [0.2, 1.0, 5.0])
def test_clock_gives_the_signal_to_noise_ratio_of_the_anchor_at_another_time(shape):
    schedule = make_schedule(ScheduleConfig(), 1)
    t = torch.linspace(0.001, 1, 200, dtype=torch.float64)
    tau = shape * t / (1 + (shape - 1) * t)
    ratio = make_profile("x", WeightsConfig(shape=shape), schedule)(t) / schedule.sigma(t)
    torch.testing.assert_close(ratio, schedule.abar(tau).sqrt() / schedule.sigma(tau), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("shape", "sign"), [(0.5, 1), (2.0, -1)])
def test_clock_below_one_settles_the_modality_before_the_anchor_and_above_one_after(shape, sign):
    schedule = make_schedule(ScheduleConfig(), 1)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    ahead = make_profile("x", WeightsConfig(shape=shape), schedule)(t) - schedule.abar(t).sqrt()
    assert (sign * ahead > 0).all()


def test_step_weights_profile_gives_the_configured_weights_back_on_its_own_grid():
    schedule = make_schedule(ScheduleConfig(), 1)
    times, a = steps_of(schedule, 4)
    b = make_profile("x", EXAMPLES["step_weights"], schedule)(times)
    torch.testing.assert_close(w_from_b(b, a), torch.tensor([0.5, -0.2, 0.0, 0.3], dtype=torch.float64))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            WeightsConfig("clok"),
            r"modalities\.x\.weights\.family: unknown profile 'clok'.*did you mean 'clock'",
        ),
        (WeightsConfig(scale=float("nan")), r"modalities\.x\.weights: scale \(nan\) must be finite"),
        (WeightsConfig(shape=0.0), r"modalities\.x\.weights: .*shape \(0\.0\) above 0"),
        (WeightsConfig("knots"), r"modalities\.x\.weights: family knots needs knots"),
        (WeightsConfig("knots", knots=[[0, 1], [0.5, 0]]), r"must rise in t from 0 to 1; got \[0\.0, 0\.5\]"),
        (WeightsConfig("knots", knots=[[0, 1], [0.5, 0], [0.5, 1], [1, 0]]), r"must rise in t from 0 to 1"),
        (WeightsConfig("knots", knots=[[0, 1], [1, float("nan")]]), r"must have finite b"),
        (WeightsConfig("step_weights", w="fast"), r"needs w: a number"),
        (WeightsConfig("step_weights", w=[1.0, None], grid=2), r"a list of 2 \(weights\.grid\) numbers"),
        (WeightsConfig("step_weights"), r"needs w: a number, or a list of 1000 \(weights\.grid\) numbers"),
        (WeightsConfig("step_weights", w=[1.0, 2.0], grid=3), r"a list of 3 \(weights\.grid\) numbers"),
    ],
)
def test_profile_that_cannot_be_made_is_an_error_that_names_the_key(config, message):
    with pytest.raises(ConfigError, match=message):
        make_profile("x", config, make_schedule(ScheduleConfig(), 1))
