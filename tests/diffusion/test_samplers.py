"""The samplers against a trusted library, exact flows of Gaussian data, and their promised orders."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from scipy.integrate import solve_ivp
from torch import Tensor

from mmdiff_ray import registry
from mmdiff_ray.config import WeightsConfig
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN, Prediction, Process
from mmdiff_ray.diffusion.samplers import State, known_codes, walk
from mmdiff_ray.diffusion.schedule import schedule_from_alphas
from mmdiff_ray.models.denoiser import anchor_code
from tests.diffusion.ideal import OVERLAPPING, OWN, make_process, roles_of

BETAS = np.linspace(1e-3, 0.2, 100, dtype=np.float32)
PROFILES = {"label": WeightsConfig(shape=0.5), "mask": WeightsConfig("sigmoid", scale=1.5, shape=4.0)}
START, END = 0.9, 0.1


def anchor_alone(scheduler) -> Process:
    schedule = schedule_from_alphas(scheduler.alphas.double())
    return Process(schedule, {}, {"pixels": 1.0}, {"pixels": slice(0, 1)}, "pixels", 1)


def made_by(scheduler_class, **options):
    return scheduler_class(
        num_train_timesteps=100, trained_betas=BETAS, timestep_spacing="trailing", **options
    )


def toy_network(z: Tensor, t: Tensor) -> Tensor:
    """Return some smooth function of z and t, in place of a network."""
    return torch.sin(2 * z + t.to(z.dtype).reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
def test_walk_of_the_anchor_alone_is_the_ddim_of_diffusers_for_every_prediction(prediction):
    """The whole walk: 20 steps from noise, then their step to t = 0, which is the last prediction."""
    kinds = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}
    theirs = made_by(DDIMScheduler, prediction_type=kinds[prediction], clip_sample=False)
    theirs.set_timesteps(20)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    z = noise
    for index in theirs.timesteps:
        t = (index + 1).double().expand(2) / 100
        z = theirs.step(toy_network(z, t), int(index), z, eta=0.0).prev_sample

    process = anchor_alone(theirs)

    def predict(z_t, t, roles):
        code = anchor_code(prediction, toy_network(z_t, t), z_t, process, t)
        return Prediction({"pixels": code}, {})

    roles = {"pixels": torch.full((2,), GENERATED)}
    last, _ = walk(process, predict, lambda purpose: noise, {}, roles, 20, "ddim")
    torch.testing.assert_close(last.codes["pixels"], z, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_first_order_walk_of_the_anchor_alone_is_the_first_order_dpm_solver_of_diffusers():
    """Their second order extrapolates in log signal-to-noise ratio, ours in beta / sigma: other numbers."""
    theirs = made_by(
        DPMSolverMultistepScheduler, solver_order=1, prediction_type="sample", final_sigmas_type="zero"
    )
    theirs.set_timesteps(10)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    z = noise
    for index in theirs.timesteps:
        z = theirs.step(toy_network(z, (index + 1).double().expand(2) / 100), index, z).prev_sample
    roles = {"pixels": torch.full((2,), GENERATED)}
    last, _ = walk(
        anchor_alone(theirs),
        lambda z, t, roles: Prediction({"pixels": toy_network(z, t)}, {}),
        lambda purpose: noise,
        {},
        roles,
        10,
        "ddim",
    )
    torch.testing.assert_close(last.codes["pixels"], z, rtol=1e-3, atol=1e-3)


class GaussianDenoiser:
    """The exact expected codes where the three codes of every cell are jointly Gaussian: linear in z_t."""

    mean = torch.tensor([0.5, -0.4, 0.3], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.6, -0.3], [0.6, 0.8, 0.1], [-0.3, 0.1, 0.5]], dtype=torch.float64)

    def __init__(self, process: Process) -> None:
        self.process = process

    def signal(self, t: Tensor) -> Tensor:
        """Return the matrix from codes to z at one time, (C, 3)."""
        betas = self.process.betas(t.reshape(1), roles_of(1))
        rows = torch.eye(self.process.channels, dtype=torch.float64)
        return torch.stack(
            [rows[where.start] * betas[name] for name, where in self.process.layout.items()], 1
        )

    def codes(self, z: Tensor, t: Tensor) -> Tensor:
        """Return E[codes | z_t = z], (..., 3). z: (..., C); t: a number."""
        a = self.signal(t)
        covariance = a @ self.covariance @ a.T + self.process.schedule.sigma(t).square() * torch.eye(len(a))
        gain = self.covariance @ a.T @ torch.linalg.inv(covariance)
        return self.mean + (z - a @ self.mean) @ gain.T

    def __call__(self, z: Tensor, t: Tensor, roles) -> Prediction:
        codes = self.codes(z.movedim(1, -1), t[0]).movedim(-1, 1)
        return Prediction({name: codes[:, i : i + 1] for i, name in enumerate(self.process.layout)}, {})


def flow(denoiser: GaussianDenoiser, z: Tensor) -> Tensor:
    """Return where the probability flow carries z, (B, C), from START to END, by adaptive Runge-Kutta.

    dz/dt = sum_k beta_k' c^_k + sigma' eps^, the derivatives by automatic differentiation.
    """
    process = denoiser.process

    def velocity(t: float, flat: np.ndarray) -> np.ndarray:
        time = torch.tensor(t, dtype=torch.float64)
        signal = denoiser.signal(time)
        change = torch.autograd.functional.jacobian(denoiser.signal, time)
        sigma, sigma_change = torch.autograd.functional.jvp(
            process.schedule.sigma, time, torch.ones_like(time)
        )
        value = torch.from_numpy(flat).reshape(z.shape)
        codes = denoiser.codes(value, time)
        eps = (value - codes @ signal.T) / sigma
        return (codes @ change.T + sigma_change * eps).numpy().ravel()

    solved = solve_ivp(velocity, (START, END), z.numpy().ravel(), rtol=1e-8, atol=1e-10)
    return torch.from_numpy(solved.y[:, -1]).reshape(z.shape)


def one_channel_flow(denoiser: GaussianDenoiser, z: Tensor) -> Tensor:
    """Return the same in one dimension, where the flow between two Gaussians can only shift and scale."""
    times = torch.tensor([START, END], dtype=torch.float64)
    (m_t, m_s), (v_t, v_s) = zip(
        *((a @ denoiser.mean, a @ denoiser.covariance @ a.T) for a in map(denoiser.signal, times)),
        strict=True,
    )
    v_t, v_s = (
        v + denoiser.process.schedule.sigma(t).square() for v, t in zip((v_t, v_s), times, strict=True)
    )
    return m_s + (v_s / v_t).sqrt() * (z - m_t)


def sampled_flow(denoiser: GaussianDenoiser, z: Tensor, sampler: str, steps: int) -> Tensor:
    """Return where a sampler's steps carry z from START to END."""
    move, process, roles = registry.look_up("sampler", sampler), denoiser.process, roles_of(len(z))
    times = torch.linspace(START, END, steps + 1, dtype=torch.float64)[:, None].expand(-1, len(z))
    state = State(z[:, :, None, None], times[0])
    for s in times[1:]:
        codes = denoiser(state.z, state.t, roles).codes
        state = State(move(process, state, s, codes, roles, no_noise), s, codes, state.t)
    return state.z[:, :, 0, 0]


