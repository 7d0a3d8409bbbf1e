"""Tallies add up as their figures do; intervals cover as often as they say, and pair what is paired."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from mmdiff_ray.evaluation.statistics import Tally, difference, interval, mean_of


def test_a_tally_is_the_mean_over_known_classes_of_ratios_of_sums():
    tally = Tally(np.array([[1.0, 0, 0], [3, 2, 0]]), np.array([[2.0, 0, 0], [6, 4, 0]]))
    assert tally.value == pytest.approx((4 / 8 + 2 / 4) / 2)
    assert tally.weighted(np.array([[2.0, 0], [0, 3]])) == pytest.approx([0.5, 0.5])
    assert np.isnan(Tally(np.zeros(3), np.zeros(3)).value)
    assert mean_of(np.array([True, False, True, True])).value == 0.75


def test_parts_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and denominator \(3,\) differ"):
        Tally(np.zeros(2), np.ones(3))


def test_the_interval_of_one_seed_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).gamma(2, size=60)
    ours = interval([mean_of(values)], draws=20000)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.02)


def test_pairing_finds_a_difference_that_separate_intervals_do_not():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 1, 80)
    ours = [mean_of(hard - 0.1 + generator.normal(0, 0.1, 80)) for _ in range(3)]
    others = [mean_of(hard + generator.normal(0, 0.1, 80)) for _ in range(3)]
    found = difference(ours, others)
    assert found.excludes_zero and found.value == pytest.approx(-0.1, abs=0.03)
    assert interval(ours).high > interval(others).low


def test_seeds_that_disagree_widen_the_interval():
    generator = np.random.default_rng(0)
    rows = generator.normal(0, 0.1, 200)
    alike = interval([mean_of(rows), mean_of(rows)])
    apart = interval([mean_of(rows - 1), mean_of(rows + 1)])
    assert apart.high - apart.low > 10 * (alike.high - alike.low)


def test_under_no_difference_the_interval_excludes_zero_about_one_time_in_twenty():
    generator = np.random.default_rng(0)
    found = [
        difference(
            [mean_of(generator.normal(size=50))], [mean_of(generator.normal(size=50))], draws=300, seed=trial
        ).excludes_zero
        for trial in range(300)
    ]
    assert 0.01 < np.mean(found) < 0.11


def test_a_rule_with_one_tally_is_compared_with_every_seed():
    rows = np.linspace(0, 1, 40)
    found = difference([mean_of(rows), mean_of(rows + 0.2)], [mean_of(rows)])
    assert found.value == pytest.approx(0.1)
    assert found.low >= -1e-12 and found.high <= 0.2 + 1e-12


def test_different_rows_are_refused():
    with pytest.raises(ValueError, match=r"only figures of the same rows can be compared; got \[3, 4\]"):
        difference([mean_of(np.ones(3))], [mean_of(np.ones(4))])
