"""Restoration of the anchor from a masked image, compared with rules without a model."""

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.evaluation.context import PAIRED, Context, Figure, Findings
from mmdiff_ray.evaluation.fidelity import FEATURES, kernel_distance
from mmdiff_ray.evaluation.floors import biharmonic, mean_visible_colour, nearest_visible_pixel
from mmdiff_ray.evaluation.grids import Panel, grid
from mmdiff_ray.evaluation.lpips import Lpips, check_weights
from mmdiff_ray.evaluation.statistics import Tally, mean_of
from mmdiff_ray.modalities.masked_image import MaskedImageModality
from mmdiff_ray.registry import register

RULES = {
    "mean visible colour": mean_visible_colour,
    "nearest visible pixel": nearest_visible_pixel,
    "biharmonic": biharmonic,
}
PICTURED = ("mean visible colour", "nearest visible pixel")


@register("evaluator", "restoration")
def evaluate_restoration(context: Context) -> Findings:
    """Measure restored images against the originals and as a set, with visible pixels pasted.

    Errors: L1 (pixels in [-1, 1]) and LPIPS (`evaluate.lpips`) of the whole image and of the hole; of the
    visible part, without pasting. Realism: `kid`, the kernel distance of LPIPS features to the originals, and
    `gradient_error`, the mean |log| ratio of gradient energy in the hole to that of the original. All are
    reported for a sample and for the most likely image, which is closer to the original and smoother.
    `lpips_between` is the distance between two samples for one hole.
    """
    findings = Findings()
    for name, modality in context.instances(MaskedImageModality).items():
        source = modality.made_from
        assert source is not None, f"{name} is not made from another instance"
        rows = context.rows_with(name, source)
        if not rows.any():
            continue
        sampled = {readout: context.restored(name, readout) for readout in (*PAIRED, "again")}
        restored = {
            readout: images[torch.from_numpy(rows)].numpy()
            for readout, images in sampled.items()
            if images is not None
        }
        if restored:
            _measure(context, name, source, rows, restored, findings)
    return findings


evaluate_restoration.check = check_weights  # type: ignore[attr-defined]


def _measure(
    context: Context,
    name: str,
    source: str,
    rows: np.ndarray,
    restored: dict[str, np.ndarray],
    findings: Findings,
) -> None:
    """Add the figures and the picture of a masked image. restored: read-out -> uint8 (n, 3, H, W)."""
    settings, ids = context.config.evaluate, context.ids(rows)
    lpips = {one: Lpips(one, context.model.device) for one in dict.fromkeys(["alex", *settings.lpips])}
    masked, truth = context.truth(name, rows), context.truth(source, rows)
    given, visible = masked[:, :3].numpy(), (masked[:, 3] > 0).numpy()
    rules = {rule: fill(given, visible) for rule, fill in RULES.items()} if settings.floors else {}
    pasted = {readout: np.where(visible[:, None], given, images) for readout, images in restored.items()}
    real = lpips["alex"].features(truth).double().cpu().numpy()
    for readout, suffix in PAIRED.items():
        if readout not in restored:
            continue
        images = {"model": pasted[readout], **rules}
        unpasted = {"model": restored[readout]} if settings.inpaint == "given" else {}
        compared = {key: lpips[key] for key in settings.lpips}
        for metric, tallies in _distances(compared, images, unpasted, truth, visible).items():
            if tallies:
                findings.add(f"{source}_from_{name}/{metric}{suffix}", "lower", tallies, ids)
        if len(truth) > 1:
            kid = {
                rule: kernel_distance(
                    real, lpips["alex"].features(torch.from_numpy(one)).double().cpu().numpy()
                )
                for rule, one in images.items()
            }
            key = f"{source}_from_{name}/kid_{FEATURES}{suffix}"
            findings.figures.append(Figure(key, kid.pop("model"), "lower", len(truth), kid))
    if "again" in restored:
        second = torch.from_numpy(pasted["sample"])
        between = {"model": lpips_within(lpips["alex"], pasted["again"], second, ~visible)}
        findings.add(f"{source}_from_{name}/lpips_between", "higher", between, ids)
    shown = "likely" if context.model.is_likely([name]) and "likely" in pasted else "sample"
    columns = [("restored", pasted[shown], "generated"), ("original", truth.numpy(), "truth")]
    columns += [(rule, rules[rule], "trivial rule") for rule in PICTURED if rule in rules]
    count = min(settings.grid_rows, len(truth))
    panels = [Panel.of(context.denoiser.modalities[name], name, masked[:count], "given")]
    panels += [Panel(title, images[:count].transpose(0, 2, 3, 1), note) for title, images, note in columns]
    findings.pictures[f"{source}_from_{name}"] = grid(
        panels, title=f"{source} from {name}", subtitle="held-out rows; visible pixels pasted"
    )