def no_noise() -> Tensor:
    raise AssertionError("this sampler draws no noise")


@pytest.fixture(scope="module", params=["own", "overlapping"])
def exact_flow(request) -> tuple[GaussianDenoiser, Tensor, Tensor]:
    """Return a denoiser of three correlated signals of different profiles, z at START, and z at END."""
    layout, exact = {"own": (OWN, flow), "overlapping": (OVERLAPPING, one_channel_flow)}[request.param]
    denoiser = GaussianDenoiser(make_process(layout, PROFILES))
    shape = (16, denoiser.process.channels)
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return denoiser, z, exact(denoiser, z)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm2", 2)])
def test_sampler_converges_to_the_exact_flow_with_its_order(exact_flow, sampler, order):
    """The error halves, or quarters, from 80 to 160 steps."""
    denoiser, z, want = exact_flow
    coarse, fine = (
        float((sampled_flow(denoiser, z, sampler, n) - want).square().mean().sqrt()) for n in (80, 160)
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    assert fine < {"ddim": 2e-2, "dpm2": 1e-3}[sampler]


def test_both_exact_flows_agree_in_one_channel():
    denoiser = GaussianDenoiser(make_process(OVERLAPPING, PROFILES))
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(flow(denoiser, z), one_channel_flow(denoiser, z), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [OWN, OVERLAPPING], ids=["own", "overlapping"])
def test_ancestral_steps_keep_the_exact_law_of_gaussian_data(layout):
    """From the exact marginal at t = 0.9 to that at 0.1 in 100 steps.

    Mean and variance are within 5 standard errors and the 2 % that the steps' size costs.
    """
    rows, generator = 20_000, torch.Generator().manual_seed(0)
    denoiser = GaussianDenoiser(make_process(layout, PROFILES))
    process, roles = denoiser.process, roles_of(rows)
    times = torch.linspace(START, END, 101, dtype=torch.float64)

    def law(t: Tensor) -> tuple[Tensor, Tensor]:
        a = denoiser.signal(t)
        noise = process.schedule.sigma(t).square() * torch.eye(len(a), dtype=torch.float64)
        return a @ denoiser.mean, a @ denoiser.covariance @ a.T + noise

    def draw() -> Tensor:
        return torch.randn(rows, process.channels, 1, 1, dtype=torch.float64, generator=generator)

    mean, covariance = law(times[0])
    z = mean[:, None, None] + torch.einsum("cd,bdhw->bchw", torch.linalg.cholesky(covariance), draw())
    for t, s in pairwise(times):
        state = State(z, t.expand(rows))
        codes = denoiser(z, state.t, roles).codes
        z = registry.look_up("sampler", "ancestral")(process, state, s.expand(rows), codes, roles, draw)
    mean, covariance = law(times[-1])
    variance, found = covariance.diagonal(), z[:, :, 0, 0]
    assert ((found.mean(0) - mean).abs() < 5 * (variance / rows).sqrt() + 0.02).all()
    assert ((found.var(0) / variance - 1).abs() < 5 * (2 / rows) ** 0.5 + 0.02).all()


def test_walk_asks_for_as_many_predictions_as_steps_at_even_times():
    asked = []

    def predict(z, t, roles):
        asked.append(t[0].item())
        return Prediction({name: torch.zeros(1, 1, 1, 2) for name in OWN}, {})

    for steps, times in ((1, [1.0]), (4, [1.0, 0.75, 0.5, 0.25])):
        asked.clear()
        walk(make_process(OWN), predict, lambda purpose: torch.zeros(1, 3, 1, 2), {}, roles_of(1), steps)
        assert asked == pytest.approx(times)


def test_walk_starts_at_the_weight_of_what_is_given():
    """The prior is N(B_T, I), B_T the given codes times kappa; only in the rows where they are given."""
    seen = []

    def predict(z, t, roles):
        seen.append(z)
        return Prediction({name: torch.zeros(3, 1, 1, 2) for name in OWN}, {})

    given = {"label": torch.full((3, 1, 1, 2), 5.0)}
    roles = {**roles_of(3), "label": torch.tensor([GIVEN, ABSENT, GENERATED])}
    last, _ = walk(make_process(OWN, kappa=0.7), predict, lambda p: torch.zeros(3, 3, 1, 2), given, roles, 1)
    assert seen[0][:, :, 0, 0].tolist() == [[0, 3.5, 0], [0, 0, 0], [0, 0, 0]]
    assert last.codes["label"][:, 0, 0, 0].tolist() == [5, 0, 0]


def test_noise_of_every_step_has_its_own_purpose():
    purposes = []

    def noise(purpose):
        purposes.append(purpose)
        return torch.zeros(1, 3, 1, 2)

    def predict(z, t, roles):
        return Prediction({name: torch.zeros(1, 1, 1, 2) for name in OWN}, {})

    walk(make_process(OWN), predict, noise, {}, roles_of(1), 4, "ancestral")
    assert purposes == ["prior", "step 0", "step 1", "step 2"]


def test_known_codes_are_the_given_ones_bit_for_bit_and_only_where_given():
    given = {"label": torch.rand(2, 1, 1, 2), "hint": torch.rand(2, 1, 1, 2)}
    predicted = {"label": torch.rand(2, 1, 1, 2), "pixels": torch.rand(2, 1, 1, 2)}
    roles = {"label": torch.tensor([GIVEN, GENERATED]), "hint": torch.tensor([GIVEN, ABSENT])}
    known = known_codes(predicted, given, roles)
    assert torch.equal(known["label"][0], given["label"][0])
    assert torch.equal(known["label"][1], predicted["label"][1])
    assert torch.equal(known["hint"], torch.stack([given["hint"][0], torch.zeros(1, 1, 2)]))
    assert known["pixels"] is predicted["pixels"]


@pytest.mark.parametrize("layout", [OWN, OVERLAPPING], ids=["own", "overlapping"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm2"])
def test_true_codes_lead_along_the_marginal_whatever_the_size_of_the_steps(layout, sampler):
    """With the truth predicted, z_s is the marginal's mean plus sigma_s times the same noise, at once."""
    process = make_process(layout, PROFILES, 0.7)
    generator = torch.Generator().manual_seed(0)
    codes = {name: torch.randn(3, 1, 1, 2, dtype=torch.float64, generator=generator) for name in layout}
    roles = {
        name: torch.tensor(row) for name, row in zip(layout, ([2, 2, 1], [2, 1, 2], [2, 0, 2]), strict=True)
    }
    noise = torch.randn(3, process.channels, 1, 2, dtype=torch.float64, generator=generator)
    now, then = torch.full((3,), 0.8, dtype=torch.float64), torch.full((3,), 0.2, dtype=torch.float64)
    state = State(process.marginal(codes, roles, now).sample(noise), now, codes, now + 0.1)
    z = registry.look_up("sampler", sampler)(process, state, then, codes, roles, no_noise)
    torch.testing.assert_close(z, process.marginal(codes, roles, then).sample(noise), rtol=1e-12, atol=1e-12)
