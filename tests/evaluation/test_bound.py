"""The bound's terms against full sums over all steps, computed in another way on a model of four steps."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from mmdiff_ray.batch import Batch
from mmdiff_ray.diffusion.process import ABSENT, GENERATED
from mmdiff_ray.evaluation.bound import evaluate_bound
from mmdiff_ray.evaluation.context import Context, Figure
from mmdiff_ray.evaluation.run import joined
from tests import sprites as tiny

STEPS, COPIES, DRAWS, LACKING = 4, 20, 30, 3
CODED = ("pixels", "shapes", "shape", "factors")
"""The instances that are generated; `masked` is only ever given."""


@pytest.fixture(scope="module")
def context(sprites) -> Context:
    """Return an untrained model of four steps, and rows many times over, of which some lack their label."""
    job = tiny.job(sprites, f"schedule.steps={STEPS}", "seed=5")
    model = tiny.generator(job)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.denoiser.parameters():  # no layer starts at 0
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = joined(tiny.held_out(job, 12))
    present = {**batch.present, "shape": torch.arange(12) >= LACKING}
    many = Batch(
        ids=torch.arange(12 * COPIES),
        visits=batch.visits.repeat(COPIES),
        real=batch.real.repeat(COPIES),
        data={name: value.repeat(COPIES, *[1] * (value.ndim - 1)) for name, value in batch.data.items()},
        present={name: value.repeat(COPIES) for name, value in present.items()},
    )
    return Context(model, many)


@pytest.fixture(scope="module")
def figures(context) -> dict[str, Figure]:
    return {figure.key: figure for figure in evaluate_bound(context).figures}


@pytest.fixture(scope="module")
def once(context) -> Batch:
    """Return every row once."""
    return context.batch.rows(0, 12)


@pytest.fixture(scope="module")
def roles(once) -> dict[str, torch.Tensor]:
    every = {name: torch.where(once.present[name], GENERATED, ABSENT) for name in CODED}
    return {**every, "masked": torch.full((12,), ABSENT)}


@pytest.fixture(scope="module")
@torch.no_grad()
def looks(context, once, roles) -> dict[str, np.ndarray]:
    """Return nats of every row at every step under noise of the test's own: (DRAWS, STEPS, 12), by term."""
    denoiser, generator = context.denoiser, torch.Generator().manual_seed(1)
    process, codes = denoiser.process, denoiser.encode(once.data)
    found: dict[str, list] = {}
    for _ in range(DRAWS):
        for k in range(1, STEPS + 1):
            t, s = (torch.full((12,), step / STEPS, dtype=torch.float64) for step in (k, k - 1))
            noise = torch.randn(12, process.channels, *denoiser.size, generator=generator)
            z_t = process.marginal(codes, roles, t).sample(noise)
            predicted = denoiser(z_t, t, roles, codes, denoiser.conditions(once.data))
            for name in CODED:
                where = process.layout[name]
                nats = torch.zeros(12)
                if k > 1:
                    true, guess = (
                        process.posterior(z_t, of, roles, t, s)
                        for of in (codes, {**codes, **predicted.codes})
                    )
                    std = true.std[:, None, None, None].expand_as(z_t)
                    laws = (Normal(law.mean[:, where], std[:, where]) for law in (true, guess))
                    nats = kl_divergence(*laws).sum((1, 2, 3))
                found.setdefault(f"{name}/l1", []).append(nats * once.present[name])
                modality = denoiser.modalities[name]
                if name != "pixels":
                    nats = modality.negative_log_likelihood(predicted.heads[name], once.data[name])
                    found.setdefault(f"{name}/l2", []).append(nats * once.present[name])
            pixels, sigma = denoiser.modalities["pixels"], process.schedule.sigma(t)[:, None, None, None]
            of = predicted.codes["pixels"]
            nats = pixels.code_negative_log_likelihood(of, sigma.to(of), once.data["pixels"])
            found.setdefault("pixels/l3", []).append(nats)
    return {
        key: torch.stack(values).double().numpy().reshape(DRAWS, STEPS, 12) for key, values in found.items()
    }


