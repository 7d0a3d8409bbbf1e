"""The learning rate over samples, and what is decayed."""

import itertools
import math

import pytest
from torch import nn

from mmdiff_ray.config import TrainConfig
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.training.optim import learning_rate, make_optimizer
from tests.modalities import tiny

TOTAL = 10_000


def rates(**changes) -> list[float]:
    """Return the learning rate of every step of a run."""
    config = TrainConfig(**{"global_batch": 100, "learning_rate": 0.5, "warmup_samples": 1_000, **changes})
    return [learning_rate(config, seen, TOTAL) for seen in range(0, TOTAL, 100)]


def test_warm_up_rises_evenly_and_is_over_after_its_samples():
    constant = rates(decay="constant")
    assert constant[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert constant[10:] == [0.5] * 90
    assert rates(decay="constant", warmup_samples=0) == [0.5] * 100


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("floor", [0.0, 0.02, 0.3])
def test_decay_falls_from_the_learning_rate_to_its_final_share(decay, floor):
    falling = rates(decay=decay, final_lr_ratio=floor, warmup_samples=0)
    assert falling[0] == 0.5
    assert all(later < before for before, later in itertools.pairwise(falling))
    config = TrainConfig(learning_rate=0.5, decay=decay, final_lr_ratio=floor, warmup_samples=0)
    assert learning_rate(config, TOTAL, TOTAL) == pytest.approx(0.5 * floor)
    assert learning_rate(config, TOTAL // 2, TOTAL) == pytest.approx(0.5 * (1 + floor) / 2)
    assert learning_rate(config, 2 * TOTAL, TOTAL) == pytest.approx(0.5 * floor)  # never rises again


def test_decay_over_the_last_samples_leaves_the_rate_constant_until_then():
    falling = rates(decay="linear", decay_samples=2_000, final_lr_ratio=0.0, warmup_samples=0)
    assert falling[:80] == [0.5] * 80
    assert falling[80:] == pytest.approx([0.5 * (1 - step / 20) for step in range(20)])
    assert rates(decay="cosine", decay_samples=TOTAL) == rates(decay="cosine")


def test_cosine_is_a_cosine():
    config = TrainConfig(learning_rate=1.0, decay="cosine", final_lr_ratio=0.0, warmup_samples=0)
    for share in (0.1, 0.25, 0.8):
        expected = (1 + math.cos(math.pi * share)) / 2
        assert learning_rate(config, int(share * TOTAL), TOTAL) == pytest.approx(expected)


def test_role_embeddings_and_learned_label_codes_are_not_decayed_whatever_modalities_are_called():
    """A modality called `timetable` or `role_embedding_2` keeps the decay of its head."""
    shape = "{type: mask, column: alpha, classes: 2}"
    denoiser = build_denoiser(
        tiny.config(
            f"modalities.timetable={shape}",
            f"modalities.role_embedding_2={shape}",
            "modalities.category.code=learned",
        )
    )
    optimizer = make_optimizer(denoiser, TrainConfig(weight_decay=0.1))
    kept = {id(p) for p in optimizer.param_groups[1]["params"]}
    matrices = {name for name, p in denoiser.named_parameters() if p.ndim >= 2 and id(p) in kept}
    roles = {f"role_embedding.{name}" for name in denoiser.modalities}
    assert matrices == {*roles, "modalities.category.table"}


def test_weights_are_decayed_and_biases_and_norms_are_not():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Linear(3, 4))
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1, betas=[0.8, 0.95]))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.1,
        "2.bias": 0.0,
    }
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)
