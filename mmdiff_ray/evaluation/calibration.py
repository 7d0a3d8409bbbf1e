"""Calibration of the class probabilities of label and mask heads, at the first step of sampling."""

import numpy as np

from mmdiff_ray.evaluation.conditional import class_counts
from mmdiff_ray.evaluation.context import AGAIN, Context, Figure, Findings
from mmdiff_ray.evaluation.floors import majority_class
from mmdiff_ray.evaluation.statistics import Tally
from mmdiff_ray.modalities.label import LabelModality
from mmdiff_ray.modalities.mask import MaskModality
from mmdiff_ray.registry import register

BINS = 15
SMALLEST = 1e-12
"""Lower limit of a probability in a likelihood, which keeps it finite."""


@register("evaluator", "calibration")
def evaluate_calibration(context: Context) -> Findings:
    """Measure accuracy, likelihood and calibration error of heads given the condition.

    Heads are evaluated only at t = 1, where z_t has prior noise and given codes, and averaged over
    `evaluate.draws` noise draws. At smaller t, z_t contains the sampled code, and the head would only repeat
    it. Guidance is off, because it sharpens probabilities. `head_nll` is in nats; for masks it is the mean
    over cells. Its rule predicts the class frequencies, with one added to each count. The calibration error
    has no tally, because it is not a sum over rows, and no rule, because a constant prediction of the
    frequencies is always calibrated.
    """
    findings = Findings()
    found = [*context.predicted(LabelModality), *context.predicted(MaskModality)]
    heads = first_step(context, [name for name, *_ in found])
    for name, modality, rows in found:
        probabilities, data = heads[name][rows], context.truth(name, rows)
        void, classes = modality.void(data), probabilities.shape[1]
        known = np.ones(data.shape, bool) if void is None else ~void.numpy()
        truth = np.where(known, data.numpy(), 0).astype(int)
        if truth.ndim == 1:
            counts = class_counts(context, modality, truth)
        else:
            counts = np.bincount(truth[known], minlength=classes).tolist()
        smooth = np.array(counts) + 1
        shape = (1, classes, *[1] * (probabilities.ndim - 2))
        frequencies = np.broadcast_to((smooth / smooth.sum()).reshape(shape), probabilities.shape)
        accuracy = {
            "model": _mean_over_rows(probabilities.argmax(1) == truth, known),
            "majority class": _mean_over_rows(truth == majority_class(counts), known),
        }
        nll = {
            "model": _mean_over_rows(negative_log_likelihood(probabilities, truth), known),
            "class frequencies": _mean_over_rows(negative_log_likelihood(frequencies, truth), known),
        }
        findings.add(f"{name}/head_accuracy", "higher", accuracy, context.ids(rows))
        findings.add(f"{name}/head_nll", "lower", nll, context.ids(rows))
        error = calibration_error(np.moveaxis(probabilities, 1, -1)[known], truth[known])
        findings.figures.append(Figure(f"{name}/head_calibration_error", error, "lower", len(truth)))
    return findings


def _mean_over_rows(values: np.ndarray, known: np.ndarray) -> Tally:
    """Return the tally of the mean over rows of each row's mean over known cells. values, known: (n, ...)."""
    cells = known.reshape(len(known), -1).sum(1)
    sums = np.where(known, values, 0).reshape(len(known), -1).sum(1)
    return Tally(sums / np.maximum(cells, 1), (cells > 0).astype(np.float64))


def first_step(context: Context, names: list[str]) -> dict[str, np.ndarray]:
    """Return class probabilities at t = 1, instance -> (B, K) or (B, K, H, W).

    The mean over `evaluate.draws` draws of the noise; the first is the noise that sampling starts from.
    """
    if not names:
        return {}
    totals: dict[str, np.ndarray] = {}
    draws = context.config.evaluate.draws
    given = {name: context.batch.data[name] for name in context.condition}
    for draw in range(draws):
        requests = context.requests(given, seed=context.config.seed + draw * AGAIN, steps=1, heads=names)
        number = f" {draw}" if draw else ""
        heads = context.sample(f"first step given {' '.join(context.condition)}{number}", requests).heads
        for name in names:
            totals[name] = totals.get(name, 0.0) + heads[name].double().softmax(1).numpy() / draws
    return totals


def negative_log_likelihood(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return -log of the true class's probability, in nats, float64 (n, ...).

    probabilities: (n, K, ...); truth: int (n, ...).
    """
    true_class = np.take_along_axis(probabilities, truth[:, None], axis=1)[:, 0]
    return -np.log(np.maximum(true_class, SMALLEST))


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error, in [0, 1].

    probabilities: (n, K, ...); truth: int (n, ...). The largest probability of each row (of each cell) falls
    into one of `bins` bins of equal width, each closed above; the error is the mean over rows (over cells) of
    their bin's |accuracy - mean confidence|. It is biased upwards if bins have few rows.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    confidence = probabilities.max(1)
    surplus = ((probabilities.argmax(1) == truth) - confidence).ravel()  # (n,)
    where = np.clip(np.ceil(confidence.ravel() * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(where, weights=surplus, minlength=bins)).sum() / truth.size)
