"""Whether the label head's probabilities can be believed, asked once at the first step of sampling."""

import numpy as np

from mmdiff_ray.evaluation.conditional import class_counts
from mmdiff_ray.evaluation.context import Context, Figure, Findings
from mmdiff_ray.evaluation.draws import Ask
from mmdiff_ray.evaluation.floors import majority_class
from mmdiff_ray.evaluation.statistics import mean_of
from mmdiff_ray.modalities.label import LabelModality
from mmdiff_ray.registry import register

BINS = 15
SMALLEST = 1e-12
"""Probabilities below count as this one in a likelihood, which stays finite."""


@register("evaluator", "calibration")
def evaluate_calibration(context: Context) -> Findings:
    """Measure the label head's probabilities from the given anchor: accuracy, likelihood and calibration.

    The head is asked at t = 1 alone, where z_t is the prior's noise and what is given: at smaller t the code
    of the label that was sampled shows in z_t, and the head repeats it with a confidence of its own. Without
    guidance, which sharpens what a head says. `head_nll` is in nats; its floor are the frequencies of the
    data set's classes, each counted once more than it is there. The calibration error is no sum over rows and
    has no tally; it has no floor either, for one answer for all that is the frequencies is always calibrated.
    """
    findings = Findings()
    instances = context.asked(LabelModality)
    probabilities = first_step(context, list(instances))
    for name, modality in instances.items():
        rows = context.rows_with(name, *context.told)
        if not rows.any():
            continue
        said, truth = probabilities[name][rows], context.truth(name, rows).numpy()
        counts = class_counts(context, modality, truth)
        smooth = np.array(counts) + 1
        frequencies = np.broadcast_to(smooth / smooth.sum(), said.shape)
        nll = {
            "model": mean_of(negative_log_likelihood(said, truth)),
            "class frequencies": mean_of(negative_log_likelihood(frequencies, truth)),
        }
        accuracy = {
            "model": mean_of(said.argmax(1) == truth),
            "majority class": mean_of(truth == majority_class(counts)),
        }
        error = calibration_error(said, truth)
        findings.figures.extend(
            [
                Figure.of(f"{name}/head_accuracy", "higher", accuracy),
                Figure.of(f"{name}/head_nll", "lower", nll),
                Figure(f"{name}/head_calibration_error", error, "lower", len(truth)),
            ]
        )
    return findings


def first_step(context: Context, names: list[str]) -> dict[str, np.ndarray]:
    """Return the class probabilities of label instances at t = 1 with the anchor given, instance -> (B, K).

    One call of the denoiser per row, on the noise that sampling starts from.
    """
    if not names:
        return {}
    asks = [
        Ask(
            start,
            len(part),
            context.roles(context.told),
            {name: part.data[name] for name in context.told},
            seed=context.config.seed,
            steps=1,
            sampler=context.config.evaluate.sampler,
            heads=names,
        )
        for start, part in context.parts()
    ]
    heads = context.drawn(f"first step given {' '.join(context.told)}", asks).heads
    return {name: heads[name].double().softmax(1).numpy() for name in names}


def negative_log_likelihood(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return -log of what each row's true class was given, in nats, float64 (n,).

    probabilities: (n, K); truth: int (n,).
    """
    return -np.log(np.maximum(probabilities[np.arange(len(truth)), truth], SMALLEST))


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error, in [0, 1]: how far confidence lies from accuracy.

    probabilities: (n, K); truth: int (n,). The largest probability of each row falls into one of `bins` bins
    of equal width, each closed above; the error is the mean over rows of their bin's |accuracy - mean
    confidence|. It is biased upwards where bins hold few rows.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    confidence = probabilities.max(1)
    surplus = (probabilities.argmax(1) == truth) - confidence  # (n,)
    where = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(where, weights=surplus, minlength=bins)).sum() / len(truth))
