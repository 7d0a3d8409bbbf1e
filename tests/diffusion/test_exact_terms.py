"""The exact terms L0, L1 and L3 against divergences and likelihoods computed in other ways."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from mmdiff_ray.config import WeightsConfig
from mmdiff_ray.diffusion.objective import last_step_nats, posterior_nats
from mmdiff_ray.diffusion.process import GENERATED, GIVEN
from tests.diffusion.ideal import OVERLAPPING, OWN, make_process
from tests.diffusion.rows import ALL_ROLES, EVERYTHING, STEPS, Rows, make_config, make_objective


@pytest.mark.parametrize("layout", [OWN, OVERLAPPING], ids=["own", "overlapping"])
def test_exact_l1_is_the_divergence_of_two_gaussians_for_all_roles(layout):
    """By torch's own KL of the posteriors of true and of predicted codes, in the carried channels."""
    process = make_process(layout, {"label": WeightsConfig(shape=0.5), "mask": WeightsConfig("linear")}, 0.7)
    table, generator = torch.tensor(ALL_ROLES), torch.Generator().manual_seed(0)
    roles = {name: table[:, i] for i, name in enumerate(layout)}
    codes, predicted = (
        {name: torch.randn(27, 1, 1, 2, dtype=torch.float64, generator=generator) for name in layout}
        for _ in range(2)
    )
    for name, role in roles.items():  # what is given is known
        predicted[name] = torch.where((role == GIVEN)[:, None, None, None], codes[name], predicted[name])
    z_t = torch.randn(27, process.channels, 1, 2, dtype=torch.float64, generator=generator)
    for t, s in ((1.0, 0.9), (0.5, 0.3), (0.02, 0.01)):
        at, before = (torch.full((27,), x, dtype=torch.float64) for x in (t, s))
        true = process.posterior(z_t, codes, roles, at, before)
        guess = process.posterior(z_t, predicted, roles, at, before)
        std = true.std[:, None, None, None].expand_as(z_t)
        want = kl_divergence(Normal(true.mean, std), Normal(guess.mean, std)).sum(3)[:, :, 0]
        want = want * process.generated_channels(roles)
        found = posterior_nats(process, at, before, roles, codes, predicted)
        for name, where in layout.items():
            parts = found[name]
            torch.testing.assert_close(parts["total"], want[:, where].sum(1), rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(parts["eps"] + parts["s"] + parts["cross"], parts["total"])


def test_kl_of_the_posteriors_matches_an_average_over_samples():
    """The closed form against log q - log p averaged over draws from q, within 5 standard errors."""
    process = make_process(OVERLAPPING, {"label": WeightsConfig(shape=0.5)})
    rows, generator = 50_000, torch.Generator().manual_seed(0)
    codes = {
        name: torch.full((rows, 1, 1, 1), value, dtype=torch.float64)
        for name, value in zip(OWN, (0.3, -1.0, 1.0), strict=True)
    }
    predicted = {**codes, "label": codes["label"] + 0.4}
    roles = {name: torch.full((rows,), GENERATED) for name in OWN}
    t, s = (torch.full((rows,), x, dtype=torch.float64) for x in (0.5, 0.45))
    z_t = torch.full((rows, 1, 1, 1), 0.2, dtype=torch.float64)
    true = process.posterior(z_t, codes, roles, t, s)
    guess = process.posterior(z_t, predicted, roles, t, s)
    drawn = true.sample(torch.randn(z_t.shape, generator=generator, dtype=torch.float64))
    std = true.std[:, None, None, None]
    gap = Normal(true.mean, std).log_prob(drawn) - Normal(guess.mean, std).log_prob(drawn)
    nats = float(posterior_nats(process, t, s, roles, codes, predicted)["pixels"]["total"][0])
    assert nats > 0.01
    assert abs(float(gap.mean()) - nats) < 5 * float(gap.std()) / rows**0.5


@pytest.mark.parametrize("channels", ["own", "pixels"])
def test_elbo_weighting_is_an_unbiased_estimate_of_the_exact_sums(channels):
    """The mean over all steps that t can be is the sum over steps: all KLs for L1, the last step for L3."""
    objective = make_objective(make_config(channels, weighting="elbo"))
    rows, process = Rows(objective, EVERYTHING), objective.process
    for tensors in (rows.codes, rows.data, rows.heads):  # one row of data, at each of its 10 steps
        tensors.update({name: value[:1].expand_as(value) for name, value in tensors.items()})
    rows.z_t = process.marginal(rows.codes, rows.roles, rows.t).sample(rows.noise)
    sums = rows.sums(objective)
    predicted = {name: objective.modalities[name].expected_code(head) for name, head in rows.heads.items()}
    exact = posterior_nats(process, rows.t, rows.t - 1 / STEPS, rows.roles, rows.codes, predicted)
    for name in objective.owners:
        assert float(sums[f"l1/{name}"]) / STEPS == pytest.approx(
            float(exact[name]["total"][1:].sum()), rel=1e-5
        )
    pixels = objective.modalities["pixels"]
    last = last_step_nats(process, pixels, rows.t[:1], rows.data["pixels"][:1], predicted["pixels"][:1])
    assert float(sums["l3/pixels"]) / STEPS == pytest.approx(float(last), rel=1e-5)


def test_last_step_is_the_discretised_gaussian_of_scipy():
    """Every grey level takes the mass up to the middle of its neighbours, the outer two all beyond."""
    objective = make_objective(make_config(anchor_only=True))
    pixels, t = objective.modalities["pixels"], torch.tensor([1 / STEPS], dtype=torch.float64)
    sigma = float(objective.process.schedule.sigma(t))
    data = torch.tensor([0, 1, 100, 255]).repeat(12).reshape(1, 3, 4, 4).to(torch.uint8)
    mean = pixels.encode(data) + sigma * torch.linspace(-4, 4, 48).reshape(1, 3, 4, 4)
    found = last_step_nats(objective.process, pixels, t, data, mean)
    level = data.double().numpy() / 127.5 - 1
    low, high = level - 1 / 255, level + 1 / 255
    low[data.numpy() == 0], high[data.numpy() == 255] = -math.inf, math.inf
    law = stats.norm(mean.double().numpy() * 0.5, sigma * 0.5)  # codes are pixels over 0.5
    mass = torch.from_numpy(law.cdf(high) - law.cdf(low))
    assert float(found) == pytest.approx(float(-mass.log().sum()), rel=1e-4)


def test_prior_term_is_the_divergence_from_the_standard_normal_without_what_is_given():
    objective = make_objective(make_config("pixels"))
    rows, process = Rows(objective, ALL_ROLES), objective.process
    end = torch.ones(27, dtype=torch.float64)
    generated = process.only(rows.roles, GENERATED)
    mean, std = process.marginal(rows.codes, generated, end)
    law = Normal(mean.double(), std[:, None, None, None].expand_as(mean))
    nats = kl_divergence(law, Normal(torch.zeros_like(law.mean), torch.ones_like(law.mean)))
    want = (nats * process.generated_channels(rows.roles)[:, :, None, None]).sum()
    assert float(objective.prior_sums(rows.codes, rows.roles)["l0/pixels"]) == pytest.approx(
        float(want), rel=1e-3
    )


def test_decoders_are_counted_where_their_modality_is_generated():
    objective = make_objective(make_config())
    rows = Rows(objective, ALL_ROLES)
    picked = rows.roles["label"] == GENERATED
    nats = -rows.heads["label"].log_softmax(1).gather(1, rows.data["label"][:, None])[:, 0]
    sums = rows.sums(objective)
    assert float(sums["l2/label"]) == pytest.approx(float(nats[picked].sum()), rel=1e-5)
    assert "l2/pixels" not in sums
