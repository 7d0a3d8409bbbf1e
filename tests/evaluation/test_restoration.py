"""Restored images: figures inside and outside the hole, and the rules beside them."""

import math

import numpy as np
import pytest
import torch

from mmdiff_ray.evaluation.context import Context, Figure
from mmdiff_ray.evaluation.floors import biharmonic
from mmdiff_ray.evaluation.lpips import Lpips
from mmdiff_ray.evaluation.restoration import evaluate_restoration, gradient_error, lpips_within
from mmdiff_ray.evaluation.run import joined
from tests import sprites as tiny

ROWS = 6


@pytest.fixture(scope="module")
def context(sprites: str) -> Context:
    job = tiny.job(sprites)
    batch = joined(tiny.held_out(job, ROWS, size=4))
    return Context(tiny.generator(job), batch.where(batch.real))


@pytest.fixture(scope="module")
def figures(context: Context) -> dict[str, Figure]:
    found = evaluate_restoration(context)
    assert set(found.pictures) == {"pixels_from_masked"}
    return {figure.key.removeprefix("pixels_from_masked/"): figure for figure in found.figures}


def test_holes_stand_beside_every_rule_and_the_visible_part_beside_none(figures: dict[str, Figure]) -> None:
    beside = ("l1_hole", "lpips", "lpips_hole", "gradient_error", "kid_lpips_alex")
    alone = ("l1_visible", "lpips_visible")
    paired = {f"{metric}{ending}" for metric in (*beside, *alone) for ending in ("", "_likely")}
    assert set(figures) == {*paired, "lpips_between"}
    for metric in paired:
        rules = {"mean visible colour", "nearest visible pixel", "biharmonic"}
        assert set(figures[metric].floors) == (rules if metric.removesuffix("_likely") in beside else set())
        assert figures[metric].better == "lower"
    assert all(figure.rows == ROWS for figure in figures.values())


def test_the_most_likely_answer_differs_from_a_sample_and_two_samples_from_each_other(
    context: Context, figures: dict[str, Figure]
) -> None:
    likely = context.sampled("masked", readout="likely").data["pixels"]
    assert not torch.equal(likely, context.sampled("masked").data["pixels"])
    assert figures["lpips_hole"].value != figures["lpips_hole_likely"].value
    assert figures["lpips_between"].value > 0


def test_gradient_error_is_0_for_the_truth_and_counts_too_smooth_and_too_rough_alike() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (2, 3, 8, 8)).astype(np.uint8)
    visible = np.zeros((2, 8, 8), bool)
    visible[:, :, :3] = True
    assert gradient_error(truth, truth, visible).value == 0
    flat = np.where(visible[:, None], truth, 128).astype(np.uint8)
    assert gradient_error(flat, truth, visible).value == pytest.approx(
        gradient_error(truth, flat, visible).value
    )
    half = (truth // 2).astype(np.uint8)  # a quarter of the energy
    assert gradient_error(half, truth, visible).value == pytest.approx(math.log(4), rel=0.02)
    seen_only = truth.copy()
    seen_only[:, :, 0, 0] = 255 - seen_only[:, :, 0, 0]  # far inside the visible part
    assert gradient_error(seen_only, truth, visible).value == 0


def test_lpips_uses_pasted_images_in_the_hole_and_unpasted_ones_outside(
    context: Context, figures: dict[str, Figure]
) -> None:
    masked, truth = context.truth("masked"), context.truth("pixels")
    visible = masked[:, 3] > 0
    restored = context.sampled("masked").data["pixels"]
    pasted = torch.where(visible[:, None], masked[:, :3], restored)
    alex = Lpips("alex")
    assert figures["lpips_hole"].value == pytest.approx(
        alex.within(pasted, truth, ~visible).nanmean().item(), rel=1e-5
    )
    assert figures["lpips_visible"].value == pytest.approx(
        alex.within(restored, truth, visible).nanmean().item(), rel=1e-5
    )
    smooth = torch.from_numpy(biharmonic(masked[:, :3].numpy(), visible.numpy()))
    assert figures["lpips_hole"].floors["biharmonic"] == pytest.approx(
        alex.within(smooth, truth, ~visible).nanmean().item(), rel=1e-5
    )


def test_images_without_a_hole_do_not_count() -> None:
    generator = np.random.default_rng(0)
    answer, truth = generator.integers(0, 256, (2, 3, 3, 16, 16), dtype=np.uint8)
    hole = np.zeros((3, 16, 16), dtype=bool)
    hole[:2, 4:9, 4:9] = True
    alex = Lpips("alex")
    whole = lpips_within(alex, answer, torch.from_numpy(truth), hole)
    some = lpips_within(alex, answer[:2], torch.from_numpy(truth[:2]), hole[:2])
    assert len(whole) == 3 and whole.value == pytest.approx(some.value) and some.value > 0