def elements(context: Context, key: str) -> float:
    """Return the elements of an instance in the rows that have it, once over: of its code for L0 and L1."""
    name, term = key.split("/")
    layout, modality = context.denoiser.process.layout[name], context.denoiser.modalities[name]
    own = modality.elements if term in ("l2", "l3") else (layout.stop - layout.start) * 64
    return own * (12 - LACKING if name == "shape" else 12)


def check(figure: Figure, samples: np.ndarray, count: float, looks: int) -> None:
    """Compare a figure with the mean over what one look at a row can be. samples: (draws, steps, 12), as nats
    of a look; looks: how many the figure has of each of the 12 rows, each at a random one of the steps."""
    want = samples.mean((0, 1)).sum() / count
    ours = samples.reshape(-1, 12).var(0, ddof=1).sum() / looks
    theirs = samples.var(0, ddof=1).mean(0).sum() / samples[..., 0].size  # every step as often
    error = np.sqrt(ours + theirs) / count
    assert error < 0.04 * abs(want), "too few draws to tell"
    assert abs(figure.value - want) < 4 * error


@pytest.mark.parametrize("name", CODED)
def test_l1_is_the_sum_of_the_divergences_of_all_steps_but_the_last(context, figures, looks, name):
    samples = (STEPS - 1) * looks[f"{name}/l1"][:, 1:]
    check(figures[f"{name}/l1_nats"], samples, elements(context, f"{name}/l1"), 8 * COPIES)


@pytest.mark.parametrize("name", CODED)
def test_the_parts_of_l1_add_up_to_it(figures, name):
    parts = [figures[f"{name}/l1_{part}_nats"].value for part in ("eps", "s", "cross")]
    assert sum(parts) == pytest.approx(figures[f"{name}/l1_nats"].value, rel=1e-4)
    assert parts[0] > 0 and parts[1] > 0


@pytest.mark.parametrize("name", CODED[1:])
def test_l2_is_the_mean_over_the_same_steps(context, figures, looks, name):
    samples = looks[f"{name}/l2"][:, 1:]
    check(figures[f"{name}/l2_nats"], samples, elements(context, f"{name}/l2"), 8 * COPIES)


def test_l3_is_at_the_last_step_alone(context, figures, looks):
    check(figures["pixels/l3_nats"], looks["pixels/l3"][:, :1], elements(context, "pixels/l3"), COPIES)


@pytest.mark.parametrize("name", CODED)
def test_l0_is_the_divergence_of_the_first_step_from_the_prior(context, figures, once, roles, name):
    process = context.denoiser.process
    law = process.marginal(context.denoiser.encode(once.data), roles, torch.ones(12, dtype=torch.float64))
    mean = law.mean.double()
    std = law.std.double()[:, None, None, None].expand_as(mean)
    nats = kl_divergence(Normal(mean, std), Normal(0.0, 1.0))[:, process.layout[name]].sum((1, 2, 3))
    want = float((nats * once.present[name]).sum()) / elements(context, f"{name}/l0")
    assert figures[f"{name}/l0_nats"].value == pytest.approx(want, rel=1e-3, abs=1e-7)


def test_every_term_is_tallied_by_rows(context, figures):
    first, lacking = context.batch.rows(0, 12), np.arange(12 * COPIES) % 12 < LACKING
    again = evaluate_bound(Context(context.model, first)).figures
    assert {figure.key for figure in again} == set(figures)
    for figure in again:
        tally, whole = figure.tallies["model"], figures[figure.key].tallies["model"]
        assert tally.value == figure.value and figure.bound and figure.rows == len(tally) == 12
        np.testing.assert_allclose(tally.numerator, whole.numerator[:12], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(tally.denominator, whole.denominator[:12])
    label = figures["shape/l1_nats"].tallies["model"]
    assert not label.numerator[lacking].any() and (label.denominator[~lacking] > 0).all()
    assert not label.denominator[lacking].any()


def test_an_instance_that_no_row_has_has_no_terms(context):
    batch = context.batch.rows(0, 12)
    batch = dataclasses.replace(batch, present={**batch.present, "shape": torch.zeros(12, dtype=torch.bool)})
    keys = {figure.key for figure in evaluate_bound(Context(context.model, batch)).figures}
    assert not any(key.startswith("shape/") for key in keys) and "pixels/l1_nats" in keys
