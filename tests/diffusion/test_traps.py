"""Traps of multi-modal diffusion, each with its number."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff_ray.config import ConfigError, ScheduleConfig, WeightsConfig, from_plain
from mmdiff_ray.diffusion.process import GENERATED, Process
from mmdiff_ray.diffusion.schedule import Schedule, make_schedule, schedule_from_alphas
from mmdiff_ray.diffusion.weights import make_profile, w_from_b
from mmdiff_ray.modalities.label import LabelModality, LabelOptions
from mmdiff_ray.models.denoiser import build_modalities, build_process
from tests.diffusion.ideal import make_process

STEPS = 1000


def linear_betas() -> Schedule:
    """Return the schedule of Ho et al., 2020: 1,000 betas from 1e-4 to 0.02."""
    return schedule_from_alphas(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64))


def clipped_cosine() -> Schedule:
    """Return the schedule of Nichol and Dhariwal, 2021, as published: no beta above 0.999."""
    times = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    abar = ((times + 0.008) / 1.008 * math.pi / 2).cos().square()
    return schedule_from_alphas(1 - (1 - abar[1:] / abar[:-1]).clamp(max=0.999))


def steps_of(schedule: Schedule) -> Tensor:
    """Return a_1 .. a_T."""
    return torch.cat(
        [schedule.log_abar(schedule.grid()[:1]), schedule.log_abar(schedule.grid()).diff()]
    ).exp()


def prior_nats(schedule: Schedule, weights: WeightsConfig) -> float:
    """Return L0 in nats per dimension of a modality with these weights."""
    layout = {"pixels": slice(0, 1), "label": slice(1, 2)}
    profiles = {"label": make_profile("label", weights, schedule)}
    return Process(schedule, profiles, {"label": 1.0}, layout, "pixels", 2).prior_nats("label")


@pytest.mark.parametrize("family", ["cosine", "linear"])
def test_fraction_taken_literally_leaves_no_signal_after_seven_of_a_thousand_steps(family):
    """a_t = alpha_t / (N + 1) with N = 2: abar falls below 1e-3 at t = 7, whatever the schedule."""
    schedule = make_schedule(ScheduleConfig(family=family, paper_fraction=True), modalities=3)
    abar = schedule.abar(schedule.grid())
    assert abar[5] > 1e-3 > abar[6]
    plain = make_schedule(ScheduleConfig(family=family), modalities=3)
    torch.testing.assert_close(steps_of(schedule), steps_of(plain) / 3)


@pytest.mark.parametrize(
    ("schedule", "w", "nats"),
    [(linear_betas, 1.0, 6479), (clipped_cosine, 1.0, 0.030), (linear_betas, 0.01, 0.65)],
)
def test_constant_step_weight_breaks_the_prior_by_as_much_as_the_schedule_lets_it(schedule, w, nats):
    found = prior_nats(schedule(), WeightsConfig("step_weights", w=w, grid=STEPS))
    assert found == pytest.approx(nats, rel=0.01)


def plain_config(weights: dict[str, Any], **schedule: Any) -> dict[str, Any]:
    return {
        "space": {"height": 4, "width": 4},
        "schedule": schedule,
        "modalities": {
            "pixels": {"type": "image"},
            "kind": {"type": "label", "classes": 2, "weights": weights},
        },
        "tasks": {"joint": {"roles": {"pixels": "generated", "kind": "generated"}}},
    }


@pytest.mark.parametrize(
    ("weights", "schedule", "number"),
    [
        ({"family": "step_weights", "w": 1.0}, {"family": "linear"}, "7.65e+03"),
        ({"family": "step_weights", "w": 0.01}, {"family": "linear"}, "0.765"),
        ({"family": "step_weights", "w": 1.0}, {"family": "cosine"}, "97.6"),
        ({"family": "constant", "scale": 1}, {"family": "cosine"}, "0.5"),
        ({"family": "knots", "knots": [[0.0, 1.0], [1.0, 0.4]]}, {"family": "cosine"}, "0.08"),
    ],
)
def test_profile_that_leaves_the_prior_is_refused_with_the_number(weights, schedule, number):
    config = from_plain(plain_config(weights, **schedule))
    with pytest.raises(ConfigError) as error:
        build_process(config, build_modalities(config))
    assert "modalities.kind.weights" in str(error.value)
    assert f"{number} nats per dimension" in str(error.value)
    assert "schedule.prior_limit 0.05" in str(error.value)


def test_prior_limit_and_role_decide_what_is_refused():
    """The same profile is let through under a higher limit, or where no task generates the modality."""
    plain = plain_config({"family": "constant", "scale": 1}, prior_limit=1.0)
    config = from_plain(plain)
    assert build_process(config, build_modalities(config)).prior_nats("kind") == pytest.approx(0.5, abs=1e-3)
    plain = plain_config({"family": "constant", "scale": 1})
    plain["tasks"]["joint"]["roles"]["kind"] = "given"
    config = from_plain(plain)
    build_process(config, build_modalities(config))


@pytest.mark.parametrize("schedule", [linear_betas, clipped_cosine])
def test_same_clock_tells_the_sampler_everything_at_the_first_step_and_nothing_after(schedule):
    """b = sqrt(abar) is w_1 = 1 and w_t = 0: S_t is 0 for t > 1, so it cannot steer."""
    made = schedule()
    b = make_profile("label", WeightsConfig("clock"), made)(made.grid())
    w = w_from_b(b, steps_of(made))
    assert w[0].item() == pytest.approx(1, abs=1e-12)
    assert w[1:].abs().max() < 1e-12


def test_label_code_gives_the_label_away_far_below_the_noise():
    """1,000 classes in 64x64x3 at b = 0.05: the nearest code in z_1 is the right one for 98.6 % of rows."""
    options = LabelOptions(type="label", classes=1000, pattern="noise", code_channels=3)
    label = LabelModality("label", options, (64, 64))
    layout = {"pixels": slice(0, 3), "label": slice(0, 3)}
    process = make_process(layout, {"label": WeightsConfig("constant", scale=0.05)})
    right, rows, generator = 0, 250, torch.Generator().manual_seed(0)
    roles, end = {"label": torch.full((rows,), GENERATED)}, torch.ones(rows, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, 1000, rows):
            classes = torch.arange(start, start + rows)
            noise = torch.randn(rows, 3, 64, 64, generator=generator)
            z = process.marginal({"label": label.encode(classes)}, roles, end).sample(noise)
            right += int((label.from_code(z) == classes).sum())
    assert right / 1000 == pytest.approx(0.986, abs=4 * math.sqrt(0.986 * 0.014 / 1000))


@pytest.mark.parametrize(
    ("schedule", "low", "high"), [(linear_betas, 1e4, 3e4), (clipped_cosine, 4e4, 1.1e5)]
)
def test_weight_near_one_at_small_steps_outweighs_the_noise_in_the_exact_kl(schedule, low, high):
    """|w (c - c^)|^2 against |k (eps - eps^)|^2 at w = 1 and equal errors: 1 / k_t^2, in steps 2 to 20."""
    process = make_process({"pixels": slice(0, 1)})
    process = Process(schedule(), {}, process.kappas, process.layout, "pixels", 1)
    k = torch.arange(2, 21, dtype=torch.float64)
    step = process.step(k / STEPS, (k - 1) / STEPS, {"pixels": torch.full((19,), GENERATED)})
    factor = 1 / step.k.square()
    assert low < factor.min() < factor.max() < high


def test_profile_that_is_flat_near_the_data_end_has_small_step_weights_there():
    """What avoids it: a cosine ramp's w stays below 0.01 in steps 2 to 20, a fast one's does not."""
    schedule = make_schedule(ScheduleConfig(), 1)

    def largest(weights: WeightsConfig) -> float:
        b = make_profile("label", weights, schedule)(schedule.grid())
        return float(w_from_b(b, steps_of(schedule))[1:20].abs().max())

    assert largest(WeightsConfig("cosine")) < 0.01
    assert largest(WeightsConfig("knots", knots=[[0, 0], [0.002, 1], [1, 0]])) > 0.4
