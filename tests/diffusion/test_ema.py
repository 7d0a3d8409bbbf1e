"""The moving average of a model's parameters."""

import pytest
from torch import nn

from mmdiff_ray.diffusion.ema import Ema


def one_weight(value: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def weight_of(ema: Ema) -> float:
    return float(next(ema.model.parameters()))


def test_what_a_parameter_was_counts_half_after_one_half_life():
    """From 0 to 1 in four steps of 25 samples with a half-life of 100: half of the way."""
    ema, model = Ema(one_weight(0.0), half_life_samples=100), one_weight(1.0)
    for _ in range(4):
        ema.update(model, batch_samples=25, samples_seen=100_000)
    assert weight_of(ema) == pytest.approx(0.5)


def test_size_of_the_batch_does_not_change_what_is_forgotten_per_sample():
    model, many, few = one_weight(1.0), Ema(one_weight(0.0), 100), Ema(one_weight(0.0), 100)
    for _ in range(10):
        many.update(model, batch_samples=5, samples_seen=100_000)
    few.update(model, batch_samples=50, samples_seen=100_000)
    assert weight_of(many) == pytest.approx(weight_of(few))


def test_early_on_the_start_is_forgotten_faster():
    """The half-life is a tenth of the samples seen: after 40 samples a batch of 4 counts half."""
    ema = Ema(one_weight(0.0), half_life_samples=1_000_000)
    ema.update(one_weight(1.0), batch_samples=4, samples_seen=40)
    assert weight_of(ema) == pytest.approx(0.5)


def test_average_is_a_copy_that_trains_nothing_and_leaves_the_model_alone():
    model = one_weight(2.0).train()
    ema = Ema(model, 10)
    ema.update(one_weight(3.0), 5, 100)
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert model.weight.requires_grad
    assert model.weight.item() == 2.0
    assert weight_of(ema) != 2.0
