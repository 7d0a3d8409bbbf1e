"""Tallies add up as their figures do; intervals cover as often as they say, and pair what is paired."""

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, sem, t, ttest_1samp

from mmdiff_ray.evaluation.statistics import Tally, compare, difference, holm, interval, mean_of, over_seeds


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


def with_ids(values: np.ndarray, ids: np.ndarray) -> Tally:
    return Tally(values, np.ones_like(values), ids)


def test_ids_in_the_same_order_change_no_interval():
    generator = np.random.default_rng(0)
    ours, others = generator.normal(size=(2, 3, 50))
    ids = generator.permutation(50)
    bare = [[mean_of(values) for values in side] for side in (ours, others)]
    known = [[with_ids(values, ids) for values in side] for side in (ours, others)]
    assert interval(known[0]) == interval(bare[0])
    assert difference(*known) == difference(*bare)


def test_entries_of_one_row_are_resampled_together():
    values = np.random.default_rng(0).gamma(2, size=60)
    once = interval([mean_of(values)])
    ids = np.arange(60)
    again = interval([with_ids(np.tile(values, 5), np.tile(ids, 5))])
    assert again == pytest.approx(once)  # five copies tell no more than one
    apart = interval([with_ids(np.tile(values, 5), np.arange(300))])
    assert apart.high - apart.low < 0.6 * (once.high - once.low)


def test_clustered_rows_keep_the_level_and_independent_ones_do_not():
    def excludes(ids: np.ndarray) -> float:
        found = []
        for trial in range(200):
            generator = np.random.default_rng(trial)
            rows = np.tile(generator.normal(size=40), 4)
            gap = [with_ids(rows + generator.normal(0, 0.3, 160), ids)]
            found.append(interval(gap, draws=200, seed=trial).excludes_zero)
        return float(np.mean(found))

    assert 0.01 < excludes(np.tile(np.arange(40), 4)) < 0.12
    assert excludes(np.arange(160)) > 0.2


def test_seeds_on_different_folds_have_one_interval_over_all_rows():
    generator = np.random.default_rng(0)
    folds = [np.arange(start, start + 40) for start in range(0, 200, 40)]
    hard = generator.normal(size=200)
    ours = [with_ids(hard[ids] - 0.3 + generator.normal(0, 0.1, 40), ids) for ids in folds]
    others = [with_ids(hard[ids] + generator.normal(0, 0.1, 40), ids) for ids in folds]
    found = difference(ours, others)
    assert found.value == pytest.approx(-0.3, abs=0.05) and found.excludes_zero
    assert interval(ours).value == pytest.approx(np.mean([tally.value for tally in ours]))
    with pytest.raises(ValueError, match="ids differ"):
        difference(ours, others[::-1])


def test_seeds_that_disagree_widen_the_interval():
    generator = np.random.default_rng(0)
    rows = generator.normal(0, 0.1, 200)
    alike = interval([mean_of(rows), mean_of(rows)])
    apart = interval([mean_of(rows - 1), mean_of(rows + 1)])
    assert apart.high - apart.low > 10 * (alike.high - alike.low)


def trained(generator, seeds: int, rows: int, spread: float, own: float = 0.5) -> list[Tally]:
    """Return tallies of models of true value 0: rows have a shared variance of 1 - own and a variance of own
    per seed; seeds differ with a standard deviation of `spread`."""
    shared = generator.normal(0, np.sqrt(1 - own), rows)
    return [
        mean_of(generator.normal(0, spread) + shared + generator.normal(0, np.sqrt(own), rows))
        for _ in range(seeds)
    ]


def zeros(rows: int, seeds: int = 1) -> list[Tally]:
    return [mean_of(np.zeros(rows))] * seeds


def class_mean(generator) -> Tally:
    """Return a mean over three classes: of every row 40 pixels, each class found at its seed's own rate."""
    pixels = np.random.default_rng(0).multinomial(40, [0.7, 0.2, 0.1], size=150)
    rate = np.clip(0.6 + generator.normal(0, 0.03), 0, 1)
    return Tally(generator.binomial(pixels, rate), pixels)


