"""Joint samples' pictures as a set: whether they look like real ones, and differ as much among themselves."""

import contextlib
import io
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.config import Config
from mmdiff_ray.evaluation.context import Context, Figure, Findings
from mmdiff_ray.evaluation.lpips import Lpips
from mmdiff_ray.evaluation.weights import convolutions
from mmdiff_ray.modalities.image import ImageModality
from mmdiff_ray.registry import register

FEATURES = "lpips_alex"
"""What distances are measured in: `Lpips("alex").features`. Figures in other features are other figures."""
NEAREST = 5
LEAST = NEAREST + 2
"""Pictures that a set needs, so that each of them has the neighbours and one further."""
BETTER = {
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
    "frechet": "lower",
}


@register("evaluator", "fidelity")
def evaluate_fidelity(context: Context) -> Findings:
    """Measure joint samples' anchor images against real held-out images, as many as there are; or samples
    that follow the instances in `evaluate.condition`.

    `ANCHOR/METRIC_lpips_alex`: all samples against all real images; the floor is the real images with their
    pixels shuffled, each its own: the right colours and nothing else (a low floor, about 0 for all but the
    Frechet distance, unless images or their number are tiny). `.../real_METRIC_lpips_alex` is a
    ceiling: one half of the real images against the other. A Frechet distance is larger the fewer images it
    is taken from, so `.../half_frechet_lpips_alex` is what as many samples score against that other half:
    only this compares with the ceiling. All distances are to held-out images: pictures learned by heart from
    the training rows are not told apart from new ones.
    """
    findings, anchor, condition = Findings(), context.anchor, context.config.evaluate.condition
    rows = context.rows_with(anchor, *condition)
    if anchor not in context.instances(ImageModality) or not context.trained(anchor, *condition):
        return findings
    if int(rows.sum()) < LEAST:
        return findings
    distance = Lpips("alex", context.model.device)
    images = context.truth(anchor, rows)
    real = _features(distance, images)
    drawn = context.sampled(*condition).data[anchor]
    made = _features(distance, drawn[torch.from_numpy(rows)] if condition else drawn)
    shuffled = _features(distance, shuffled_pixels(images, context.config.seed))
    scores = {"model": compare(real, made), "shuffled pixels": compare(real, shuffled)}
    for metric, better in BETTER.items():
        floors = {rule: values[metric] for rule, values in scores.items() if rule != "model"}
        key = f"{anchor}/{metric}_{FEATURES}"
        findings.figures.append(Figure(key, scores["model"][metric], better, len(made), floors))
    half = len(real) // 2
    if half >= LEAST:
        ceiling = compare(real[half:], real[:half])
        findings.figures.extend(
            Figure(f"{anchor}/real_{metric}_{FEATURES}", ceiling[metric], better, half)
            for metric, better in BETTER.items()
        )
        value = frechet_distance(real[half:], made[:half])
        findings.figures.append(Figure(f"{anchor}/half_frechet_{FEATURES}", value, "lower", half))
    return findings


def _check(config: Config) -> None:
    """Raise ConfigError where the weights that the features need are not on this machine."""
    convolutions("alex")


evaluate_fidelity.check = _check  # type: ignore[attr-defined]


def _features(distance: Lpips, images: Tensor) -> np.ndarray:
    return distance.features(images).double().cpu().numpy()


def compare(real: np.ndarray, made: np.ndarray) -> Mapping[str, float]:
    """Return precision, recall, density, coverage (of the 5 nearest) and Frechet distance of features.

    real: (n, D); made: (m, D). Raises ValueError for fewer than 7 of either.
    Source: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020, by its
    authors' package; precision and recall of Kynkaanniemi et al., NeurIPS 2019.
    """
    if min(len(real), len(made)) < LEAST:
        raise ValueError(f"want at least {LEAST} real and made; got {len(real)} and {len(made)}")
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the counts
        found = compute_prdc(real_features=real, fake_features=made, nearest_k=NEAREST)
    return {**{name: float(value) for name, value in found.items()}, "frechet": frechet_distance(real, made)}


def kernel_distance(real: np.ndarray, made: np.ndarray) -> float:
    """Return the unbiased squared maximum mean discrepancy of two sets of features, which may be below 0.

    real: (n, D); made: (m, D), n and m at least 2. The kernel is (x . y / D + 1)^3 on features of unit mean
    square over the real set, so that the number does not depend on their scale.
    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """
    if min(len(real), len(made)) < 2:
        raise ValueError(f"want at least 2 rows of each; got {len(real)} and {len(made)}")
    scale = np.sqrt(np.square(real, dtype=np.float64).mean()) or 1.0
    x, y = real / scale, made / scale

    def kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return (first @ second.T / first.shape[1] + 1) ** 3

    def within(rows: np.ndarray) -> float:
        values = kernel(rows, rows)
        return float((values.sum() - np.trace(values)) / (len(rows) * (len(rows) - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the squared Frechet distance of the Gaussians with the means and covariances of two sets.

    first: (n, D); second: (m, D); covariances with n - 1 and m - 1. |difference of means|^2 + tr(A + B - 2
    sqrt(A B)), where the last trace is the sum of the singular values of X Y^T for A = X^T X and B = Y^T Y:
    no root of a matrix, so fewer rows than numbers do no harm but to the estimate, which is then too large.
    Raises ValueError for fewer than 2 rows.
    Source: Dowson and Landau, "The Frechet Distance between Multivariate Normal Distributions", 1982.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a covariance wants at least 2 rows; got {len(first)} and {len(second)}")
    x, y = _factor(first), _factor(second)
    away = first.mean(0, dtype=np.float64) - second.mean(0, dtype=np.float64)
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(max(0.0, away @ away + np.square(x).sum() + np.square(y).sum() - 2 * shared))


def _factor(rows: np.ndarray) -> np.ndarray:
    """Return X of at most D rows with X^T X the covariance, (min(n, D), D)."""
    centred = (rows - rows.mean(0, dtype=np.float64)) / np.sqrt(len(rows) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def shuffled_pixels(images: Tensor, seed: int) -> Tensor:
    """Return images with the pixels of each in an order of its own, colours kept. images: (n, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    flat = images.flatten(2)  # (n, 3, H * W)
    order = torch.rand(len(flat), 1, flat.shape[2], generator=generator).argsort(dim=2)
    return flat.gather(2, order.expand_as(flat)).reshape(images.shape)
