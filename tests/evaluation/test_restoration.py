"""Restored images: figures inside and outside the hole, and the rules beside them."""

import numpy as np
import pytest
import torch

from mmdiff_ray.evaluation.context import Context, Figure
from mmdiff_ray.evaluation.floors import biharmonic
from mmdiff_ray.evaluation.lpips import Lpips
from mmdiff_ray.evaluation.restoration import evaluate_restoration, lpips_within
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
    assert set(figures) == {"l1_hole", "lpips", "lpips_hole", "l1_visible", "lpips_visible"}
    for metric in ("l1_hole", "lpips", "lpips_hole"):
        assert set(figures[metric].floors) == {"mean visible colour", "nearest visible pixel", "biharmonic"}
    assert not figures["l1_visible"].floors and not figures["lpips_visible"].floors
    assert all(figure.rows == ROWS and figure.better == "lower" for figure in figures.values())


def test_lpips_is_taken_in_the_hole_of_pasted_and_outside_of_unpasted_images(
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
