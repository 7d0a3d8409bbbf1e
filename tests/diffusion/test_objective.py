"""The objective: what it counts, how it adds up, and its simplified weightings."""

import math

import pytest
import torch
from torch import Tensor

from mmdiff_ray.config import CoefficientsConfig, LossConfig
from mmdiff_ray.diffusion.objective import Objective, Terms
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN, Process
from mmdiff_ray.models.denoiser import anchor_code
from tests.diffusion.ideal import OVERLAPPING, make_process
from tests.diffusion.rows import ALL_ROLES, CELLS, EVERYTHING, NAMES, STEPS, Rows, make_config, make_objective

# --- counts -------------------------------------------------------------------------------------------------


def test_counts_are_of_what_is_generated_alone():
    """Own channels: 3 of pixels, 2 of the label, 1 of the mask; a row of padding is absent everywhere."""
    objective = make_objective(make_config())
    roles = {
        "pixels": torch.tensor([GENERATED, GIVEN, ABSENT, ABSENT]),
        "label": torch.tensor([GENERATED, GENERATED, GIVEN, ABSENT]),
        "mask": torch.tensor([GENERATED, ABSENT, GENERATED, ABSENT]),
    }
    assert {key: int(value) for key, value in objective.counts(roles, CELLS).items()} == {
        **{f"{term}/pixels": 3 * CELLS for term in ("l0", "l1", "l3")},
        **{f"{term}/label": 2 * 2 * CELLS for term in ("l0", "l1")},
        **{f"{term}/mask": 2 * CELLS for term in ("l0", "l1")},
        "l2/label": 2,
        "l2/mask": 2 * CELLS,
    }


def test_overlapping_channels_count_once_and_where_only_a_guest_is_generated():
    """The label lies in two of the three channels of the pixels, the mask in one."""
    objective = make_objective(make_config("pixels"))
    roles = {
        "pixels": torch.tensor([GENERATED, GIVEN, ABSENT]),
        "label": torch.tensor([GENERATED, GENERATED, ABSENT]),
        "mask": torch.tensor([GENERATED, ABSENT, GENERATED]),
    }
    counts = objective.counts(roles, CELLS)
    assert "l1/label" not in counts
    assert counts["l1/pixels"] == (3 + 2 + 1) * CELLS


@pytest.mark.parametrize(("guest", "host"), [("label", "mask"), ("mask", "label")])
def test_every_channel_has_one_owner_in_whichever_order_host_and_guest_are_named(guest, host):
    layout = {"pixels": slice(0, 3), guest: slice(3, 4), host: slice(3, 6)}
    owners = Objective(make_process(layout), LossConfig(), {}).owners
    owned = [channel for where in owners.values() for channel in range(where.start, where.stop)]
    assert sorted(owned) == list(range(6))
    assert set(owners) == {"pixels", host}


def test_anchor_owns_channels_that_a_guest_shares_in_full():
    assert list(Objective(make_process(OVERLAPPING), LossConfig(), {}).owners) == ["pixels"]


@pytest.mark.parametrize("weighting", ["v", "elbo"])
@pytest.mark.parametrize("channels", ["own", "pixels"])
def test_channels_that_carry_nothing_generated_add_nothing(channels, weighting):
    """Wrong predictions of what is given or absent leave every term at 0, whatever mix of them a row is."""
    objective = make_objective(make_config(channels, weighting=weighting))
    rows = Rows(objective, [row for row in ALL_ROLES if GENERATED not in row])
    assert all(float(value) == 0 for value in rows.sums(objective).values())
    assert all(float(value) == 0 for value in objective.counts(rows.roles, CELLS).values())


@pytest.mark.parametrize("weighting", ["v", "eps", "x0", "min_snr", "elbo"])
@pytest.mark.parametrize("channels", ["own", "pixels"])
def test_terms_have_a_sum_for_every_count_and_are_finite_for_all_rows_of_roles(channels, weighting):
    objective = make_objective(make_config(channels, weighting=weighting))
    rows = Rows(objective, ALL_ROLES)
    sums, counts = rows.sums(objective), objective.counts(rows.roles, CELLS)
    assert set(sums) == set(counts)
    assert all(math.isfinite(float(value)) for value in sums.values())


# --- simplified weightings ----------------------------------------------------------------------------------


def anchor_alone(weighting: str, **loss) -> tuple[Objective, Rows, Tensor]:
    """Return an objective of images alone, rows at all 10 steps, and the wrong z_0 that is predicted."""
    objective = make_objective(make_config(anchor_only=True, weighting=weighting, **loss))
    rows = Rows(objective, EVERYTHING)
    return objective, rows, rows.heads["pixels"]


def velocity(process: Process, rows: Rows, code: Tensor) -> Tensor:
    """Return v = sqrt(abar) eps - sigma z_0 of a code, with the noise that z_t then holds."""
    signal, sigma = (
        x.float().reshape(-1, 1, 1, 1)
        for x in (process.schedule.abar(rows.t).sqrt(), process.schedule.sigma(rows.t))
    )
    return signal * (rows.z_t - signal * code) / sigma - sigma * code


@pytest.mark.parametrize("weighting", ["v", "eps", "x0"])
def test_simplified_weighting_of_the_anchor_alone_is_the_squared_error_of_what_it_is_named_after(weighting):
    objective, rows, predicted = anchor_alone(weighting)
    process, codes = objective.process, rows.codes["pixels"]
    want = {
        "v": lambda: velocity(process, rows, codes) - velocity(process, rows, predicted),
        "eps": lambda: rows.noise - process.noise(rows.z_t, {"pixels": predicted}, rows.roles, rows.t),
        "x0": lambda: codes - predicted,
    }[weighting]()
    sums = rows.sums(objective)
    total = float(sums["l1/pixels"] + sums["l3/pixels"])
    assert total == pytest.approx(float(want.square().sum()), rel=1e-4)
    assert float(sums["l3/pixels"]) == pytest.approx(float(want[:1].square().sum()), rel=1e-4)


def test_min_snr_weight_is_the_signal_to_noise_ratio_up_to_gamma():
    """Hang et al., 2023: the x0 error times min(SNR, gamma)."""
    objective, rows, predicted = anchor_alone("min_snr", gamma=2.0)
    abar = objective.process.schedule.abar(rows.t)
    weight = (abar / (1 - abar)).clamp(max=2.0).float()
    want = (weight * (rows.codes["pixels"] - predicted).square().sum((1, 2, 3))).sum()
    sums = rows.sums(objective)
    assert float(sums["l1/pixels"] + sums["l3/pixels"]) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
def test_anchor_code_inverts_what_the_head_predicts(prediction):
    objective, rows, _ = anchor_alone("v")
    process, codes = objective.process, rows.codes["pixels"]
    raw = {"v": velocity(process, rows, codes), "eps": rows.noise, "x0": codes}[prediction]
    found = anchor_code(prediction, raw, rows.z_t, process, rows.t)
    torch.testing.assert_close(found, codes, rtol=1e-3, atol=2e-3)


def test_eps_weighting_in_overlapping_channels_is_the_squared_error_of_the_noise():
    """The prediction of every signal's code together makes one prediction of the noise."""
    objective = make_objective(make_config("pixels", weighting="eps"))
    rows = Rows(objective, EVERYTHING)
    predicted = {name: objective.modalities[name].expected_code(head) for name, head in rows.heads.items()}
    eps = objective.process.noise(rows.z_t, predicted, rows.roles, rows.t)
    sums = rows.sums(objective)
    want = (rows.noise - eps).square().sum()
    assert float(sums["l1/pixels"] + sums["l3/pixels"]) == pytest.approx(float(want), rel=1e-3)


