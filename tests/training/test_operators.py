"""What a training step dispatches: few operators, and none that waits for the device."""

import collections
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.training.trainer import Trainer
from tests.modalities import tiny

VIEWS = {
    "view",
    "_unsafe_view",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "permute",
    "transpose",
    "t",
    "detach",
    "alias",
    "as_strided",
    "unbind",
    "split",
    "split_with_sizes",
    "_reshape_alias",
}
MOST = {"image only": 550, "six modalities": 1_150}
"""Operators of a step with a backbone of two convolutions, all but views: of the step's own, mostly."""


class Counter(TorchDispatchMode):
    """Count operators by name, all but views, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if name not in VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def step_of(*overrides: str) -> collections.Counter[str]:
    """Return the operators of a step after the first, in which the optimizer makes its state."""
    config = tiny.config("train.global_batch=8", *overrides)
    denoiser = build_denoiser(config)
    trainer = Trainer(config, denoiser, torch.device("cpu"))
    batch = tiny.rows(denoiser.modalities, 8)
    trainer.step(batch)
    with Counter() as counter:
        trainer.step(batch)
    return counter.found


def test_a_step_copies_nothing_to_the_host():
    found = step_of()
    assert found["mul"] > 100  # the counter sees the step
    assert found["_local_scalar_dense"] == 0


def test_a_step_dispatches_few_operators_beside_the_networks():
    others = [f"modalities.{name}=null" for name in ("alpha", "palette", "category", "look", "masked")]
    found = {"image only": step_of(*others).total(), "six modalities": step_of().total()}
    assert all(found[name] <= most for name, most in MOST.items()), found
