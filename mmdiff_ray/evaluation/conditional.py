"""What the model says of a given anchor, or of what else is told: masks, labels, embeddings, beside rules."""

from typing import Any

import numpy as np
import torch

from mmdiff_ray.evaluation.context import PAIRED, Context, Figure, Findings
from mmdiff_ray.evaluation.floors import (
    majority_class,
    mean_embedding,
    nearest_palette_colour,
    threshold_fill,
    unlike_border,
)
from mmdiff_ray.evaluation.grids import Panel, grid
from mmdiff_ray.evaluation.retrieval import cosine
from mmdiff_ray.evaluation.segmentation import boundary_f, foreground_iou, mean_iou_tally
from mmdiff_ray.evaluation.statistics import Tally, mean_of
from mmdiff_ray.modalities.embedding import EmbeddingModality
from mmdiff_ray.modalities.image import ImageModality
from mmdiff_ray.modalities.label import LabelModality
from mmdiff_ray.modalities.mask import MaskModality
from mmdiff_ray.registry import register


@register("evaluator", "segmentation")
def evaluate_segmentation(context: Context) -> Findings:
    """Measure masks from the condition (`Context.condition`): foreground IoU (two classes) or mean IoU, and
    boundary F, of a sample and of the most likely answer; picture those of the task's own readout."""
    findings, answers = Findings(), []
    shown_readout = "likely" if context.model.is_likely(context.condition) else "sample"
    for name, modality in context.asked(MaskModality).items():
        rows = context.rows_with(name, *context.condition)
        if not rows.any():
            continue
        truth = context.truth(name, rows).numpy()
        rules = _mask_rules(context, modality, rows)
        for readout, ending in PAIRED.items():
            masks = {"model": context.answer(name, rows, readout), **rules}
            metric, tallies = _overlap(masks, truth, modality.prediction_channels)
            edges = {rule: mean_of(boundary_f(mask, truth)) for rule, mask in masks.items()}
            findings.figures.append(
                Figure.of(f"{name}/{metric}{ending}", "higher", tallies, context.ids(rows))
            )
            findings.figures.append(
                Figure.of(f"{name}/boundary_f{ending}", "higher", edges, context.ids(rows))
            )
        answers.append((name, modality, rows, context.answer(name, rows, shown_readout), truth, rules))
    shared = np.logical_and.reduce([rows for _, _, rows, *_ in answers])
    if answers and shared.any():
        title = f"masks from {', '.join(context.condition)}"
        panels = mask_panels(context, answers, shared)
        picture = grid(panels, title=title, subtitle="held-out rows over random backgrounds")
        findings.pictures[title.replace(" ", "_")] = picture
    return findings


def _overlap(masks: dict[str, np.ndarray], truth: np.ndarray, classes: int) -> tuple[str, dict[str, Tally]]:
    """Return the name of the figure that compares masks of so many classes, and it for each of the masks."""
    if classes == 2:
        return "iou", {rule: mean_of(foreground_iou(mask, truth)) for rule, mask in masks.items()}
    return "miou", {rule: mean_iou_tally(mask, truth, classes) for rule, mask in masks.items()}


@register("evaluator", "labels")
def evaluate_labels(context: Context) -> Findings:
    """Measure labels from the condition: accuracy of a sample and of the most likely answer, beside the
    majority class of the training rows."""
    findings = Findings()
    for name, modality in context.asked(LabelModality).items():
        rows = context.rows_with(name, *context.condition)
        if rows.any():
            truth = context.truth(name, rows).numpy()
            common = majority_class(class_counts(context, modality, truth))
            for readout, ending in PAIRED.items():
                answer = context.answer(name, rows, readout)
                tallies = {"model": mean_of(answer == truth), "majority class": mean_of(truth == common)}
                findings.figures.append(
                    Figure.of(f"{name}/accuracy{ending}", "higher", tallies, context.ids(rows))
                )
    return findings


@register("evaluator", "embeddings")
def evaluate_embeddings(context: Context) -> Findings:
    """Measure embeddings from the given anchor: cosine of a sample and of the most likely answer to the
    truth, beside the mean embedding."""
    findings = Findings()
    for name in context.asked(EmbeddingModality):
        rows = context.rows_with(name, *context.condition)
        if rows.any():
            truth = context.truth(name, rows).numpy()
            mean = mean_of(cosine(np.broadcast_to(mean_embedding(truth), truth.shape), truth))
            for readout, ending in PAIRED.items():
                answer = mean_of(cosine(context.answer(name, rows, readout), truth))
                tallies = {"model": answer, "mean embedding": mean}
                findings.figures.append(
                    Figure.of(f"{name}/cosine{ending}", "higher", tallies, context.ids(rows))
                )
    return findings


def class_counts(context: Context, modality: Any, truth: np.ndarray) -> list[int]:
    """Return how often the training rows have each class; where that is not known, all rows, or those of
    `truth`, int (n,)."""
    facts = context.columns.get(modality.column, {})
    known = [facts[key] for key in ("train_counts", "counts") if any(facts.get(key, ()))]
    return list(known[0]) if known else np.bincount(truth, minlength=modality.prediction_channels).tolist()


def _mask_rules(context: Context, modality: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the masks that rules without a model give: threshold + fill, or the nearest of the classes'
    colours."""
    if context.anchor not in context.condition or context.anchor not in context.instances(ImageModality):
        return {}
    image = context.truth(context.anchor, rows).numpy()
    if modality.prediction_channels == 2:
        return {
            "threshold + fill": threshold_fill(image).astype(np.uint8),
            "unlike the border": unlike_border(image).astype(np.uint8),
        }
    colors = modality.options.colors
    if not colors or not any(color is not None for color in colors):
        return {}
    return {
        "nearest palette colour": nearest_palette_colour(image, colors),
        "nearest palette colour, unlike the border": nearest_palette_colour(
            image, colors, unlike_border(image)
        ),
    }


def mask_panels(context: Context, answers: list[tuple], rows: np.ndarray) -> list[Panel]:
    """Return the first of some rows, which all answers have: the anchor, then each answer, truth and rule.

    answers: (instance, its modality, its rows bool (B,), answer, truth, rule -> mask), the masks of its rows.
    """
    count = min(context.config.evaluate.grid_rows, int(rows.sum()))
    shown = [context.panel(name, context.truth(name, rows)[:count], "given") for name in context.condition]
    for name, modality, own_rows, answer, truth, rules in answers:
        rule, mask = next(reversed(rules.items()), ("", None))
        wanted = [(name, answer, "generated"), (f"true {name}", truth, "truth"), (rule, mask, "trivial rule")]
        for title, masks, note in wanted:
            if masks is not None:
                tiles = torch.from_numpy(masks[rows[own_rows]][:count])
                shown.append(Panel(title, modality.picture(tiles), note))
    return shown
