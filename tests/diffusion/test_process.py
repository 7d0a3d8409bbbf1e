"""The forward process against brute force, a trusted library and its own simulation."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from mmdiff_ray.config import LossConfig, WeightsConfig
from mmdiff_ray.diffusion.objective import Objective, posterior_nats
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN, Gaussian, Process
from mmdiff_ray.diffusion.schedule import schedule_from_alphas
from mmdiff_ray.diffusion.weights import make_profile
from tests.diffusion.ideal import OVERLAPPING, OWN, four_points, make_process, roles_of

VECTORS = {
    key: np.array(value)
    for key, value in json.loads((Path(__file__).parent / "process_vectors.json").read_text()).items()
}
assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
STEPS = 12
ALL = [ABSENT, GIVEN, GENERATED]


def vector(key: str) -> Tensor:
    return torch.tensor(VECTORS[key], dtype=torch.float64)


def brute_force_process(extra: float | None = None) -> Process:
    """Return the process of the vectors: an anchor and three codes that overlap it, of four cells.

    extra: b of one more signal.
    """
    schedule = schedule_from_alphas(VECTORS["alpha"].tolist())
    profiles = {
        f"x{i}": make_profile(f"x{i}", WeightsConfig("step_weights", w=w.tolist(), grid=STEPS), schedule)
        for i, w in enumerate(VECTORS["w"].T)
    }
    if extra is not None:
        profiles["prior"] = make_profile("prior", WeightsConfig("constant", scale=extra), schedule)
    layout = {name: slice(0, 1) for name in ("z0", *profiles)}
    return Process(schedule, profiles, dict.fromkeys(layout, 1.0), layout, "z0", 1)


def brute_force_codes() -> dict[str, Tensor]:
    """Return the codes of the vectors, the same in a row per step: instance -> (12, 1, 1, 4)."""
    codes = {"z0": vector("z0")} | {f"x{i}": code for i, code in enumerate(vector("codes"))}
    return {name: code.reshape(1, 1, 1, 4).expand(STEPS, -1, -1, -1) for name, code in codes.items()}


def generated(codes: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full((len(code),), GENERATED) for name, code in codes.items()}


def cells(key: str) -> Tensor:
    return vector(key).reshape(STEPS, 1, 1, 4)


@pytest.fixture
def grid() -> tuple[Tensor, Tensor]:
    """Return the times t = 1/12 .. 1 and the times s = t - 1/12, one step before."""
    t = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    return t, (torch.arange(STEPS, dtype=torch.float64)) / STEPS


def test_accumulated_weights_equal_brute_force(grid):
    betas = brute_force_process().betas(grid[0], generated(brute_force_codes()))
    found = torch.stack([betas[f"x{i}"] for i in range(3)], dim=1)
    assert_equal(found, vector("accumulated_weight"))


def test_step_weights_are_recovered_from_the_profiles(grid):
    step = brute_force_process().step(grid[0], grid[1], generated(brute_force_codes()))
    assert_equal(torch.stack([step.w[f"x{i}"] for i in range(3)], 1), vector("w"))
    assert_equal(step.a, vector("alpha"))
    assert_equal(step.w["z0"], torch.zeros(STEPS, dtype=torch.float64))


def test_marginal_equals_brute_force(grid):
    codes = brute_force_codes()
    mean, std = brute_force_process().marginal(codes, generated(codes), grid[0])
    assert_equal(mean, cells("marginal_mean"))
    assert_equal(std.square(), vector("marginal_var"))


def test_posterior_equals_brute_force(grid):
    codes = brute_force_codes()
    mean, std = brute_force_process().posterior(cells("z_t"), codes, generated(codes), *grid)
    assert_equal(mean, cells("posterior_mean"))
    assert_equal(std.square(), vector("posterior_var"))


@pytest.mark.parametrize("wrong", ["z0", "x0", "x1", "x2"])
def test_model_mean_and_step_kl_equal_brute_force_whichever_code_is_predicted_wrong(grid, wrong):
    """The vectors' model has the posterior mean `model_mean`.

    Any one code, predicted wrong by the right amount, makes the production posterior have it from step 2 on
    (at step 1 the mean is z_0, whatever else is predicted). The KL must then be the vectors'.
    """
    process, codes, (t, s) = brute_force_process(), brute_force_codes(), grid
    roles = generated(codes)
    nudged = {**codes, wrong: codes[wrong] + 1}
    slope = (
        process.posterior(cells("z_t"), nudged, roles, *grid).mean
        - process.posterior(cells("z_t"), codes, roles, *grid).mean
    )
    error = (cells("model_mean") - cells("posterior_mean")) / slope
    error[0] = 0
    predicted = {**codes, wrong: codes[wrong] + error}
    mean, _ = process.posterior(cells("z_t"), predicted, roles, *grid)
    assert_equal(mean[1:], cells("model_mean")[1:])
    nats = posterior_nats(process, t, s, roles, codes, predicted)["z0"]["total"]
    torch.testing.assert_close(nats, vector("kl_step_nats"), rtol=1e-12, atol=1e-11)


def test_prior_kl_equals_brute_force():
    """The vectors' prior is N(m, I); one more signal, -m, moves both so that it becomes the N(0, I) of L0."""
    process = brute_force_process(extra=1.0)
    codes = brute_force_codes() | {
        "prior": -vector("prior_mean").reshape(1, 1, 1, 4).expand(STEPS, -1, -1, -1)
    }
    sums = Objective(process, LossConfig(), {}).prior_sums(codes, generated(codes))
    assert sums["l0/z0"].item() / STEPS == pytest.approx(VECTORS["kl_prior_nats"], rel=1e-12)


