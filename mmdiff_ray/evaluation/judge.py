"""Pairs of an image and a label as an outside classifier sees them: a model that was trained apart."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.evaluation.context import Context, Figure, Findings
from mmdiff_ray.evaluation.draws import CHUNK
from mmdiff_ray.evaluation.statistics import mean_of
from mmdiff_ray.modalities.label import LabelModality
from mmdiff_ray.registry import register
from mmdiff_ray.training.export import load_export
from mmdiff_ray.training.inference import Generator


@register("evaluator", "judge")
def evaluate_judge(context: Context) -> Findings:
    """Measure how often the judge gives a sampled image the label that it was sampled with, or for.

    The judge is the exported model at `evaluate.judge`, one that tells labels from the given anchor; it is
    asked once, at t = 1. Samples are joint ones, or follow the instances in `evaluate.condition`. Beside
    `LABEL/judged` stand the labels of other samples as floor, and `LABEL/judged_real`, how often the judge
    is right about the real images.
    """
    findings = Findings()
    if context.config.evaluate.judge is None:
        return findings
    judge = load_export(context.config.evaluate.judge, str(context.model.device))
    condition = context.config.evaluate.condition
    for name in context.instances(LabelModality):
        rows = context.rows_with(name, context.anchor, *condition)
        labelled = name in condition or context.trained(name, *condition)
        if not rows.any() or not labelled or not context.trained(context.anchor, *condition):
            continue
        kept = torch.from_numpy(rows)
        drawn = context.sampled(*condition).data
        said = judged(judge, name, drawn[context.anchor][kept])
        wanted = drawn[name].cpu()[kept].numpy()
        pairs = {
            "model": mean_of(said == wanted),
            "labels of other samples": mean_of(said == np.roll(wanted, 1)),
        }
        findings.figures.append(Figure.of(f"{name}/judged", "higher", pairs))
        real = judged(judge, name, context.truth(context.anchor, rows)) == context.truth(name, rows).numpy()
        findings.figures.append(Figure.of(f"{name}/judged_real", "higher", {"model": mean_of(real)}))
    return findings


def _check(config: Config) -> None:
    """Raise ConfigError where the judge is no exported model."""
    judge = config.evaluate.judge
    if judge is not None and not (Path(judge) / "config.yaml").is_file():
        raise ConfigError(f"evaluate.judge: {judge} holds no exported model")


evaluate_judge.check = _check  # type: ignore[attr-defined]


def judged(judge: Generator, name: str, images: Tensor) -> np.ndarray:
    """Return the label that the judge gives each image, int64 (n,). images: uint8 (n, 3, H, W)."""
    given = {judge.denoiser.anchor: images.cpu().numpy()}
    return judge.draw(given, len(images), steps=1, batch=CHUNK).data[name].cpu().numpy()
