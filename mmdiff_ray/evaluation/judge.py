"""Agreement of sampled images with their conditions, as predicted by a separately trained model."""

from pathlib import Path

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
from mmdiff_ray.sampling.export import load_export
from mmdiff_ray.sampling.generator import Generator

KINDS: dict[type[Modality], str] = {
    LabelModality: "labels",
    MaskModality: "masks",
    EmbeddingModality: "embeddings",
}
"""Modality types that a judge predicts -> their plural, for the name of the rule."""


@register("evaluator", "judge")
def evaluate_judge(context: Context) -> Findings:
    """Measure how well a judge's predictions from sampled images agree with what was sampled or given.

    The judge is the exported model at `evaluate.judge`, which predicts labels, masks or embeddings from the
    anchor in one step, at t = 1. Samples are joint ones, or follow the instances in `evaluate.condition`.
    `INSTANCE/judged` is the accuracy of a label, the IoU of a mask (mean IoU of one of several classes) or
    the cosine of an embedding. Rule: those of other samples. `INSTANCE/judged_real` is the judge's score on
    the real images.
    """
    findings, anchor = Findings(), context.anchor
    settings = context.config.evaluate
    condition = settings.condition
    if settings.judge is None or not context.trained(anchor, *condition):
        return findings
    judge = load_export(settings.judge, str(context.model.device))
    drawn = context.sampled(*condition).data
    of_samples, of_real = judged(judge, drawn[anchor]), judged(judge, context.truth(anchor))
    for kind, plural in KINDS.items():
        for name, modality in context.instances(kind).items():
            rows = context.rows_with(name, anchor, *condition)
            is_sampled = name in condition or context.trained(name, *condition)
            if name not in of_samples or not is_sampled or not rows.any():
                continue
            wanted = drawn[name].cpu().numpy()[rows]
            tallies = {
                "model": _agreement(modality, of_samples[name][rows], wanted),
                f"{plural} of other samples": _agreement(
                    modality, of_samples[name][rows], np.roll(wanted, 1, axis=0)
                ),
            }
            real = _agreement(modality, of_real[name][rows], context.truth(name, rows).numpy())
            findings.add(f"{name}/judged", "higher", tallies, context.ids(rows))
            findings.add(f"{name}/judged_real", "higher", {"model": real}, context.ids(rows))
    return findings


def _check(config: Config) -> None:
    """Raise ConfigError where `evaluate.judge` is not an exported model."""
    judge = config.evaluate.judge
    if judge is not None and not (Path(judge) / "config.yaml").is_file():
        raise ConfigError(f"evaluate.judge: {judge} holds no exported model")


evaluate_judge.check = _check  # type: ignore[attr-defined]


def judged(judge: Generator, images: Tensor) -> dict[str, np.ndarray]:
    """Return the judge's predictions from images uint8 (n, 3, H, W), instance -> (n, ...)."""
    given = {judge.denoiser.anchor: images.cpu().numpy()}
    drawn = judge.draw(given, len(images), steps=1, batch=CHUNK, likely=False).data
    return {name: data.cpu().numpy() for name, data in drawn.items()}


def _agreement(modality: Modality, predicted: np.ndarray, wanted: np.ndarray) -> Tally:
    if isinstance(modality, MaskModality):
        return iou_tally(predicted, wanted, modality.prediction_channels)
    if isinstance(modality, EmbeddingModality):
        return mean_of(cosine(predicted, wanted))
    return mean_of(predicted == wanted)
