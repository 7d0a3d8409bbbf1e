"""Maps and vectors predicted from the condition (`Context.condition`), compared with their means."""

from collections.abc import Callable

import numpy as np
import torch

from mmdiff_ray.evaluation.conditional import panels_of
from mmdiff_ray.evaluation.context import PAIRED, Context, Findings
from mmdiff_ray.evaluation.grids import grid
from mmdiff_ray.evaluation.statistics import Tally, mean_of
from mmdiff_ray.modalities.map import MapModality
from mmdiff_ray.modalities.vector import VectorModality
from mmdiff_ray.registry import register

SOUNDS = 3
"""Rows whose predicted and true sounds are kept."""
Measure = Callable[[np.ndarray, np.ndarray], float]


@register("evaluator", "maps")
def evaluate_maps(context: Context) -> Findings:
    """Measure predicted maps over their known cells, averaged per row. Rule: the mean map.

    `rmse` is in the unit of the map. `abs_rel`, the mean of |error| / truth, is for positive maps.
    `angular_error`, in degrees, is for normals.
    """
    findings, shown = Findings(), "likely" if context.model.is_likely(context.condition) else "sample"
    for name, modality, rows in context.predicted(MapModality):
        truth, ids = context.truth(name, rows).numpy(), context.ids(rows)
        known = ~np.isnan(truth).any(1)
        rules = {"mean map": np.broadcast_to(mean_map(truth), truth.shape)}
        measures: dict[str, Measure] = {"rmse": root_mean_square}
        if modality.content == "normals":
            measures["angular_error"] = angular_error
        elif modality.low > 0:
            measures["abs_rel"] = relative_error
        for readout, suffix in PAIRED.items():
            candidates = {"model": context.prediction(name, rows, readout), **rules}
            for metric, measure in measures.items():
                tallies = {rule: per_row(measure, guess, truth, known) for rule, guess in candidates.items()}
                findings.add(f"{name}/{metric}{suffix}", "lower", tallies, ids)
        title = f"{name} from {', '.join(context.condition)}"
        predicted = context.prediction(name, rows, shown)
        for index, row in enumerate(zip(predicted[:SOUNDS], truth[:SOUNDS], strict=True)):
            for what, data in zip(("predicted", "true"), row, strict=True):
                if (wav := modality.wav(torch.from_numpy(data))) is not None:
                    findings.sounds[f"{name}_{index}_{what}"] = wav
        drawn = (name, modality, rows, predicted, truth, rules)
        picture = grid(panels_of(context, [drawn], rows), title, "held-out rows")
        findings.pictures[title.replace(" ", "_")] = picture
    return findings


@register("evaluator", "vectors")
def evaluate_vectors(context: Context) -> Findings:
    """Measure the mean absolute error of predicted vectors and scalars. Rule: the mean vector."""
    findings = Findings()
    for name, _, rows in context.predicted(VectorModality):
        truth = context.truth(name, rows).numpy()
        rules = {"mean": truth.mean(0, dtype=np.float64)}
        for readout, suffix in PAIRED.items():
            candidates = {"model": context.prediction(name, rows, readout), **rules}
            tallies = {
                rule: mean_of(np.abs(guess - truth).reshape(len(truth), -1).mean(1))
                for rule, guess in candidates.items()
            }
            findings.add(f"{name}/absolute_error{suffix}", "lower", tallies, context.ids(rows))
    return findings


def mean_map(truth: np.ndarray) -> np.ndarray:
    """Return the mean over rows of each cell's known values, (C, H, W).

    A cell without known values gets the mean over cells. truth: (n, C, H, W), NaN if unknown.
    """
    known = ~np.isnan(truth)
    total, count = np.where(known, truth, 0).sum(0, dtype=np.float64), known.sum(0)
    overall = total.sum((1, 2), keepdims=True) / np.maximum(count.sum((1, 2), keepdims=True), 1)
    return np.where(count > 0, total / np.maximum(count, 1), overall)


def per_row(measure: Measure, guess: np.ndarray, truth: np.ndarray, known: np.ndarray) -> Tally:
    """Return the mean of a measure over the rows with known cells. known: bool (n, H, W)."""
    rows = [
        measure(guess[index][:, cells].astype(np.float64), truth[index][:, cells].astype(np.float64))
        if cells.any()
        else 0.0
        for index, cells in enumerate(known)
    ]
    return Tally(np.array(rows), np.array([float(cells.any()) for cells in known]))


def root_mean_square(guess: np.ndarray, truth: np.ndarray) -> float:
    """Return the root mean square error over cells and channels. guess, truth: (C, cells)."""
    return float(np.sqrt(np.square(guess - truth).mean()))


def relative_error(guess: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean of |error| / truth. Source: Eigen et al., "Depth Map Prediction ...", NeurIPS 2014."""
    return float((np.abs(guess - truth) / truth).mean())


def angular_error(guess: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean angle between vectors (3, cells), in degrees."""
    norms = np.linalg.norm(guess, axis=0) * np.linalg.norm(truth, axis=0)
    cosine = (guess * truth).sum(0) / np.maximum(norms, 1e-12)
    return float(np.degrees(np.arccos(cosine.clip(-1, 1))).mean())
