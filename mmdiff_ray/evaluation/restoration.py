"""Restoration: the anchor from a masked image, against the rules that need no model."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdiff_ray.config import Config
from mmdiff_ray.evaluation.context import Context, Figure, Findings
from mmdiff_ray.evaluation.floors import biharmonic, mean_visible_colour, nearest_visible_pixel
from mmdiff_ray.evaluation.grids import Panel, grid
from mmdiff_ray.evaluation.lpips import Lpips
from mmdiff_ray.evaluation.statistics import Tally, mean_of
from mmdiff_ray.evaluation.weights import convolutions
from mmdiff_ray.modalities.masked_image import MaskedImageModality
from mmdiff_ray.registry import register

RULES = {
    "mean visible colour": mean_visible_colour,
    "nearest visible pixel": nearest_visible_pixel,
    "biharmonic": biharmonic,
}
SHOWN = ("mean visible colour", "nearest visible pixel")
"""The rules that stand in the picture."""


@register("evaluator", "restoration")
def evaluate_restoration(context: Context) -> Findings:
    """Measure restored images: L1 ([-1, 1] scale) and LPIPS (`evaluate.lpips`), of the whole and inside the
    hole with the visible pixels pasted, and of the visible part as the model made it."""
    findings = Findings()
    for name, modality in context.instances(MaskedImageModality).items():
        source = modality.made_from
        assert source is not None, f"{name} is made from nothing"
        rows = context.rows_with(name, source)
        restored = context.restored(name) if rows.any() else None
        if restored is not None:
            _measure(context, name, source, rows, restored[torch.from_numpy(rows)].numpy(), findings)
    return findings


def _check(config: Config) -> None:
    """Raise ConfigError where the weights that LPIPS needs are not on this machine."""
    for backbone in config.evaluate.lpips:
        convolutions(backbone)


evaluate_restoration.check = _check  # type: ignore[attr-defined]


def _measure(
    context: Context, name: str, source: str, rows: np.ndarray, restored: np.ndarray, findings: Findings
) -> None:
    masked, truth = context.truth(name, rows), context.truth(source, rows)
    visible = (masked[:, 3] > 0).numpy()
    rules = RULES if context.config.evaluate.floors else {}
    pasted = np.where(visible[:, None], masked[:, :3].numpy(), restored)
    answers = {
        "model": pasted,
        **{rule: fill(masked[:, :3].numpy(), visible) for rule, fill in rules.items()},
    }
    given = context.config.evaluate.inpaint == "given"  # else the visible pixels are the given ones
    measured = {
        "l1_hole": {rule: hole_l1(answer, truth.numpy(), visible) for rule, answer in answers.items()}
    }
    if given:
        measured["l1_visible"] = {"model": hole_l1(restored, truth.numpy(), ~visible)}
    for backbone in context.config.evaluate.lpips:
        distance = Lpips(backbone, context.model.device)
        key = "lpips" if backbone == "alex" else f"lpips_{backbone}"
        measured[key] = {
            rule: mean_of(distance(torch.from_numpy(answer), truth).cpu().numpy())
            for rule, answer in answers.items()
        }
        measured[f"{key}_hole"] = {
            rule: lpips_within(distance, answer, truth, ~visible) for rule, answer in answers.items()
        }
        if given:
            measured[f"{key}_visible"] = {"model": lpips_within(distance, restored, truth, visible)}
    for metric, tallies in measured.items():
        findings.figures.append(Figure.of(f"{source}_from_{name}/{metric}", "lower", tallies))
    findings.pictures[f"{source}_from_{name}"] = _picture(context, name, source, masked, truth, answers)


def hole_l1(answer: np.ndarray, truth: np.ndarray, visible: np.ndarray) -> Tally:
    """Return the mean absolute difference over holes, in pixels of [-1, 1].

    answer, truth: uint8 (n, 3, H, W); visible: bool (n, H, W).
    """
    hole = np.broadcast_to(~visible[:, None], truth.shape)
    away = np.abs(answer.astype(np.float64) - truth) / 127.5 * hole
    return Tally(away.sum((1, 2, 3)), hole.sum((1, 2, 3)).astype(np.float64))


def lpips_within(distance: Lpips, answer: np.ndarray, truth: Tensor, mask: np.ndarray) -> Tally:
    """Return the mean over images of LPIPS within a mask (`Lpips.within`); images of an empty mask do not
    count.

    answer, truth: uint8 (n, 3, H, W); mask: bool (n, H, W).
    """
    found = distance.within(torch.from_numpy(answer), truth, torch.from_numpy(mask)).double().cpu().numpy()
    counts = mask.reshape(len(mask), -1).any(axis=1)
    return Tally(np.where(counts, found, 0.0), np.where(counts, 1.0, 0.0))


def _picture(
    context: Context, name: str, source: str, masked: Tensor, truth: Tensor, answers: dict[str, np.ndarray]
) -> Image.Image:
    count = min(context.config.evaluate.grid_rows, len(truth))

    def tiles(values: np.ndarray) -> np.ndarray:
        return values[:count].transpose(0, 2, 3, 1)

    panels = [
        context.panel(name, masked[:count], "given"),
        Panel("restored", tiles(answers["model"]), "generated"),
        Panel("original", tiles(truth.numpy()), "truth"),
        *[Panel(rule, tiles(answers[rule]), "trivial rule") for rule in SHOWN if rule in answers],
    ]
    return grid(panels, title=f"{source} from {name}", subtitle="held-out rows; visible pixels pasted")
