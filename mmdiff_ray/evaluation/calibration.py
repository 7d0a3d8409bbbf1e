"""Whether the probabilities of label and mask heads can be believed, asked at the first step of sampling."""

import numpy as np

from mmdiff_ray.evaluation.conditional import class_counts
from mmdiff_ray.evaluation.context import AGAIN, Context, Figure, Findings
from mmdiff_ray.evaluation.draws import Ask
from mmdiff_ray.evaluation.floors import majority_class
from mmdiff_ray.evaluation.statistics import mean_of
from mmdiff_ray.modalities.label import LabelModality
from mmdiff_ray.modalities.mask import MaskModality
from mmdiff_ray.registry import register

BINS = 15
SMALLEST = 1e-12
"""Probabilities below count as this one in a likelihood, which stays finite."""


@register("evaluator", "calibration")
def evaluate_calibration(context: Context) -> Findings:
    """Measure label and mask probabilities from the condition: accuracy, likelihood, calibration.

    Heads are asked at t = 1 alone, where z_t is the prior's noise and what is given, and averaged over
    `evaluate.draws` draws of the noise: at smaller t the code that was sampled shows in z_t, and the head
    repeats it with a confidence of its own. Without guidance, which sharpens what a head says. `head_nll` is
    in nats, of a mask the mean over cells; its floor are the frequencies of the classes, for labels of the
    data set's, each counted once more than it is there. The calibration error is no sum over rows and has no
    tally; it has no floor either, for one answer for all that is the frequencies is always calibrated.
    """
    findings = Findings()
    labels, masks = context.asked(LabelModality), context.asked(MaskModality)
    probabilities = first_step(context, [*labels, *masks])
    for name, modality in {**labels, **masks}.items():
        rows = context.rows_with(name, *context.condition)
        if not rows.any():
            continue
        said, truth = probabilities[name][rows], context.truth(name, rows).numpy().astype(int)
        classes = said.shape[1]
        counts = (
            class_counts(context, modality, truth)
            if name in labels
            else np.bincount(truth.ravel(), minlength=classes).tolist()
        )
        smooth = np.array(counts) + 1
        shape = (1, classes, *[1] * (said.ndim - 2))
        frequencies = np.broadcast_to((smooth / smooth.sum()).reshape(shape), said.shape)
        nll = {
            "model": mean_of(_per_row(negative_log_likelihood(said, truth))),
            "class frequencies": mean_of(_per_row(negative_log_likelihood(frequencies, truth))),
        }
        accuracy = {
            "model": mean_of(_per_row(said.argmax(1) == truth)),
            "majority class": mean_of(_per_row(truth == majority_class(counts))),
        }
        error = calibration_error(said, truth)
        findings.figures.extend(
            [
                Figure.of(f"{name}/head_accuracy", "higher", accuracy, context.ids(rows)),
                Figure.of(f"{name}/head_nll", "lower", nll, context.ids(rows)),
                Figure(f"{name}/head_calibration_error", error, "lower", len(truth)),
            ]
        )
    return findings


def _per_row(values: np.ndarray) -> np.ndarray:
    """Return the mean over a row's cells, float64 (n,)."""
    return values.reshape(len(values), -1).mean(1)


def first_step(context: Context, names: list[str]) -> dict[str, np.ndarray]:
    """Return the class probabilities of instances at t = 1, instance -> (B, K) or (B, K, H, W).

    The mean over `evaluate.draws` draws, the first on the noise that sampling starts from.
    """
    if not names:
        return {}
    totals: dict[str, np.ndarray] = {}
    draws = context.config.evaluate.draws
    for draw in range(draws):
        asks = [
            Ask(
                start,
                len(part),
                context.roles(context.condition),
                {name: part.data[name] for name in context.condition},
                seed=context.config.seed + draw * AGAIN,
                steps=1,
                sampler=context.config.evaluate.sampler,
                heads=names,
            )
            for start, part in context.parts()
        ]
        number = f" {draw}" if draw else ""
        heads = context.drawn(f"first step given {' '.join(context.condition)}{number}", asks).heads
        for name in names:
            totals[name] = totals.get(name, 0.0) + heads[name].double().softmax(1).numpy() / draws
    return totals


def negative_log_likelihood(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return -log of what the true class was given, in nats, float64 (n, ...).

    probabilities: (n, K, ...); truth: int (n, ...).
    """
    given = np.take_along_axis(probabilities, truth[:, None], axis=1)[:, 0]
    return -np.log(np.maximum(given, SMALLEST))


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error, in [0, 1]: how far confidence lies from accuracy.

    probabilities: (n, K, ...); truth: int (n, ...). The largest probability of each row (of each cell) falls
    into one of `bins` bins of equal width, each closed above; the error is the mean over rows (over cells) of
    their bin's |accuracy - mean confidence|. It is biased upwards where bins hold few rows.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    confidence = probabilities.max(1)
    surplus = ((probabilities.argmax(1) == truth) - confidence).ravel()  # (n,)
    where = np.clip(np.ceil(confidence.ravel() * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(where, weights=surplus, minlength=bins)).sum() / truth.size)
