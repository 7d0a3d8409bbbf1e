"""A summary pairs what two methods have in common: rows, and seeds by their number."""

import json

import numpy as np
import pytest

from mmdiff_ray.evaluation.statistics import difference, interval, mean_of
from mmdiff_ray.experiments.parts import Goal
from mmdiff_ray.experiments.table import Series, evaluate_goals, mean_point, summary


class Plan:
    """What a summary asks of an experiment."""

    main = "ours"


@pytest.fixture
def series():
    """Return how a series is made: a row's difficulty, and a shift for each seed."""
    rows = np.random.default_rng(0).normal(0, 1, 60)

    def make(shifts: dict[int, float]) -> Series:
        tallies = {
            seed: mean_of(rows + shift + np.random.default_rng(seed + 1).normal(0, 0.1, 60))
            for seed, shift in shifts.items()
        }
        return Series("higher", {seed: tally.value for seed, tally in tallies.items()}, tallies)

    return make


def line_of(ours: Series, other: Series, name: str = "theirs") -> dict:
    lines = summary(Plan, {"measure": {"figure": {"ours": ours, name: other}}})
    return next(line for line in json.loads(json.dumps(lines)) if line["method"] == name)


def test_a_method_with_one_seed_is_compared_with_that_seed_alone(series):
    ours, other = series({0: 0.0, 1: 5.0, 2: -8.0}), series({1: 5.5})
    line = line_of(ours, other)
    want = difference([ours.tallies[1]], [other.tallies[1]])
    assert line["paired_seeds"] == [1] and line["difference"] == pytest.approx(-0.5)
    assert line["difference_interval"] == pytest.approx([want.low, want.high])
    assert line["verdict"] == "main worse"  # against the mean of all of ours it would be no difference


def test_seeds_are_paired_by_their_number_in_whatever_order_they_came(series):
    ours, other = series({2: 7.0, 0: 0.0, 1: -7.0}), series({0: 0.3, 3: 50.0, 2: 7.3})
    line = line_of(ours, other)
    want = difference(
        [ours.tallies[0], ours.tallies[2]], [other.tallies[0], other.tallies[2]]
    )  # in pairs, whose spread is small
    assert line["paired_seeds"] == [0, 2] and line["difference"] == pytest.approx(-0.3)
    assert line["difference_interval"] == pytest.approx([want.low, want.high])
    assert line["verdict"] == "main worse" and line["seeds"] == [0, 2, 3]


def test_methods_without_a_seed_in_common_are_not_compared(series):
    assert "difference" not in line_of(series({0: 0.0}), series({1: 0.0}))


def test_a_tally_that_a_shared_seed_lacks_leaves_the_difference_without_interval(series):
    other = series({0: 0.5, 1: 0.5})
    del other.tallies[1]
    line = line_of(series({0: 0.0, 1: 0.0}), other)
    assert line["difference"] == pytest.approx(-0.5) and "difference_interval" not in line


def test_figures_that_are_not_sums_over_rows_are_compared_over_three_seeds_or_more():
    def line(gaps: dict[int, float]) -> dict:
        ours = Series("lower", {seed: 900.0 + 50 * seed for seed in gaps})
        return line_of(ours, Series("lower", {seed: ours.values[seed] - gap for seed, gap in gaps.items()}))

    found = line({0: 72.0, 1: 76.0, 2: 80.0})
    half = 4.302653 * 4 / 3**0.5  # t of 2 degrees of freedom, spread of the differences, root of seeds
    assert found["difference_interval"] == pytest.approx([76 - half, 76 + half], rel=1e-5)
    assert found["verdict"] == "main worse"
    assert line({0: -5.0, 1: 1.0, 2: 2.0})["verdict"] == "no difference shown"
    assert "verdict" not in line({0: 72.0, 1: 76.0})  # of two there is next to nothing to judge by


def test_a_rule_stands_beside_every_seed(series):
    ours, rule = series({0: 0.9, 1: 1.0, 2: 1.1}), series({0: 0.0})
    for seed in (1, 2):
        rule.tallies[seed], rule.values[seed] = rule.tallies[0], rule.values[0]
    line = line_of(ours, rule, "rule: simple")
    assert line["paired_seeds"] == [0, 1, 2] and line["verdict"] == "main better"
    alone = interval([rule.tallies[0]])
    assert line["interval"] == pytest.approx([alone.low, alone.high])


def test_points_of_seeds_are_averaged_over_those_that_have_a_value():
    none = float("nan")
    points = [
        {"samples": 8, "losses": {"joint": 1.0}, "gradients": {"joint": 4.0}, "cosines": {}},
        {
            "samples": 8,
            "losses": {"joint": 3.0, "hole": 5.0},
            "gradients": {"joint": none},
            "cosines": {"a~b": none},
        },
    ]
    assert mean_point(points) == {
        "samples": 8,
        "seeds": 2,
        "losses": {"joint": 2.0, "hole": 5.0},
        "gradients": {"joint": 4.0},
        "cosines": {"a~b": None},
    }


def test_goals_are_tested_in_the_direction_of_their_figure_and_corrected_together():
    def over(values: list[float], better: str) -> Series:
        return Series(better, dict(enumerate(values)))

    noise = [0.001, -0.001, 0.002, -0.002, 0.0]
    table = {
        "m": {
            better: {
                "ours": over([(0.98 if better == "lower" else 1.02) + one for one in noise], better),
                "same": over([1.0 - one for one in noise], better),
                "close": over([(1.03 if better == "lower" else 0.97) + one for one in noise], better),
            }
            for better in ("lower", "higher")
        }
    }
    claims = [
        ("ours", "same", "better", True), ("same", "ours", "better", False),
        ("close", "same", "better", False),
        ("ours", "same", "not worse", True), ("close", "same", "not worse", False),
        ("close", "same", "within 5 %", True), ("close", "same", "within 2 %", False),
    ]  # fmt: skip
    for figure in ("lower", "higher"):
        goals = [Goal("g", "m", figure, a, b, kind) for a, b, kind, _ in claims]
        found = evaluate_goals(goals, table)
        assert [one["met"] for one in found] == [met for *_, met in claims]
        (alone,) = evaluate_goals(goals[:1], table)
        first, second = evaluate_goals(goals[:2], table)
        assert first["p"] == pytest.approx(2 * alone["p"]) and second["p"] > 0.99
        assert alone["seeds"] == 5 and abs(alone["difference"]) == pytest.approx(0.02)
    none = evaluate_goals([Goal("g", "m", "lower", "ours", "absent")], table)[0]
    assert none["met"] is None and none["p"] is None