def test_channels_without_the_anchor_never_weigh_more_than_their_cap():
    """Weights of the squared code error in the label's own channels, by setting only that code wrong by 1."""
    objective = make_objective(make_config(weighting="v", gamma=2.0, channel_cap=3.0))
    rows = Rows(objective, EVERYTHING)
    predicted = {**rows.codes, "label": rows.codes["label"] + 1}
    process = objective.process
    snr = (process.betas(rows.t, rows.roles)["label"] / process.schedule.sigma(rows.t)).square()
    found = objective.row_sums(rows.z_t, rows.t, rows.roles, rows.codes, rows.data, predicted, rows.heads)
    want = (snr + 1).clamp(max=3.0)[1:].sum() * 2 * CELLS  # the first row is at the last step
    assert float(found["l1/label"].sum()) == pytest.approx(float(want), rel=1e-4)
    assert (snr + 1).max() > 3


# --- the total ----------------------------------------------------------------------------------------------


def gradients(
    objective: Objective, rows: Rows, parts: list[slice], counts: Terms
) -> tuple[float, dict[str, Tensor]]:
    """Return the total over parts of a batch, and its gradient with respect to the heads."""
    leaves = {name: head.clone().requires_grad_() for name, head in rows.heads.items()}
    rows.heads = leaves
    total = torch.stack([objective.total(rows.sums(objective, part), counts) for part in parts]).sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    return float(total.detach()), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("weighting", ["v", "elbo"])
@pytest.mark.parametrize("parts", [[(0, 13), (13, 27)], [(i, i + 1) for i in range(27)]], ids=["2", "27"])
def test_total_and_gradients_do_not_depend_on_the_split_into_micro_batches(parts, weighting):
    """With counts of the whole batch, the parts' losses add up to the loss of the whole."""
    objective = make_objective(
        make_config(weighting=weighting, coefficients={"l0": 0.3, "l2": 0.7}, modalities={"mask": 0.1})
    )
    rows = Rows(objective, ALL_ROLES)
    counts = objective.counts(rows.roles, CELLS)
    whole, whole_gradients = gradients(objective, rows, [slice(0, 27)], counts)
    rows.heads = {name: head.detach() for name, head in rows.heads.items()}
    split, split_gradients = gradients(objective, rows, [slice(*part) for part in parts], counts)
    assert split == pytest.approx(whole, rel=1e-5)
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(
            split_gradients[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())
        )


@pytest.mark.parametrize("weighting", ["v", "eps", "x0", "min_snr", "elbo"])
@pytest.mark.parametrize("roles", [(ABSENT,) * 3, (GIVEN, ABSENT, GIVEN), (GIVEN, GENERATED, ABSENT)])
def test_count_of_zero_gives_no_loss_and_finite_gradients_to_every_head(roles, weighting):
    objective = make_objective(make_config(weighting=weighting))
    rows = Rows(objective, [roles] * STEPS)
    total, found = gradients(objective, rows, [slice(0, STEPS)], objective.counts(rows.roles, CELLS))
    assert math.isfinite(total)
    assert (total != 0) == (GENERATED in roles)
    for name, gradient in found.items():
        assert gradient.isfinite().all()
        assert bool(gradient.any()) == (roles[NAMES.index(name)] == GENERATED)


def test_total_is_every_mean_times_its_coefficients():
    config = make_config(
        coefficients={"l0": 0.5, "l1": 2.0, "l2": 3.0, "l3": 5.0},
        modalities={"mask": 0.1},
        channels={"label": 0.2},
    )
    objective = make_objective(config)
    keys = ["l0/pixels", "l0/label", "l1/pixels", "l1/label", "l2/label", "l2/mask", "l3/pixels"]
    counts = {key: torch.tensor(i + 1.0, dtype=torch.float64) for i, key in enumerate(keys)}
    sums = {key: (i + 2) * counts[key].float() for i, key in enumerate(keys)}  # means of 2, 3, .. 8
    want = 0.5 * 2 + 0.5 * 3 + 2 * 4 + 2 * 0.2 * 5 + 3 * 6 + 3 * 0.1 * 7 + 5 * 8
    assert float(objective.total(sums, counts)) == pytest.approx(want)


def test_default_total_leaves_out_the_prior_which_nothing_learned_can_change():
    assert CoefficientsConfig().l0 == 0
