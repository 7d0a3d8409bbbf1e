"""Spaces: corners, conditions, what breaks the prior, what changes nothing."""

import math
import random

import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.sweeps.space import check_space, combinations, corners, drawn, effect, make_space
from tests.sweeps import tiny
from tests.sweeps.tiny import WEIGHTS


def make_of(sweep):
    manifests = read_sources(sweep.config({}))
    return lambda values: resolve_modalities(sweep.config(values), manifests)


def checked(folder, data, **changes):
    sweep = tiny.sweep(folder, data, **changes)
    return check_space(sweep.space, make_of(sweep))


def test_corners_are_all_ends_and_conditions_drop_what_does_not_apply():
    space = make_space(
        {
            "family": {"choice": ["a", "b"]},
            "shape": {"uniform": [0, 1], "when": {"family": ["a"]}},
            "count": {"randint": [1, 5]},
        }
    )
    found = corners(space)
    assert len(found) == len({str(values) for values in found}) == 2 * 2 + 2
    assert {values["count"] for values in found} == {1, 5}
    assert all(("shape" in values) == (values["family"] == "a") for values in found)


def test_points_inside_lie_in_their_ranges_evenly():
    space = make_space({"x": {"loguniform": [0.01, 100]}, "n": {"randint": [0, 2]}, "u": {"uniform": [1, 2]}})
    rng = random.Random(0)
    points = [drawn(space, rng) for _ in range(600)]
    assert all(0.01 <= point["x"] <= 100 and 1 <= point["u"] <= 2 for point in points)
    middle = sum(math.log(point["x"]) for point in points) / len(points)
    assert abs(middle) < 0.4  # the logarithms are even around 1
    assert {point["n"] for point in points} == {0, 1, 2}


def test_a_grid_is_every_combination_that_applies_once():
    space = make_space(
        {"family": {"grid": ["a", "b"]}, "shape": {"grid": [1, 2, 3], "when": {"family": "a"}}}
    )
    assert combinations(space) == [
        {"family": "a", "shape": 1},
        {"family": "a", "shape": 2},
        {"family": "a", "shape": 3},
        {"family": "b"},
    ]


def test_points_that_break_the_prior_are_counted_and_no_valid_point_is_an_error(tmp_path, sprites):
    space = {
        f"{WEIGHTS}.family": {"choice": ["clock", "constant"]},
        f"{WEIGHTS}.scale": {"uniform": [1, 2]},
    }
    seen = checked(tmp_path, sprites, space=space)
    assert 0 < sum(seen.refused.values()) < seen.tried
    assert seen.good is not None and seen.good[f"{WEIGHTS}.family"] == "clock" and seen.inert == []
    space[f"{WEIGHTS}.family"] = {"choice": ["constant"]}
    with pytest.raises(ConfigError, match=r"all \d+ tested points are invalid.*nats per dimension"):
        checked(tmp_path, sprites, space=space)


KAPPA = {"modalities.pixels.weights.kappa": {"uniform": [0.5, 2]}}


@pytest.mark.parametrize(
    ("space", "overrides", "is_inert"),
    [
        ({f"{WEIGHTS}.kappa": {"uniform": [0.5, 2]}}, [], True),  # no task gives it
        (KAPPA, [], True),  # given values reach the network outside of z
        (KAPPA, ["given.input=z_only"], False),
        (
            {"modalities.pixels.weights.scale": {"uniform": [0.5, 2]}},
            [],
            True,
        ),  # the anchor's is fixed
        ({"loss.coefficients.l0": {"uniform": [0, 2]}}, [], True),  # has no gradient
        ({"loss.gamma": {"uniform": [1, 9]}}, [], True),  # of min_snr only
        ({f"{WEIGHTS}.shape": {"uniform": [0.5, 2]}}, [f"{WEIGHTS}.family=linear"], True),  # has no shape
        ({"loss.channel_cap": {"uniform": [1, 9]}}, [], False),
        ({"loss.modalities.shape": {"uniform": [0.1, 1]}}, [], False),
        ({"loss.coefficients.l2": {"uniform": [0.1, 1]}}, [], False),
        ({f"{WEIGHTS}.scale": {"uniform": [0.1, 1]}}, [], False),
    ],
)
def test_dimensions_without_an_effect_are_reported(tmp_path, sprites, space, overrides, is_inert):
    assert bool(checked(tmp_path, sprites, space=space, overrides=overrides).inert) is is_inert


def test_the_effect_of_a_configuration_is_what_training_depends_on(tmp_path, sprites):
    make = make_of(tiny.sweep(tmp_path, sprites))
    same = effect(make({f"{WEIGHTS}.family": "clock", f"{WEIGHTS}.kappa": 1.0}))
    assert same == effect(make({f"{WEIGHTS}.family": "clock", f"{WEIGHTS}.kappa": 3.0}))
    assert same != effect(make({f"{WEIGHTS}.family": "linear"}))
