"""Fidelity and diversity of a set of sampled images, compared with real held-out images."""

import contextlib
import io
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.evaluation.context import Context, Figure, Findings
from mmdiff_ray.evaluation.lpips import Lpips, check_weights
from mmdiff_ray.evaluation.statistics import mean_of
from mmdiff_ray.registry import register

FEATURES = "lpips_alex"
"""The features of all distances, `Lpips("alex").features`; part of the figures' names."""
NEAREST = 5
TRAINING = 2_000
"""Training images among which copies are sought."""
LEAST = NEAREST + 2
"""Fewest images of a set: an image, its 5 neighbours, and one more."""
BETTER = {
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
    "frechet": "lower",
}


@register("evaluator", "fidelity")
def evaluate_fidelity(context: Context) -> Findings:
    """Compare sampled anchor images with as many real held-out images; latents of both are decoded.

    Samples are joint ones, or follow the instances in `evaluate.condition`.
    `ANCHOR/METRIC_lpips_alex` compares all samples with all real images. Rule: the real images with their
    pixels shuffled, which keeps each image's colours and nothing else. `.../real_METRIC_lpips_alex` is a
    ceiling: one half of the real images against the other. A Frechet distance grows as images get fewer, so
    `.../half_frechet_lpips_alex` compares as many samples with that other half: only this compares with the
    ceiling. All these are to held-out images, so memorised training images pass as new ones:
    `ANCHOR/memorised_lpips_alex` is the share of samples that are nearer to one of the first 2,000 training
    images than 95 % of the held-out images are; 0.05 without memorisation.
    """
    findings, anchor, condition = Findings(), context.anchor, context.config.evaluate.condition
    rows, modality = context.rows_with(anchor, *condition), context.denoiser.modalities[anchor]
    if not context.trained(anchor, *condition) or rows.sum() < LEAST:
        return findings
    images = modality.pixels(context.truth(anchor, rows))
    if images is None:
        return findings
    drawn = modality.pixels(context.sampled(*condition).data[anchor])
    lpips = Lpips("alex", context.model.device)
    real, sampled, shuffled = (
        lpips.features(pixels).double().cpu().numpy()
        for pixels in (
            images,
            drawn[torch.from_numpy(rows)] if condition else drawn,
            shuffled_pixels(images, context.config.seed),
        )
    )
    scores, floors, half = compare(real, sampled), compare(real, shuffled), len(real) // 2

    def add(metric: str, value: float, count: int, floors: Mapping[str, float]) -> None:
        better = BETTER[metric.split("_")[-1]]
        findings.figures.append(Figure(f"{anchor}/{metric}_{FEATURES}", value, better, count, floors))

    for metric in BETTER:
        add(metric, scores[metric], len(sampled), {"shuffled pixels": floors[metric]})
    if half >= LEAST:
        for metric, value in compare(real[half:], real[:half]).items():
            add(f"real_{metric}", value, half, {})
        add("half_frechet", frechet_distance(real[half:], sampled[:half]), half, {})
    if context.training is not None:
        known = context.training(TRAINING)
        pixels = modality.pixels(known.data[anchor][known.real & known.present[anchor]])
        if pixels is not None and len(pixels):
            trained = lpips.features(pixels).double().cpu().numpy()
            ours, theirs = memorised(sampled, real, trained)
            tallies = {"model": mean_of(ours), "held-out images": mean_of(theirs)}
            ids = context.ids(rows) if condition else context.ids()
            findings.add(f"{anchor}/memorised_{FEATURES}", "lower", tallies, ids)
    return findings


def memorised(samples: np.ndarray, real: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which samples, and which held-out images, are nearer to a training image than 95 % of the
    held-out images are, float64 (n,) and (m,).

    samples: (n, D); real: (m, D), held out; trained: (k, D).
    """
    ours, theirs = (
        np.array([np.square(trained - row).sum(axis=1).min() for row in rows]) for rows in (samples, real)
    )
    near = np.quantile(theirs, 0.05)
    return (ours < near).astype(float), (theirs < near).astype(float)


evaluate_fidelity.check = check_weights  # type: ignore[attr-defined]


def compare(real: np.ndarray, sampled: np.ndarray) -> dict[str, float]:
    """Return precision, recall, density, coverage (of the 5 nearest) and Frechet distance of features.

    real: (n, D); sampled: (m, D). Raises ValueError for fewer than 7 of either.
    Source: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020, by its
    authors' package; precision and recall of Kynkaanniemi et al., NeurIPS 2019.
    """
    if min(len(real), len(sampled)) < LEAST:
        raise ValueError(f"want at least {LEAST} real and sampled; got {len(real)} and {len(sampled)}")
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):  # the package prints the counts
        found = compute_prdc(real_features=real, fake_features=sampled, nearest_k=NEAREST)
    found["frechet"] = frechet_distance(real, sampled)
    return {metric: float(found[metric]) for metric in BETTER}


def kernel_distance(real: np.ndarray, sampled: np.ndarray) -> float:
    """Return the unbiased squared maximum mean discrepancy of two sets of features, which may be negative.

    real: (n, D); sampled: (m, D), n and m at least 2. The kernel is (x . y / D + 1)^3 on features of unit
    mean square over the real set, so that the distance does not depend on their scale.
    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """
    if min(len(real), len(sampled)) < 2:
        raise ValueError(f"want at least 2 rows of each; got {len(real)} and {len(sampled)}")
    scale = np.sqrt(np.square(real, dtype=np.float64).mean()) or 1.0
    x, y = real / scale, sampled / scale

    def kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return (first @ second.T / first.shape[1] + 1) ** 3

    def within(rows: np.ndarray) -> float:
        values = kernel(rows, rows)
        return float((values.sum() - np.trace(values)) / (len(rows) * (len(rows) - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the squared Frechet distance of the Gaussians with the means and covariances of two sets.

    first: (n, D); second: (m, D); covariances with n - 1 and m - 1. |difference of means|^2 + tr(A + B - 2
    sqrt(A B)), where the last trace is the sum of the singular values of X Y^T for A = X^T X and B = Y^T Y.
    Without a matrix root, this also works for n < D, although the estimate is then too large. Raises
    ValueError for fewer than 2 rows.
    Source: Dowson and Landau, "The Frechet Distance between Multivariate Normal Distributions", 1982.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a covariance needs at least 2 rows; got {len(first)} and {len(second)}")
    x, y = _factor(first), _factor(second)
    away = first.mean(0, dtype=np.float64) - second.mean(0, dtype=np.float64)
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(max(0.0, away @ away + np.square(x).sum() + np.square(y).sum() - 2 * shared))


def _factor(rows: np.ndarray) -> np.ndarray:
    """Return X of at most D rows with X^T X the covariance, (min(n, D), D)."""
    centred = (rows - rows.mean(0, dtype=np.float64)) / np.sqrt(len(rows) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def shuffled_pixels(images: Tensor, seed: int) -> Tensor:
    """Shuffle the pixels of each image (n, 3, H, W) independently."""
    generator = torch.Generator().manual_seed(seed)
    flat = images.flatten(2)  # (n, 3, H * W)
    order = torch.rand(len(flat), 1, flat.shape[2], generator=generator).argsort(dim=2)
    return flat.gather(2, order.expand_as(flat)).reshape(images.shape)
