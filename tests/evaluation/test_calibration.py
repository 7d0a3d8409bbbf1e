"""Probabilities of the label head: calibration by its definition, and what the head says before any step."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from mmdiff_ray.diffusion import rng
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN
from mmdiff_ray.evaluation.calibration import (
    calibration_error,
    evaluate_calibration,
    first_step,
    negative_log_likelihood,
)
from mmdiff_ray.evaluation.context import AGAIN, Context
from mmdiff_ray.evaluation.run import joined
from tests import sprites as tiny

ROWS = 10


def some_probabilities(rows: int = 4000, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities, and classes drawn with them."""
    generator = np.random.default_rng(seed)
    predicted = generator.dirichlet(np.full(classes, 0.5), size=rows)
    truth = (generator.random(rows)[:, None] > predicted.cumsum(1)).sum(1)
    return predicted, np.minimum(truth, classes - 1)


def test_calibration_error_is_the_mean_gap_of_scikit_learns_curve() -> None:
    predicted, truth = some_probabilities()
    right, confidence = predicted.argmax(1) == truth, predicted.max(1)
    share, mean = calibration_curve(right, confidence, n_bins=15)
    counts = np.histogram(confidence, np.linspace(0, 1, 16))[0]
    expected = (np.abs(share - mean) * counts[counts > 0]).sum() / len(truth)
    assert calibration_error(predicted, truth) == pytest.approx(expected)


def test_true_probabilities_are_calibrated_and_sharper_ones_are_not() -> None:
    predicted, truth = some_probabilities()
    sharp = predicted**3 / (predicted**3).sum(1, keepdims=True)
    assert calibration_error(predicted, truth) < 0.03
    assert calibration_error(sharp, truth) > 0.1


def test_certain_predictions_cost_their_error_rate() -> None:
    predicted = np.array([[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]])
    assert calibration_error(predicted, np.array([0, 1, 1, 1])) == pytest.approx(0.25)


def test_bins_are_closed_above() -> None:
    """0.6 lies at the upper end of the third of five bins: a row there and one at 0.5 share it."""
    predicted = np.array([[0.6, 0.4], [0.5, 0.5]])
    assert calibration_error(predicted, np.array([0, 1]), bins=5) == pytest.approx(abs(0.4 - 0.5) / 2)


def test_likelihood_is_scikit_learns_log_loss_and_stays_finite() -> None:
    predicted, truth = some_probabilities()
    assert negative_log_likelihood(predicted, truth).mean() == pytest.approx(
        log_loss(truth, predicted, labels=range(4)), rel=1e-6
    )
    assert np.isfinite(negative_log_likelihood(np.array([[1.0, 0.0]]), np.array([1]))).all()


@pytest.fixture(scope="module")
def context(sprites: str) -> Context:
    job = tiny.job(sprites)
    batch = joined(tiny.held_out(job, ROWS, size=4))
    return Context(tiny.generator(job), batch.where(batch.real))


def test_the_head_sees_prior_noise_without_the_label(context: Context) -> None:
    batch, denoiser = context.batch, context.denoiser
    ids, one = torch.arange(ROWS), torch.ones(ROWS, dtype=torch.float64)
    told = {"pixels": GIVEN, "masked": ABSENT}
    roles = {name: torch.full((ROWS,), told.get(name, GENERATED)) for name in denoiser.modalities}
    given = {"pixels": batch.data["pixels"]}
    codes = denoiser.encode(given)
    predicted = []
    for draw in range(context.config.evaluate.draws):
        seed = context.config.seed + draw * AGAIN
        z = rng.normal(seed, "sample prior", 0 * ids, ids, (denoiser.process.channels, 8, 8))
        z = z + denoiser.process.place(codes, {"pixels": denoiser.process.betas(one, roles)["pixels"]})
        with torch.no_grad():
            predicted.append(denoiser(z, one, roles, codes, denoiser.conditions(given)).heads)
    for name in ("shape", "shapes"):
        expected = np.mean([heads[name].softmax(1).numpy() for heads in predicted], axis=0)
        assert np.allclose(first_step(context, [name])[name], expected, atol=1e-6)