@pytest.mark.parametrize(
    ("make", "lowest"),
    [
        (lambda g: ([mean_of(g.normal(size=50))], [mean_of(g.normal(size=50))]), 0.01),
        (lambda g: (trained(g, 3, 187, 0.2), zeros(187, 3)), 0.02),
        (lambda g: (trained(g, 3, 187, 0.2, own=1.0), zeros(187, 3)), 0.02),
        (lambda g: (trained(g, 3, 400, 0.15), zeros(400, 3)), 0.02),
        (lambda g: (trained(g, 2, 187, 0.2), zeros(187, 2)), 0),
        (lambda g: (trained(g, 5, 187, 0.2), zeros(187, 5)), 0),
        (lambda g: (trained(g, 3, 187, 0.2), trained(g, 4, 187, 0.2)), 0.02),
        (lambda g: (trained(g, 3, 187, 0.2), zeros(187)), 0.02),
        (lambda g: ([class_mean(g) for _ in range(3)], [class_mean(g) for _ in range(3)]), 0.02),
    ],
    ids=[
        "one seed", "three seeds", "rows share nothing", "more rows", "two seeds", "five seeds",
        "unpaired methods", "a rule", "mean over classes",
    ],
)  # fmt: skip
def test_equal_models_are_called_different_about_one_time_in_twenty(make, lowest):
    found = [
        difference(*make(np.random.default_rng(trial)), draws=200, seed=trial).excludes_zero
        for trial in range(300)
    ]
    assert lowest <= np.mean(found) <= 0.08


def test_seeds_that_hardly_differ_leave_the_interval_of_the_rows():
    rows = np.random.default_rng(0).gamma(2, size=200)
    alone, alike = interval([mean_of(rows)]), interval([mean_of(rows + shift) for shift in (-1e-3, 0, 1e-3)])
    assert alike == pytest.approx(alone, abs=1e-3)
    assert alike.high - alike.low >= alone.high - alone.low


def test_what_each_seed_adds_on_these_rows_is_counted_once():
    """Where rows share nothing, the spread over seeds holds all there is: scipy's t interval."""
    generator = np.random.default_rng(3)
    tallies = [mean_of(generator.normal(0, 1, 400) + shift) for shift in (-0.1, 0, 0.1)]
    values = [tally.value for tally in tallies]
    low, high = t.interval(0.95, 2, np.mean(values), sem(values))
    assert interval(tallies) == pytest.approx((np.mean(values), low, high), abs=0.02)


def test_a_rule_with_one_tally_is_compared_with_every_seed():
    """Rows do not matter here: what is left is the t interval of two seeds."""
    rows = np.linspace(0, 1, 40)
    found = difference([mean_of(rows), mean_of(rows + 0.2)], [mean_of(rows)])
    assert found == pytest.approx((0.1, *t.interval(0.95, 1, 0.1, 0.1)))
    assert difference([mean_of(rows)], [mean_of(rows), mean_of(rows + 0.2)]) == pytest.approx(
        (-0.1, *t.interval(0.95, 1, -0.1, 0.1))
    )


def test_different_rows_are_refused():
    with pytest.raises(ValueError, match=r"figures must have the same rows; got \[3, 4\]"):
        difference([mean_of(np.ones(3))], [mean_of(np.ones(4))])


@pytest.mark.parametrize("side", ["less", "greater"])
def test_the_p_value_over_seeds_is_that_of_the_t_test(side):
    values = [0.3, -0.4, -0.2, -0.5, -0.1]
    p = over_seeds(values).p_below(0.1)
    p = p if side == "less" else 1 - p
    assert p == pytest.approx(ttest_1samp(values, 0.1, alternative=side).pvalue, rel=1e-6)


def test_the_p_value_over_rows_is_the_share_of_bootstrap_draws_beyond_the_bound():
    rows = np.random.default_rng(0).normal(0, 1, 100)
    rows += -0.15 - rows.mean()
    found = compare([mean_of(rows)], [mean_of(np.zeros(100))], draws=20000)
    p = norm.cdf(rows.mean() * 10 / rows.std())  # of a mean of 100 values
    assert 0.03 < p < 0.1 and found.p_below() == pytest.approx(p, abs=0.01)
    assert found.interval(1 - 2 * found.p_below()).high == pytest.approx(0, abs=1e-3)
    assert found.p_below(100) == pytest.approx(1 / 20000), "no smaller than one draw tells"


def test_a_factor_scales_the_method_compared_with():
    first, second = mean_of(np.full(10, 1.04)), mean_of(np.ones(10))
    assert compare([first], [second], 1.05).value == pytest.approx(-0.01)


def test_holm_corrects_in_order_and_never_reverses_it():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01, 2 x 0.03, 0.06 > 0.04
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []
