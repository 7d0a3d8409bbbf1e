"""Agreement of sampled images with their conditions, as predicted by a separately trained model."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.evaluation.context import Context, Findings
from mmdiff_ray.evaluation.requests import CHUNK
from mmdiff_ray.evaluation.retrieval import cosine
from mmdiff_ray.evaluation.segmentation import iou_tally
from mmdiff_ray.evaluation.statistics import Tally, mean_of
from mmdiff_ray.modalities.base import Modality
from mmdiff_ray.modalities.embedding import EmbeddingModality
from mmdiff_ray.modalities.label import LabelModality
from mmdiff_ray.modalities.mask import MaskModality
from mmdiff_ray.registry import register
from mmdiff_ray.sampling.export import export_files, load_export
from mmdiff_ray.sampling.generator import Generator

Agreement = Callable[[Any, np.ndarray, np.ndarray], Tally]
KINDS: dict[type[Modality], tuple[str, Agreement]] = {
    LabelModality: ("labels", lambda _, predicted, wanted: mean_of(predicted == wanted)),
    MaskModality: (
        "masks",
        lambda mask, predicted, wanted: iou_tally(predicted, wanted, mask.prediction_channels),
    ),
    EmbeddingModality: ("embeddings", lambda _, predicted, wanted: mean_of(cosine(predicted, wanted))),
}
"""Modality types that a judge predicts -> their plural, and the agreement of two arrays (n, ...)."""


@register("evaluator", "judge")
def evaluate_judge(context: Context) -> Findings:
    """Measure how well a judge's predictions from sampled images agree with what was sampled or given.

    The judge is the exported model at `evaluate.judge`, which predicts labels, masks or embeddings from the
    anchor in one step, at t = 1. Samples are joint, or conditioned on `evaluate.condition`.
    `INSTANCE/judged` is the accuracy of a label, the IoU of a mask (mean IoU of one of several classes) or
    the cosine of an embedding. Rule: the values of other samples. `INSTANCE/judged_real` is the judge's score
    on the real images.
    """
    findings, anchor = Findings(), context.anchor
    settings = context.config.evaluate
    condition = settings.condition
    if settings.judge is None or not context.trained(anchor, *condition):
        return findings
    judge = load_export(settings.judge, str(context.model.device))
    drawn = context.sampled(*condition).data
    pixels = context.denoiser.modalities[anchor].pixels
    of_samples, of_real = judged(judge, pixels(drawn[anchor])), judged(judge, pixels(context.truth(anchor)))
    for kind, (plural, agreement) in KINDS.items():
        for name, modality in context.instances(kind).items():
            rows = context.rows_with(name, anchor, *condition)
            is_sampled = name in condition or context.trained(name, *condition)
            if name not in of_samples or not is_sampled or not rows.any():
                continue
            predicted, wanted = of_samples[name][rows], drawn[name].cpu().numpy()[rows]
            tallies = {
                "model": agreement(modality, predicted, wanted),
                f"{plural} of other samples": agreement(modality, predicted, np.roll(wanted, 1, axis=0)),
            }
            real = agreement(modality, of_real[name][rows], context.truth(name, rows).numpy())
            findings.add(f"{name}/judged", "higher", tallies, context.ids(rows))
            findings.add(f"{name}/judged_real", "higher", {"model": real}, context.ids(rows))
    return findings


def _check(config: Config) -> None:
    """Raise ConfigError if `evaluate.judge` is not an exported model."""
    judge = config.evaluate.judge
    if judge is not None and export_files(judge) is None:
        raise ConfigError(f"evaluate.judge: {judge} is not an exported model; see mmdiff export")


evaluate_judge.check = _check  # type: ignore[attr-defined]


def judged(judge: Generator, images: Tensor) -> dict[str, np.ndarray]:
    """Return the judge's predictions from images uint8 (n, 3, H, W), instance -> (n, ...)."""
    given = {judge.denoiser.anchor: images.cpu().numpy()}
    drawn = judge.draw(given, len(images), steps=1, batch=CHUNK, likely=False).data
    return {name: data.cpu().numpy() for name, data in drawn.items()}
