"""How given codes reach the network in place, and the cells that are known exactly."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff_ray.batch import Batch
from mmdiff_ray.diffusion.objective import Objective
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN, Prediction
from mmdiff_ray.models.denoiser import Denoiser
from mmdiff_ray.sampling.generator import sample
from mmdiff_ray.tasks import Tasks
from mmdiff_ray.training.loss import TrainingLoss
from tests.modalities import tiny
from tests.models.test_denoiser import OVERLAPPING, all_roles, build, mixed_roles, noise, noisy, times

APART = ("given.exact=false",)


def seen(
    denoiser: Denoiser, batch: Batch, roles: dict[str, Tensor], z_t: Tensor
) -> tuple[Tensor, Prediction]:
    """Return the network's input, (B, width, H, W), and the prediction."""
    inputs: dict[str, Tensor] = {}
    hook = denoiser.backbone.register_forward_pre_hook(lambda module, given: inputs.update(x=given[0]))
    with torch.no_grad():
        predicted = denoiser(
            z_t, times(), roles, denoiser.encode(batch.data), denoiser.conditions(batch.data)
        )
    hook.remove()
    return inputs["x"], predicted


@pytest.mark.parametrize("layout", [(), APART, OVERLAPPING])
@pytest.mark.parametrize("mode", ["in_place", "u_plus_code"])
def test_no_input_channel_holds_noise_that_carries_nothing(mode, layout):
    """Another draw of the noise changes the channels that carry something generated, and no others."""
    denoiser, batch = build(f"given.input={mode}", "given.zero_unused=true", *layout)
    roles = mixed_roles(denoiser)
    codes = denoiser.encode(batch.data)
    marginal = denoiser.process.marginal(codes, roles, times())
    draws = [marginal.sample(noise(denoiser, seed)) for seed in (0, 1)]
    first, second = (seen(denoiser, batch, roles, z_t)[0] for z_t in draws)
    changed = (first != second).flatten(2).any(2)  # (B, width)
    carried = denoiser.process.generated_channels(roles)
    assert torch.equal(changed[:, : denoiser.process.channels], carried)
    assert not changed[:, denoiser.process.channels :].any()


def test_the_other_paths_keep_the_noise_of_unused_channels_unless_told_otherwise():
    denoiser, batch = build("given.input=u_plus_code")
    roles = all_roles(denoiser, alpha=ABSENT)
    x, _ = seen(denoiser, batch, roles, noisy(denoiser, batch, roles))
    assert x[:, denoiser.process.layout["alpha"]].std() > 0.1


def test_a_given_code_stands_in_its_own_channels_without_noise_and_an_absent_one_is_0():
    denoiser, batch = build()
    roles = mixed_roles(denoiser)
    x, _ = seen(denoiser, batch, roles, noisy(denoiser, batch, roles))
    for name, code in denoiser.encode(batch.data).items():
        if name in ("pixels", "masked"):
            continue
        where = denoiser.process.layout[name]
        torch.testing.assert_close(x[:, where][roles[name] == GIVEN], code[roles[name] == GIVEN])
        assert not x[:, where][roles[name] == ABSENT].any()
    assert denoiser.path.conditions == {"masked": 1}  # its visibility


def test_visible_pixels_stand_in_the_anchors_channels_and_are_never_predicted():
    denoiser, batch = build()
    roles = all_roles(denoiser, masked=GIVEN)
    z_t = noisy(denoiser, batch, roles)
    x, predicted = seen(denoiser, batch, roles, z_t)
    visible = denoiser.modalities["masked"].visible(batch.data["masked"])[:, None].expand(-1, 3, -1, -1)
    truth = denoiser.modalities["pixels"].encode(batch.data["pixels"])
    where = denoiser.process.layout["pixels"]
    assert torch.equal(x[:, where][visible], truth[visible])
    torch.testing.assert_close(x[:, where][~visible], z_t[:, where][~visible])
    for found in (predicted.codes["pixels"], predicted.heads["pixels"]):
        assert torch.equal(found[visible], truth[visible])
        assert not torch.isclose(found[~visible], truth[~visible]).any(0).all()


def test_visible_pixels_are_seen_where_the_image_itself_is_absent():
    denoiser, batch = build()
    roles = all_roles(denoiser, masked=GIVEN, pixels=ABSENT)
    x, _ = seen(denoiser, batch, roles, noisy(denoiser, batch, roles))
    visible = denoiser.modalities["masked"].visible(batch.data["masked"])[:, None]
    truth = denoiser.modalities["pixels"].encode(batch.data["pixels"])
    assert torch.equal(x[:, :3], torch.where(visible, truth, 0))


def test_a_given_image_is_seen_whole_beside_its_masked_image():
    denoiser, batch = build()
    roles = all_roles(denoiser, masked=GIVEN, pixels=GIVEN)
    x, _ = seen(denoiser, batch, roles, noisy(denoiser, batch, roles))
    assert torch.equal(x[:, :3], denoiser.modalities["pixels"].encode(batch.data["pixels"]))