def test_chain_of_transitions_ends_in_the_marginal_and_its_regression_is_the_posterior():
    """Simulate z_1 .. z_12 step by step, and look at every step.

    Mean and variance are the marginal's, and the least squares line of z_{t-1} on z_t is the posterior, all
    within 5 standard errors.
    """
    rows, generator = 100_000, torch.Generator().manual_seed(7)
    process, every = brute_force_process(), {n: c[:1] for n, c in brute_force_codes().items()}
    codes = {name: code[..., :1].expand(rows, -1, -1, -1) for name, code in every.items()}
    roles = generated(codes)
    z = codes["z0"]
    for k in range(1, STEPS + 1):
        t, s = (torch.full((rows,), step / STEPS, dtype=torch.float64) for step in (k, k - 1))
        before = z
        z = process.transition(z, codes, roles, t, s).sample(
            torch.randn(z.shape, generator=generator).double()
        )
        marginal = Gaussian(*process.marginal(codes, roles, t))
        std = float(marginal.std[0])
        assert abs(float(z.mean() - marginal.mean[0])) < 5 * std / rows**0.5
        assert abs(float(z.var()) / std**2 - 1) < 5 * (2 / rows) ** 0.5
        if k > 1:
            check_regression(process, before, z, codes, roles, t, s)


def check_regression(process, before, z, codes, roles, t, s):
    x, y = z.flatten(), before.flatten()
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
    residual = y - y.mean() - slope * (x - x.mean())
    posterior = Gaussian(*process.posterior(z, codes, roles, t, s))
    std = float(posterior.std[0])
    at_mean, above = (
        process.posterior(torch.full_like(z[:1], value), *one_row(codes, roles), t[:1], s[:1]).mean.item()
        for value in (float(x.mean()), float(x.mean()) + 1)
    )
    assert abs(float(y.mean()) - at_mean) < 5 * std / len(x) ** 0.5
    assert abs(float(slope) - (above - at_mean)) < 5 * std / float(x.std()) / len(x) ** 0.5
    assert abs(float(residual.var()) / std**2 - 1) < 5 * (2 / len(x)) ** 0.5


def one_row(codes, roles):
    return {name: code[:1] for name, code in codes.items()}, {name: role[:1] for name, role in roles.items()}


@pytest.fixture(scope="module")
def ddpm() -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=100,
        trained_betas=np.linspace(1e-3, 0.2, 100, dtype=np.float32),
        variance_type="fixed_small",
        clip_sample=False,
        prediction_type="sample",
        timestep_spacing="trailing",
    )