def _distances(
    lpips: dict[str, Lpips],
    pasted: dict[str, np.ndarray],
    unpasted: dict[str, np.ndarray],
    truth: Tensor,
    visible: np.ndarray,
) -> dict[str, dict[str, Tally]]:
    """Return metric -> "model" or rule -> distance to the truth; images are uint8 (n, 3, H, W)."""
    original = truth.numpy()
    metrics = {
        "l1_hole": {rule: hole_l1(images, original, visible) for rule, images in pasted.items()},
        "gradient_error": {rule: gradient_error(one, original, visible) for rule, one in pasted.items()},
        "l1_visible": {rule: hole_l1(images, original, ~visible) for rule, images in unpasted.items()},
    }
    for backbone, distance in lpips.items():
        key = "lpips" if backbone == "alex" else f"lpips_{backbone}"
        metrics[key] = {
            rule: mean_of(distance(torch.from_numpy(images), truth).cpu().numpy())
            for rule, images in pasted.items()
        }
        metrics[f"{key}_hole"] = {
            rule: lpips_within(distance, images, truth, ~visible) for rule, images in pasted.items()
        }
        metrics[f"{key}_visible"] = {
            rule: lpips_within(distance, images, truth, visible) for rule, images in unpasted.items()
        }
    return metrics


def gradient_error(images: np.ndarray, truth: np.ndarray, visible: np.ndarray) -> Tally:
    """Return the mean over images of |log(energy of the image / that of the truth)| in the hole.

    The energy is the sum of squared differences of adjacent pixels, at least one of them in the hole, with
    pixels in [-1, 1]. Adding 1 to both energies reduces the weight of flat holes. images, truth: uint8 (n, 3,
    H, W);
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

    return mean_of(np.abs(np.log((energy(images) + 1) / (energy(truth) + 1))))


def hole_l1(images: np.ndarray, truth: np.ndarray, visible: np.ndarray) -> Tally:
    """Return the mean absolute difference over holes, in pixels of [-1, 1].

    images, truth: uint8 (n, 3, H, W); visible: bool (n, H, W).
    """
    hole = np.broadcast_to(~visible[:, None], truth.shape)
    away = np.abs(images.astype(np.float64) - truth) / 127.5 * hole
    return Tally(away.sum((1, 2, 3)), hole.sum((1, 2, 3)).astype(np.float64))


def lpips_within(distance: Lpips, images: np.ndarray, truth: Tensor, mask: np.ndarray) -> Tally:
    """Return the mean of LPIPS within a mask (`Lpips.within`) over the images with a non-empty mask.

    images, truth: uint8 (n, 3, H, W); mask: bool (n, H, W).
    """
    found = distance.within(torch.from_numpy(images), truth, torch.from_numpy(mask)).double().cpu().numpy()
    counts = mask.reshape(len(mask), -1).any(axis=1)
    return Tally(np.where(counts, found, 0.0), np.where(counts, 1.0, 0.0))