@pytest.mark.parametrize(
    ("overrides", "conditions"),
    [
        ((), {"masked": 1}),
        (APART, {"masked": 4}),
        (("modalities.masked.channels=own",), {"masked": 1}),
        (("modalities.masked.channels=own", *APART), {"masked": 1}),
        (OVERLAPPING, {"pixels": 3, "category": 3, "masked": 4}),
        (("given.input=z_only",), {}),
    ],
)
def test_only_codes_that_share_channels_with_generated_ones_have_condition_channels(overrides, conditions):
    denoiser, _ = build(*overrides)
    assert denoiser.path.conditions == conditions
    assert denoiser.input_channels == denoiser.process.channels + sum(conditions.values())
    assert denoiser.backbone.enter.in_channels == denoiser.input_channels


def test_sampling_returns_visible_pixels_bit_for_bit():
    denoiser, batch = build()
    roles = all_roles(denoiser, masked=GIVEN)
    masked = batch.data["masked"]
    visible = denoiser.modalities["masked"].visible(masked)[:, None].expand(-1, 3, -1, -1)
    for guidance in (1.0, 2.0):
        drawn = sample(denoiser, roles, {"masked": masked}, ids=batch.ids, seed=0, steps=3, guidance=guidance)
        assert torch.equal(drawn.data["pixels"][visible], masked[:, :3][visible])
        assert not torch.equal(drawn.data["pixels"], batch.data["pixels"])


def losses(*overrides: str) -> tuple[TrainingLoss, Batch, dict[str, Tensor]]:
    denoiser, batch = build(*overrides)
    return TrainingLoss(denoiser, tiny.config(*overrides)), batch, mixed_roles(denoiser)


@pytest.mark.parametrize("weighting", ["v", "elbo"])
def test_visible_cells_leave_sums_and_counts_of_l1_and_l3(weighting):
    """Rows with a hole and the same rows with all else erased have the same loss per predicted cell."""
    loss, batch, roles = losses(f"loss.weighting={weighting}")
    hidden = ~loss.denoiser.modalities["masked"].visible(batch.data["masked"])
    with_hole = (roles["masked"] == GIVEN) & (roles["pixels"] == GENERATED)
    assert with_hole.any() and not with_hole.all()
    cells = torch.where(with_hole, hidden.flatten(1).sum(1), hidden[0].numel())
    generated = roles["pixels"] == GENERATED
    counts = loss.counts(batch, roles)
    for term in ("l1/pixels", "l3/pixels"):
        assert float(counts[term]) == pytest.approx(float((cells * generated).sum() * 3))
    plain = Objective(loss.denoiser.process, loss.config.loss, dict(loss.denoiser.modalities.items()))
    assert float(plain.counts(roles, hidden[0].numel())["l1/pixels"]) > float(counts["l1/pixels"])
    # Only hidden pixels have a gradient, so only they can be in the sums.
    seen_heads: dict[str, Any] = {}
    loss.denoiser.heads["pixels"].register_forward_hook(
        lambda module, inputs, out: (out.retain_grad(), seen_heads.update(out=out))[0]
    )
    sums = loss(batch, roles)
    (sums["l1/pixels"] + sums["l3/pixels"]).backward()
    moved = seen_heads["out"].grad.abs().sum(1) > 0  # (B, H, W)
    assert not (moved & with_hole[:, None, None] & ~hidden).any()
    assert moved[with_hole].any() and moved[generated & ~with_hole].any()


def test_expected_counts_are_the_mean_counts_of_many_rows():
    loss, batch, _ = losses()
    names = list(loss.denoiser.modalities)
    tasks = Tasks(loss.config.tasks, names, {"masked"})
    expected = loss.expected_counts(tasks)
    totals: dict[str, float] = dict.fromkeys(expected, 0.0)
    for visit in range(400):
        again = Batch(batch.ids, batch.visits + visit, batch.real, batch.data, batch.present)
        _, roles = tasks.draw(again, seed=3)
        for key, count in loss.counts(again, roles).items():
            totals[key] += float(count) / (400 * len(batch))
    for key, count in expected.items():
        assert totals[key] == pytest.approx(float(count), rel=0.05), key


@pytest.mark.parametrize("weighting", ["v", "elbo"])
def test_void_cells_leave_sums_and_counts_of_l1_and_l2(weighting):
    plain, batch, roles = losses(f"loss.weighting={weighting}")
    loss, _, _ = losses(f"loss.weighting={weighting}", "modalities.palette.void=255")
    loss.load_state_dict(plain.state_dict())
    assert {k: float(v) for k, v in loss(batch, roles).items()} == {
        k: float(v) for k, v in plain(batch, roles).items()
    }
    void = torch.zeros_like(batch.data["palette"], dtype=torch.bool)
    void[:, :, :4] = True
    marked = {**batch.data, "palette": torch.where(void, 255, batch.data["palette"]).to(torch.uint8)}
    batch = Batch(batch.ids, batch.visits, batch.real, marked, batch.present)
    whole, counts = plain.counts(batch, roles), loss.counts(batch, roles)
    share = 1 - 4 / void.shape[2]
    for key in whole:
        assert float(counts[key]) == pytest.approx(
            float(whole[key]) * (share if key in ("l1/palette", "l2/palette") else 1)
        )
    seen_heads: dict[str, Any] = {}
    loss.denoiser.heads["palette"].register_forward_hook(
        lambda module, inputs, out: (out.retain_grad(), seen_heads.update(out=out))[0]
    )
    sums = loss(batch, roles)
    (sums["l1/palette"] + sums["l2/palette"]).backward()
    moved = seen_heads["out"].grad.abs().sum(1) > 0  # (B, H, W)
    assert moved.any() and not (moved & void).any()
