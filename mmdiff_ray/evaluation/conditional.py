"""Masks, labels and embeddings predicted from the condition (`Context.condition`), with trivial rules."""

from typing import Any

import numpy as np
import torch

from mmdiff_ray.config.checks import one_of
from mmdiff_ray.evaluation.context import PAIRED, Context, Findings
from mmdiff_ray.evaluation.floors import (
    majority_class,
    mean_embedding,
    nearest_labels,
    nearest_palette_colour,
    threshold_fill,
    unlike_border,
)
from mmdiff_ray.evaluation.grids import Panel, grid
from mmdiff_ray.evaluation.retrieval import cosine
from mmdiff_ray.evaluation.segmentation import boundary_f, iou_tally
from mmdiff_ray.evaluation.statistics import Tally, mean_of
from mmdiff_ray.modalities.embedding import EmbeddingModality
from mmdiff_ray.modalities.image import ImageModality
from mmdiff_ray.modalities.label import LabelModality
from mmdiff_ray.modalities.labels import LabelsModality
from mmdiff_ray.modalities.mask import MaskModality
from mmdiff_ray.registry import register

NEIGHBOURS, KNOWN = 5, 10_000
"""Training rows whose labels vote, and among how many they are sought."""


@register("evaluator", "segmentation")
def evaluate_segmentation(context: Context) -> Findings:
    """Measure predicted masks: foreground IoU (two classes) or mean IoU, and boundary F."""
    findings, masks = Findings(), []
    shown = "likely" if context.model.is_likely(context.condition) else "sample"
    for name, modality, rows in context.predicted(MaskModality):
        known, classes = context.truth(name, rows), modality.prediction_channels
        cells = modality.void(known)
        void = None if cells is None else cells.numpy()
        truth = _without(void, known.numpy())
        rules = _mask_rules(context, modality, rows)
        for readout, suffix in PAIRED.items():
            candidates = {"model": context.prediction(name, rows, readout), **rules}
            candidates = {rule: _without(void, mask) for rule, mask in candidates.items()}
            overlap = {rule: iou_tally(mask, truth, classes, void) for rule, mask in candidates.items()}
            edges = {rule: mean_of(boundary_f(mask, truth, void=void)) for rule, mask in candidates.items()}
            metric = "iou" if classes == 2 else "miou"
            findings.add(f"{name}/{metric}{suffix}", "higher", overlap, context.ids(rows))
            findings.add(f"{name}/boundary_f{suffix}", "higher", edges, context.ids(rows))
        masks.append((name, modality, rows, context.prediction(name, rows, shown), truth, rules))
    shared = np.logical_and.reduce([rows for _, _, rows, *_ in masks])
    if masks and shared.any():
        title = f"masks from {', '.join(context.condition)}"
        panels = panels_of(context, masks, shared)
        picture = grid(panels, title=title, subtitle="held-out rows over random backgrounds")
        findings.pictures[title.replace(" ", "_")] = picture
    return findings


def _without(void: np.ndarray | None, mask: np.ndarray) -> np.ndarray:
    """Set void cells to class 0, so that all masks agree there."""
    return mask if void is None else np.where(void, 0, mask)


@register("evaluator", "labels")
def evaluate_labels(context: Context) -> Findings:
    """Measure the accuracy of predicted labels. Rules: the majority class of the training rows; with
    `evaluate.neighbours`, the most frequent class of the training rows with the nearest embeddings."""
    findings, by = Findings(), context.config.evaluate.neighbours
    if by is not None:
        one_of("evaluate.neighbours", by, list(context.instances(EmbeddingModality)))
    for name, modality, rows in context.predicted(LabelModality):
        truth = context.truth(name, rows).numpy()
        rules = {"majority class": mean_of(truth == majority_class(class_counts(context, modality, truth)))}
        if by is not None and (nearest := _of_neighbours(context, name, by, rows)) is not None:
            rules[f"{NEIGHBOURS} nearest rows by {by}"] = mean_of(nearest == truth)
        for readout, suffix in PAIRED.items():
            model = mean_of(context.prediction(name, rows, readout) == truth)
            findings.add(f"{name}/accuracy{suffix}", "higher", {"model": model, **rules}, context.ids(rows))
    return findings


def _of_neighbours(context: Context, name: str, by: str, rows: np.ndarray) -> np.ndarray | None:
    """Return labels (n,) by vote of the nearest training rows; None if rows have no such embedding."""
    if context.training is None or not context.rows_with(by)[rows].all():
        return None
    known = context.training(KNOWN)
    has = (known.real & known.present[by] & known.present[name]).numpy()
    if has.sum() < NEIGHBOURS:
        return None
    return nearest_labels(
        context.truth(by, rows).numpy(), known.data[by].numpy()[has], known.data[name].numpy()[has]
    )


