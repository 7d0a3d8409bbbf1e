"""Errors of maps and F1 of sets of labels against scikit-learn and geometry."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, mean_absolute_percentage_error, root_mean_squared_error

from mmdiff_ray.evaluation import regression
from mmdiff_ray.evaluation.conditional import f1_tally


def some_maps(seed: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 9, (3, channels, 4, 5))


def test_errors_are_the_means_over_rows_of_scikit_learns():
    guess, truth = some_maps(0), some_maps(1)
    truth[0, :, :2] = truth[2] = np.nan
    known = ~np.isnan(truth).any(1)
    for measure, oracle in (
        (regression.root_mean_square, root_mean_squared_error),
        (regression.relative_error, mean_absolute_percentage_error),
    ):
        wanted = [oracle(truth[row, 0][known[row]], guess[row, 0][known[row]]) for row in (0, 1)]
        found = regression.per_row(measure, guess, truth, known)
        assert found.value == pytest.approx(np.mean(wanted)) and found.denominator.tolist() == [1, 1, 0]


def test_angle_of_vectors_does_not_depend_on_their_length():
    turned = np.radians(30)
    truth = np.array([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    guess = 3 * np.array([[np.sin(turned), 0.0], [0.0, 2.0], [np.cos(turned), 0.0]])
    assert regression.angular_error(guess, truth) == pytest.approx((30 + 90) / 2)


def test_mean_map_is_over_the_rows_that_know_a_cell():
    truth = some_maps(0)
    truth[0, 0, 0, 0] = truth[:, 0, 1, 1] = np.nan
    found = regression.mean_map(truth)
    assert found[0, 0, 0] == pytest.approx(truth[1:, 0, 0, 0].mean())
    assert found[0, 1, 1] == pytest.approx(np.nanmean(truth))


def test_f1_of_labels_is_scikit_learns_over_the_labels_that_occur():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 2, (2, 20, 5)).astype(np.uint8)
    truth[:, 4] = predicted[:, 4] = 0
    wanted = f1_score(truth[:, :4], predicted[:, :4], average="macro")
    assert f1_tally(predicted, truth).value == pytest.approx(wanted)
