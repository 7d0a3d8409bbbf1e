"""What a training step dispatches: few operators, and none that waits for the device."""

import collections

import pytest
import torch

from benchmarks.step import Operators
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.training.trainer import Trainer
from tests.modalities import tiny

MOST = {"image only": 320, "six modalities": 640}
"""Operators of a step with a backbone of two convolutions, all but views: of the step's own, mostly."""


def step_of(*overrides: str) -> collections.Counter[str]:
    """Return the operators of a step after the first, in which the optimizer makes its state."""
    config = tiny.config("train.global_batch=8", *overrides)
    denoiser = build_denoiser(config)
    trainer = Trainer(config, denoiser, torch.device("cpu"))
    batch = tiny.rows(denoiser.modalities, 8)
    trainer.step(batch)
    with Operators() as counter:
        trainer.step(batch)
    return counter.found


def test_a_step_copies_nothing_to_the_host():
    found = step_of()
    assert found["convolution_backward"]  # the counter sees the step
    assert found["_local_scalar_dense"] == 0


def test_a_step_dispatches_few_operators_beside_the_networks():
    others = [f"modalities.{name}=null" for name in ("alpha", "palette", "category", "look", "masked")]
    found = {"image only": step_of(*others).total(), "six modalities": step_of().total()}
    assert all(found[name] <= most for name, most in MOST.items()), found


@pytest.mark.slow
def test_the_loss_compiles_as_one_graph():
    config = tiny.config("train.global_batch=8")
    denoiser = build_denoiser(config)
    trainer = Trainer(config, denoiser, torch.device("cpu"))
    batch = tiny.rows(denoiser.modalities, 8)
    _, roles = trainer.tasks.draw(batch, 0)
    compiled = torch.compile(trainer.loss, backend="eager", fullgraph=True)  # raises at a break
    for weighted_only in (False, True):
        want = trainer.loss(batch, roles, weighted_only)
        found = compiled(batch, roles, weighted_only)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[key], want[key]) for key in want)


def test_terms_without_weight_are_measured_once_between_reports():
    config = tiny.config("train.global_batch=8", "loss.coefficients.l0=0", "loss.modalities={palette: 0}")
    trainer = Trainer(config, build_denoiser(config), torch.device("cpu"))
    batch = tiny.rows(trainer.denoiser.modalities, 8)
    trainer.step(batch)
    once = trainer.report()
    for _ in range(3):
        trainer.step(batch)
    again = trainer.report()
    left_out = trainer.loss(batch, trainer.tasks.draw(batch, 0)[1], weighted_only=True)
    assert once.keys() == again.keys() and once["loss/l0/pixels"] == again["loss/l0/pixels"] > 0
    assert not {"l0/pixels", "l2/palette"} & left_out.keys() and "l1/palette" in left_out