@register("evaluator", "attributes")
def evaluate_attributes(context: Context) -> Findings:
    """Measure predicted sets of labels: the mean over labels of F1, and the fraction of exactly correct sets.

    Rules: every label; every label that most rows have, which is the best constant set label by label.
    """
    findings = Findings()
    for name, _, rows in context.predicted(LabelsModality):
        truth, ids = context.truth(name, rows).numpy(), context.ids(rows)
        rules = {
            "every label": np.ones_like(truth),
            "majority of each label": np.broadcast_to(truth.mean(0) > 0.5, truth.shape),
        }
        for readout, suffix in PAIRED.items():
            candidates = {"model": context.prediction(name, rows, readout), **rules}
            f1 = {rule: f1_tally(labels, truth) for rule, labels in candidates.items()}
            whole = {rule: mean_of((labels == truth).all(1)) for rule, labels in candidates.items()}
            findings.add(f"{name}/f1{suffix}", "higher", f1, ids)
            findings.add(f"{name}/subset_accuracy{suffix}", "higher", whole, ids)
    return findings


def f1_tally(predicted: np.ndarray, truth: np.ndarray) -> Tally:
    """Return the mean F1 over the labels that occur. predicted, truth: 0 or 1, (n, K)."""
    hits = (predicted.astype(bool) & truth.astype(bool)).astype(np.float64)
    return Tally(2 * hits, predicted.astype(np.float64) + truth)


@register("evaluator", "embeddings")
def evaluate_embeddings(context: Context) -> Findings:
    """Measure the cosine of predicted embeddings to the true ones. Rule: the mean embedding."""
    findings = Findings()
    for name, _, rows in context.predicted(EmbeddingModality):
        truth = context.truth(name, rows).numpy()
        mean = mean_of(cosine(np.broadcast_to(mean_embedding(truth), truth.shape), truth))
        for readout, suffix in PAIRED.items():
            model = mean_of(cosine(context.prediction(name, rows, readout), truth))
            tallies = {"model": model, "mean embedding": mean}
            findings.add(f"{name}/cosine{suffix}", "higher", tallies, context.ids(rows))
    return findings


def class_counts(context: Context, modality: Any, truth: np.ndarray) -> list[int]:
    """Return the count of each class in the training rows, or in `truth` (n,) if the manifest has none."""
    entry = context.columns.get(modality.column, {})
    known = [entry[key] for key in ("train_counts", "counts") if any(entry.get(key, ()))]
    return list(known[0]) if known else np.bincount(truth, minlength=modality.prediction_channels).tolist()


def _mask_rules(context: Context, modality: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return rule -> masks that it derives from the anchor image, if that is given."""
    if context.anchor not in context.condition or context.anchor not in context.instances(ImageModality):
        return {}
    image, colors = context.truth(context.anchor, rows).numpy(), modality.options.colors
    if modality.prediction_channels == 2:
        return {
            "threshold + fill": threshold_fill(image).astype(np.uint8),
            "unlike the border": unlike_border(image).astype(np.uint8),
        }
    if not any(color is not None for color in colors or ()):
        return {}
    nearest = nearest_palette_colour(image, colors)
    return {
        "nearest palette colour": nearest,
        "nearest palette colour, unlike the border": np.where(unlike_border(image), nearest, np.uint8(0)),
    }


def panels_of(context: Context, masks: list[tuple], rows: np.ndarray) -> list[Panel]:
    """Return panels of the first `rows`: the condition, then each predicted mask, its truth and best rule.

    masks: (instance, modality, its rows bool (B,), predicted, truth, rule -> mask); all have `rows`.
    """
    count = min(context.config.evaluate.grid_rows, int(rows.sum()))
    panels = [
        Panel.of(context.denoiser.modalities[name], name, context.truth(name, rows)[:count], "given")
        for name in context.condition
    ]
    for name, modality, own_rows, predicted, truth, rules in masks:
        columns = [(name, predicted, "generated"), (f"true {name}", truth, "truth")]
        columns += [(rule, mask, "trivial rule") for rule, mask in list(rules.items())[-1:]]
        for title, mask, note in columns:
            panels.append(Panel.of(modality, title, torch.from_numpy(mask[rows[own_rows]][:count]), note))
    return panels