def test_figures_are_tallies_beside_what_the_class_frequencies_reach(context: Context) -> None:
    found = {figure.key: figure for figure in evaluate_calibration(context).figures}
    metrics = ("accuracy", "nll", "calibration_error")
    assert set(found) == {f"{name}/head_{metric}" for name in ("shape", "shapes") for metric in metrics}
    predicted, masks = first_step(context, ["shapes"])["shapes"], context.truth("shapes").numpy().astype(int)
    likelihood = np.take_along_axis(predicted, masks[:, None], 1)
    assert found["shapes/head_nll"].value == pytest.approx(-np.log(likelihood).mean())
    assert found["shapes/head_accuracy"].value == pytest.approx((predicted.argmax(1) == masks).mean())
    truth, nll = context.truth("shape").numpy(), found["shape/head_nll"]
    assert nll.rows == ROWS and len(nll.tallies["model"]) == ROWS
    counts = np.bincount(truth, minlength=6)
    chances = np.tile((counts + 1) / (ROWS + 6), (ROWS, 1))
    assert nll.floors == pytest.approx({"class frequencies": log_loss(truth, chances, labels=range(6))})
    assert found["shape/head_accuracy"].floors["majority class"] == counts.max() / ROWS
    predicted = first_step(context, ["shape"])["shape"]
    assert nll.value == pytest.approx(-np.log(predicted[np.arange(ROWS), truth]).mean())
    assert found["shape/head_accuracy"].value == (predicted.argmax(1) == truth).mean()
    assert found["shape/head_calibration_error"].value == pytest.approx(calibration_error(predicted, truth))


@pytest.mark.parametrize(
    "others",
    [{}, {"train_counts": [0] * 6}, {"counts": [99, 1, 0, 1, 0, 98], "train_counts": [0, 1, 0, 1, 0, 98]}],
)
def test_rules_count_the_classes_of_the_data_set_where_they_are_known(context: Context, others) -> None:
    """All but two training rows are of the last class: the rules bet on it, whatever comes."""
    counts = [0, 1, 0, 1, 0, 98]
    known = Context(context.model, context.batch, {"shape": {"counts": counts, **others}})
    found = {figure.key: figure for figure in evaluate_calibration(known).figures}
    truth = context.truth("shape").numpy()
    assert found["shape/head_accuracy"].floors == {"majority class": (truth == 5).mean()}
    chances = (np.array(counts) + 1) / 106
    assert found["shape/head_nll"].floors["class frequencies"] == pytest.approx(
        -np.log(chances[truth]).mean()
    )


def test_without_a_predicted_label_there_are_no_figures(sprites: str) -> None:
    job = tiny.job(sprites, "tasks.understand.roles.shape=absent", "tasks.understand.roles.shapes=absent")
    batch = joined(tiny.held_out(job, ROWS, size=4))
    assert evaluate_calibration(Context(tiny.generator(job), batch.where(batch.real))).figures == []


def test_void_cells_are_in_no_figure(sprites: str) -> None:
    job = tiny.job(sprites)
    batch = joined(tiny.held_out(job, ROWS, size=4))
    context = Context(tiny.generator(job), batch.where(batch.real))
    known = {figure.key: figure for figure in evaluate_calibration(context).figures}
    mask = context.denoiser.modalities["shapes"]
    mask.options = dataclasses.replace(mask.options, void=255)
    context.batch.data["shapes"][:, :2] = 255
    context.batch.data["shapes"][0] = 255
    found = {figure.key: figure for figure in evaluate_calibration(context).figures}
    for key in ("shapes/head_accuracy", "shapes/head_nll"):
        tally = found[key].tallies["model"]
        assert tally.denominator.tolist() == [0.0, *[1.0] * (len(tally.denominator) - 1)]
        assert np.isfinite(tally.numerator).all() and found[key].value != known[key].value
    assert 0 <= found["shapes/head_calibration_error"].value <= 1
