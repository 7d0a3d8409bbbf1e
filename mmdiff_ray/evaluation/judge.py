"""Samples as an outside model sees them: whether an image shows what it was sampled with."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.evaluation.context import Context, Figure, Findings
from mmdiff_ray.evaluation.draws import CHUNK
from mmdiff_ray.evaluation.retrieval import cosine
from mmdiff_ray.evaluation.segmentation import foreground_iou, mean_iou_tally
from mmdiff_ray.evaluation.statistics import Tally, mean_of
from mmdiff_ray.modalities.base import Modality
from mmdiff_ray.modalities.embedding import EmbeddingModality
from mmdiff_ray.modalities.label import LabelModality
from mmdiff_ray.modalities.mask import MaskModality
from mmdiff_ray.registry import register
from mmdiff_ray.sampling.export import load_export
from mmdiff_ray.sampling.generator import Generator


@register("evaluator", "judge")
def evaluate_judge(context: Context) -> Findings:
    """Measure how well what the judge tells of a sampled image agrees with what it was sampled with, or for.

    The judge is the exported model at `evaluate.judge`, one that tells labels, masks or embeddings from the
    given anchor; it is asked once, at t = 1. Samples are joint ones, or follow the instances in
    `evaluate.condition`. `INSTANCE/judged` is the accuracy of a label, the IoU of a mask (mean IoU of one of
    several classes) or the cosine of an embedding; beside it stands the same with those of other samples as
    floor, and `INSTANCE/judged_real`, what the judge reaches on the real images.
    """
    findings = Findings()
    if context.config.evaluate.judge is None:
        return findings
    judge = load_export(context.config.evaluate.judge, str(context.model.device))
    condition = context.config.evaluate.condition
    if not context.trained(context.anchor, *condition):
        return findings
    drawn = context.sampled(*condition).data
    about_drawn = judged(judge, drawn[context.anchor])
    about_real = judged(judge, context.truth(context.anchor))
    for name, word, agreement in _told(context, about_drawn):
        rows = context.rows_with(name, context.anchor, *condition)
        if not rows.any():
            continue
        wanted, said = drawn[name].cpu().numpy()[rows], about_drawn[name][rows]
        pairs = {
            "model": agreement(said, wanted),
            f"{word} of other samples": agreement(said, np.roll(wanted, 1, axis=0)),
        }
        findings.figures.append(Figure.of(f"{name}/judged", "higher", pairs, context.ids(rows)))
        real = agreement(about_real[name][rows], context.truth(name, rows).numpy())
        findings.figures.append(
            Figure.of(f"{name}/judged_real", "higher", {"model": real}, context.ids(rows))
        )
    return findings


def _check(config: Config) -> None:
    """Raise ConfigError where the judge is no exported model."""
    judge = config.evaluate.judge
    if judge is not None and not (Path(judge) / "config.yaml").is_file():
        raise ConfigError(f"evaluate.judge: {judge} holds no exported model")


evaluate_judge.check = _check  # type: ignore[attr-defined]


def judged(judge: Generator, images: Tensor) -> dict[str, np.ndarray]:
    """Return what the judge tells of images, instance -> its data. images: uint8 (n, 3, H, W)."""
    given = {judge.denoiser.anchor: images.cpu().numpy()}
    drawn = judge.draw(given, len(images), steps=1, batch=CHUNK, likely=False).data
    return {name: data.cpu().numpy() for name, data in drawn.items()}


def _same_labels(modality: Any, said: np.ndarray, wanted: np.ndarray) -> Tally:
    return mean_of(said == wanted)


def _masks_overlap(modality: Any, said: np.ndarray, wanted: np.ndarray) -> Tally:
    classes = modality.prediction_channels
    return mean_of(foreground_iou(said, wanted)) if classes == 2 else mean_iou_tally(said, wanted, classes)


def _embeddings_point_alike(modality: Any, said: np.ndarray, wanted: np.ndarray) -> Tally:
    return mean_of(cosine(said, wanted))


KINDS: Mapping[type[Modality], tuple[str, Callable[[Any, np.ndarray, np.ndarray], Tally]]] = {
    LabelModality: ("labels", _same_labels),
    MaskModality: ("masks", _masks_overlap),
    EmbeddingModality: ("embeddings", _embeddings_point_alike),
}
"""What a judge can tell: the word for many of it, and how well answers, (n, ...), agree with others."""


def _told(
    context: Context, answers: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, str, Callable[[np.ndarray, np.ndarray], Tally]]]:
    """Yield the instances that samples have and the judge tells: name, the word for many, how to compare."""
    condition = context.config.evaluate.condition
    for kind, (word, agreement) in KINDS.items():
        for name, modality in context.instances(kind).items():
            if name in answers and (name in condition or context.trained(name, *condition)):
                yield name, word, partial(agreement, modality)
