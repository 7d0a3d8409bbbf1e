"""Restoration: the anchor from a masked image, against the rules that need no model."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdiff_ray.config import Config
from mmdiff_ray.evaluation.context import PAIRED, Context, Figure, Findings
from mmdiff_ray.evaluation.fidelity import FEATURES, kernel_distance
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
    hole with the visible pixels pasted, and of the visible part as the model made it.

    Both a sample and the most likely answer, which is nearer to the truth and smoother. How real either looks
    beside the originals: the kernel distance of LPIPS features (`kid`), and `gradient_error`, the mean over
    images of |log| of the ratio of gradient energy in the hole to the original's. `lpips_between` is the
    distance of two samples for one hole: how much they differ.
    """
    findings = Findings()
    for name, modality in context.instances(MaskedImageModality).items():
        source = modality.made_from
        assert source is not None, f"{name} is made from nothing"
        rows = context.rows_with(name, source)
        if not rows.any():
            continue
        restored = {readout: context.restored(name, readout) for readout in (*PAIRED, "again")}
        answers = {
            readout: image[torch.from_numpy(rows)].numpy()
            for readout, image in restored.items()
            if image is not None
        }
        if answers:
            _measure(context, name, source, rows, answers, findings)
    return findings


def _check(config: Config) -> None:
    """Raise ConfigError where the weights that LPIPS needs are not on this machine."""
    for backbone in {"alex", *config.evaluate.lpips}:
        convolutions(backbone)


evaluate_restoration.check = _check  # type: ignore[attr-defined]


def _measure(
    context: Context,
    name: str,
    source: str,
    rows: np.ndarray,
    restored: dict[str, np.ndarray],
    findings: Findings,
) -> None:
    """Add the figures and the picture of a masked image. restored: readout -> the model's images."""
    masked, truth = context.truth(name, rows), context.truth(source, rows)
    given, visible = masked[:, :3].numpy(), (masked[:, 3] > 0).numpy()
    rules = RULES if context.config.evaluate.floors else {}
    filled = {rule: fill(given, visible) for rule, fill in rules.items()}
    pasted = {key: np.where(visible[:, None], given, image) for key, image in restored.items()}
    for readout, ending in PAIRED.items():
        if readout not in restored:
            continue
        answers = {"model": pasted[readout], **filled}
        measured = _distances(context, answers, restored[readout], truth, visible)
        for metric, tallies in measured.items():
            figure = Figure.of(f"{source}_from_{name}/{metric}{ending}", "lower", tallies, context.ids(rows))
            findings.figures.append(figure)
        realism = {rule: _realism(context, answer, truth) for rule, answer in answers.items()}
        floors = {rule: value for rule, value in realism.items() if rule != "model"}
        key = f"{source}_from_{name}/kid_{FEATURES}{ending}"
        if len(truth) > 1:
            findings.figures.append(Figure(key, realism["model"], "lower", len(truth), floors))
    if "again" in restored:
        between = lpips_within(
            Lpips("alex", context.model.device), pasted["again"], torch.from_numpy(pasted["sample"]), ~visible
        )
        findings.figures.append(
            Figure.of(f"{source}_from_{name}/lpips_between", "higher", {"model": between}, context.ids(rows))
        )
    shown = "likely" if context.model.is_likely([name]) and "likely" in pasted else "sample"
    answers = {"model": pasted[shown], **filled}
    findings.pictures[f"{source}_from_{name}"] = _picture(context, name, source, masked, truth, answers)


def _distances(
    context: Context, answers: dict[str, np.ndarray], restored: np.ndarray, truth: Tensor, visible: np.ndarray
) -> dict[str, dict[str, Tally]]:
    """Return metric -> "model" or rule -> its distance to the truth.

    answers: uint8 (n, 3, H, W) with the visible pixels pasted; restored: the model's without.
    """
    alone = context.config.evaluate.inpaint == "given"  # else the visible pixels are the given ones
    measured = {
        "l1_hole": {rule: hole_l1(answer, truth.numpy(), visible) for rule, answer in answers.items()},
        "gradient_error": {
            rule: gradient_error(answer, truth.numpy(), visible) for rule, answer in answers.items()
        },
    }
    if alone:
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
        if alone:
            measured[f"{key}_visible"] = {"model": lpips_within(distance, restored, truth, visible)}
    return measured


def _realism(context: Context, answer: np.ndarray, truth: Tensor) -> float:
    """Return the kernel distance of restored images to the originals, in LPIPS features."""
    distance = Lpips("alex", context.model.device)
    real, made = (
        distance.features(images).double().cpu().numpy() for images in (truth, torch.from_numpy(answer))
    )
    return kernel_distance(real, made) if len(real) > 1 else float("nan")


def gradient_error(answer: np.ndarray, truth: np.ndarray, visible: np.ndarray) -> Tally:
    """Return the mean over images of |log(energy of the answer / that of the truth)| in the hole.

    The energy is the sum of squared differences of neighbouring pixels, of which one at least is missing, in
    pixels of [-1, 1]; 1 is added to both, so that flat holes count little. answer, truth: uint8 (n, 3, H, W);
    visible: bool (n, H, W).
    """

    def energy(images: np.ndarray) -> np.ndarray:
        pixels, hole = images / 127.5, ~visible[:, None]
        total = np.zeros(len(images))
        for axis in (2, 3):
            step = np.diff(pixels, axis=axis)
            first = np.take(hole, range(hole.shape[axis] - 1), axis=axis)
            second = np.take(hole, range(1, hole.shape[axis]), axis=axis)
            total += (np.square(step) * (first | second)).sum((1, 2, 3))
        return total

    return mean_of(np.abs(np.log((energy(answer) + 1) / (energy(truth) + 1))))


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