@pytest.mark.parametrize("steps", [100, 20])
def test_posterior_of_the_anchor_alone_is_the_ddpm_posterior_of_diffusers(ddpm, steps):
    """On its grid of 100 steps and on a coarser one of 20, where both derive the step again."""
    process = anchor_alone(ddpm)
    ddpm.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    z0, z_t = (torch.randn(1, 1, 4, 4, generator=generator) for _ in range(2))
    roles = {"pixels": torch.full((1,), GENERATED)}
    for index in ddpm.timesteps[[0, steps // 2, steps - 2]].tolist():
        before = index - 100 // steps
        t, s = (torch.full((1,), (k + 1) / 100, dtype=torch.float64) for k in (index, before))
        mean, std = process.posterior(z_t, {"pixels": z0}, roles, t, s)
        drawn = ddpm.step(z0, index, z_t, generator=torch.Generator().manual_seed(5)).prev_sample
        noise = torch.randn(z_t.shape, generator=torch.Generator().manual_seed(5))
        assert float(std) == pytest.approx(float(ddpm._get_variance(index)) ** 0.5, rel=1e-4)
        torch.testing.assert_close(mean + float(std) * noise, drawn, rtol=1e-4, atol=1e-4)


def anchor_alone(scheduler) -> Process:
    schedule = schedule_from_alphas(scheduler.alphas.double())
    return Process(schedule, {}, {"pixels": 1.0}, {"pixels": slice(0, 1)}, "pixels", 1)


def test_marginal_of_the_anchor_alone_is_the_noised_sample_of_diffusers(ddpm):
    z0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([0, 40, 99])
    roles = {"pixels": torch.full((3,), GENERATED)}
    marginal = anchor_alone(ddpm).marginal({"pixels": z0}, roles, (index.double() + 1) / 100)
    torch.testing.assert_close(marginal.sample(noise), ddpm.add_noise(z0, noise, index), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [OWN, OVERLAPPING], ids=["own", "overlapping"])
@pytest.mark.parametrize("s", [0.0, 0.25, 0.5])
def test_transition_after_marginal_is_the_marginal_for_all_roles(layout, s):
    """Chapman-Kolmogorov for all 27 rows of roles; at s = 0, z is z_0 if that is generated, else 0."""
    process = make_process(layout, {"label": WeightsConfig("linear"), "mask": WeightsConfig(shape=0.3)}, 0.7)
    table = torch.cartesian_prod(*[torch.tensor(ALL)] * 3)
    roles = {name: table[:, i] for i, name in enumerate(layout)}
    codes = {name: code[:1].double().expand(27, -1, -1, -1) for name, code in four_points().codes.items()}
    t, before = torch.full((27,), 0.6, dtype=torch.float64), torch.full((27,), s, dtype=torch.float64)
    start = process.marginal(codes, roles, before).mean
    if s == 0:
        anchor = {"pixels": codes["pixels"]}
        start = process.place(anchor, {"pixels": (roles["pixels"] == GENERATED).double()})
    after = process.transition(start, codes, roles, t, before)
    a = process.step(t, before, roles).a
    variance = after.std.square() + a * process.schedule.sigma(before).square()
    want = process.marginal(codes, roles, t)
    assert_equal(after.mean, want.mean)
    assert_equal(variance, want.std.square())


def test_given_instances_have_constant_weight_absent_ones_none_and_generated_ones_vanish_at_noise():
    process = make_process(OWN, {"label": WeightsConfig("linear"), "mask": WeightsConfig("cosine")}, 0.7)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    for name in OWN:
        assert process.betas(t, {name: torch.full((3,), GIVEN)})[name].tolist() == [0.7, 0.7, 0.7]
        assert process.betas(t, {name: torch.full((3,), ABSENT)})[name].tolist() == [0, 0, 0]
        start, _, end = process.betas(t, {name: torch.full((3,), GENERATED)})[name].tolist()
        assert start == (1.0 if name == "pixels" else 0.0)  # b_0 = 0: at t = 0 only z_0 is there
        assert abs(end) < 0.004


def test_code_of_the_wrong_shape_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"code of label: got \(2, 2, 1, 2\), want 1 channels"):
        make_process(OWN).place({"label": torch.zeros(2, 2, 1, 2)}, {"label": torch.ones(2)})


def test_codes_in_half_precision_are_placed_in_float32():
    placed = make_process(OWN).place(
        {"label": torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)}, {"label": torch.full((1,), 0.1)}
    )
    assert placed.dtype == torch.float32
    assert placed[0, 1, 0, 0].item() == pytest.approx(0.1, rel=1e-6)


def test_channels_count_as_generated_where_any_instance_in_them_is():
    rows = roles_of(2)
    rows["pixels"], rows["label"] = torch.tensor([GIVEN, ABSENT]), torch.tensor([GENERATED, ABSENT])
    rows["mask"] = torch.tensor([ABSENT, ABSENT])
    assert make_process(OWN).generated_channels(rows).tolist() == [[False, True, False], [False] * 3]
    assert make_process(OVERLAPPING).generated_channels(rows).tolist() == [[True], [False]]
