"""Random numbers as a function of (seed, purpose, visit, id)."""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

from mmdiff_ray.diffusion import rng

ROWS, COUNT = 2000, 50
TOTAL = ROWS * COUNT
TOP, GOLDEN, MIX = 2**64, 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SMALLEST_P = 1e-4
"""Seeds are fixed, so a test fails only if the generator is at fault; p is that of the one draw looked at."""


def keys(rows: int = ROWS, visit: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return visits and ids that follow each other, the hardest kind for a counter-based generator."""
    return torch.full((rows,), visit), torch.arange(rows)


def uniform(seed: int = 0, purpose: str = "time", visit: int = 0) -> np.ndarray:
    return rng.uniform(seed, purpose, *keys(visit=visit), COUNT).numpy()


def normal(seed: int = 0, purpose: str = "noise", visit: int = 0) -> np.ndarray:
    return rng.normal(seed, purpose, *keys(visit=visit), (COUNT,)).double().numpy()


@pytest.mark.parametrize("seed", [0, 1, 2**31, -5])
def test_uniform_numbers_are_uniform(seed):
    values = uniform(seed)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 4 * math.sqrt(1 / 12 / TOTAL)
    assert abs(values.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / TOTAL)
    assert stats.kstest(values.ravel(), "uniform").pvalue > SMALLEST_P


@pytest.mark.parametrize("seed", [0, 1, 2**31, -5])
def test_normal_numbers_are_normal(seed):
    values = normal(seed).ravel()
    assert abs(values.mean()) < 4 / math.sqrt(TOTAL)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / TOTAL)
    assert abs(stats.skew(values)) < 4 * math.sqrt(6 / TOTAL)
    assert abs(stats.kurtosis(values)) < 4 * math.sqrt(24 / TOTAL)
    assert stats.kstest(values, "norm").pvalue > SMALLEST_P


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("change", [{"seed": 1}, {"purpose": "task"}, {"visit": 1}])
def test_other_seed_purpose_or_visit_gives_independent_numbers(draw, change):
    one, other = draw().ravel(), draw(**change).ravel()
    assert not (one == other).any()
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(TOTAL)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_neighbouring_ids_and_neighbouring_numbers_are_independent(draw):
    values = draw()
    for one, other in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / math.sqrt(one.size)


def test_no_purpose_repeats_the_numbers_of_another_for_any_other_id():
    """Adding purpose and id before mixing let step 14 of an id return as step 153 of the id 13,970 before."""
    purposes = ["time", "task", "noise", *(f"sample step {step}" for step in range(250))]
    bits = torch.cat([rng.uniform(0, purpose, *keys(16_000), 1)[:, 0] for purpose in purposes])
    # Among n draws of 53 bits about n^2 / 2^54 pairs are equal by chance: 0.001 here.
    assert len(bits.unique()) == len(bits)


def test_two_halves_of_box_muller_are_independent_also_in_their_squares():
    first, second = np.split(normal(), 2, axis=1)
    for one, other in ((first, second), (first**2, second**2)):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / math.sqrt(one.size)


def test_first_number_is_uniform_over_ids_over_visits_and_over_seeds():
    """Role and time are one number per sample: its spread over keys matters, not only over counters."""
    ids = torch.arange(20_000)
    zeros = torch.zeros_like(ids)
    over_seeds = torch.cat([rng.uniform(seed, "time", zeros[:1], ids[:1], 1) for seed in range(4000)])
    over_hashes = rng.uniform(0, "time", zeros, ids * 7919 % (2**61 - 1), 1)
    draws = [
        rng.uniform(0, "time", zeros, ids, 1),
        rng.uniform(0, "time", ids, zeros, 1),
        over_seeds,
        over_hashes,
    ]
    for values in draws:
        assert stats.kstest(values.numpy().ravel(), "uniform").pvalue > SMALLEST_P


def test_sample_draws_the_same_numbers_in_any_batch_and_order():
    visits, ids = torch.tensor([0, 3, 0, 9]), torch.tensor([2**62 + 5, 8, 12, 2**63 - 1])
    whole = rng.normal(7, "noise", visits, ids, (3, 5))
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(rng.normal(7, "noise", visits[order], ids[order], (3, 5)), whole[order])
    for i in range(4):
        assert torch.equal(rng.normal(7, "noise", visits[i : i + 1], ids[i : i + 1], (3, 5))[0], whole[i])


def test_first_numbers_do_not_depend_on_how_many_are_drawn():
    few, many = (rng.uniform(0, "time", *keys(4), count) for count in (2, 9))
    assert torch.equal(many[:, :2], few)


def test_numbers_are_the_same_in_every_release():
    """A checkpoint resumes with the same draws: those of SplitMix64, here in Python integers."""
    found = rng.uniform(3, "time", torch.tensor([2]), torch.tensor([11]), 3)[0].tolist()
    assert found == [split_mix(3, "time", 2, 11, counter) for counter in (1, 2, 3)]


def split_mix(seed: int, purpose: str, visit: int, row: int, counter: int) -> float:
    """Return one number by the published algorithm, in integers without a width."""
    key = mix(mix((row + seed * 0x5851F42D4C957F2D) % TOP) ^ (visit * GOLDEN % TOP))
    key = mix((key + purpose_key(purpose)) % TOP)
    return (mix((key + counter * GOLDEN) % TOP) >> 11) / 2**53


def purpose_key(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * MIX[0] % TOP
    x = (x ^ (x >> 27)) * MIX[1] % TOP
    return x ^ (x >> 31)


def unmix(x: int) -> int:
    x = (x ^ (x >> 31) ^ (x >> 62)) * pow(MIX[1], -1, TOP) % TOP
    x = (x ^ (x >> 27) ^ (x >> 54)) * pow(MIX[0], -1, TOP) % TOP
    return x ^ (x >> 30) ^ (x >> 60)


@pytest.mark.parametrize(("bits", "low", "high"), [(0, 5.88, 5.89), (TOP - 1, 0.0, 1e-3)])
def test_extreme_bits_give_finite_normal_numbers(bits, low, high):
    """SplitMix64 can be inverted: this is the id whose first bits are all 0 (or 1), near a logarithm of 0."""
    row = unmix(unmix((unmix((unmix(bits) - GOLDEN) % TOP) - purpose_key("noise")) % TOP))
    ids = torch.tensor([row - TOP if row >= TOP // 2 else row])
    assert rng.uniform(0, "noise", torch.zeros_like(ids), ids, 1).item() == pytest.approx(
        bits / TOP, abs=1e-15
    )
    radius = rng.normal(0, "noise", torch.zeros_like(ids), ids, (2,)).norm().item()
    assert low <= radius <= high


def test_many_normal_numbers_reach_far_and_stay_finite():
    values = rng.normal(0, "noise", *keys(4000), (1000,))
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert 4.5 < values.abs().max() < 5.9


def test_shape_may_be_odd_or_empty():
    assert rng.normal(0, "noise", *keys(2), (3, 1, 1)).shape == (2, 3, 1, 1)
    assert rng.normal(0, "noise", *keys(0), (3,)).shape == (0, 3)
