"""Agreement of predicted and true masks: foreground IoU, mean IoU over classes, boundary F.

Everything here is numpy on the CPU; masks are (B, H, W) of class indices or bool.
"""

import numpy as np
from scipy import ndimage

from mmdiff_ray.evaluation.statistics import Tally, mean_of

TOLERANCE = 0.008
"""Distance up to which boundaries match, as a fraction of the diagonal."""


def foreground_iou(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return each image's intersection over union of all but class 0, float64 (B,); 1 if both are empty."""
    _same_shape(predicted, truth)
    p, q = predicted > 0, truth > 0
    both, either = (p & q).sum(axis=(1, 2)), (p | q).sum(axis=(1, 2))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Return the confusion matrix of pixels, true classes by predicted classes, int64 (K, K).

    Raises ValueError for an index outside [0, classes).
    """
    _same_shape(predicted, truth)
    p, q = predicted.astype(np.int64).ravel(), truth.astype(np.int64).ravel()
    for name, indices in (("predicted", p), ("true", q)):
        if indices.size and not 0 <= indices.min() <= indices.max() < classes:
            raise ValueError(
                f"{name} classes span {indices.min()} to {indices.max()}; want 0 to {classes - 1}"
            )
    return np.bincount(q * classes + p, minlength=classes**2).reshape(classes, classes)


def iou_tally(
    predicted: np.ndarray, truth: np.ndarray, classes: int, void: np.ndarray | None = None
) -> Tally:
    """Return the IoU of masks.

    For two classes, this is the foreground IoU, averaged over images. Otherwise it is the mean IoU over the
    classes that occur, from intersections and unions per row. void: pixels to ignore, bool (B, H, W); both
    masks have class 0 there.
    """
    if classes == 2:
        return mean_of(foreground_iou(predicted, truth))
    matrices = np.stack([confusion(p[None], q[None], classes) for p, q in zip(predicted, truth, strict=True)])
    if void is not None:
        matrices[:, 0, 0] -= void.sum((1, 2))
    hits = np.diagonal(matrices, axis1=1, axis2=2).astype(np.float64)
    return Tally(hits, matrices.sum(1) + matrices.sum(2) - hits)


def boundary_f(
    predicted: np.ndarray,
    truth: np.ndarray,
    tolerance: float | None = None,
    void: np.ndarray | None = None,
) -> np.ndarray:
    """Return the F1 of precision and recall of each image's region boundaries, float64 (B,).

    A boundary pixel differs in class from the pixel right of it, below it or below right. It matches if the
    other mask has a boundary pixel, of any classes, within `tolerance` pixels (Euclidean), by default 0.8 %
    of the diagonal and at least 1. 1 if neither mask has a boundary, 0 if only one has. void: bool (B, H, W),
    pixels that are in no boundary.
    Source: the contour measure F of Perazzi et al., "A Benchmark Dataset ... for Video Object Segmentation",
    CVPR 2016, with distances instead of dilation by discs.
    """
    _same_shape(predicted, truth)
    if tolerance is None:
        tolerance = max(1.0, TOLERANCE * float(np.hypot(*truth.shape[1:])))
    voids = np.zeros(truth.shape, bool) if void is None else void
    pairs = zip(predicted, truth, voids, strict=True)
    return np.array([_f1(_boundary(p, v), _boundary(q, v), tolerance) for p, q, v in pairs])


def _boundary(mask: np.ndarray, void: np.ndarray) -> np.ndarray:
    """Return the boundary pixels, (H, W): void and known pixels have none in common."""
    padded, unknown = (np.pad(values, ((0, 1), (0, 1)), mode="edge") for values in (mask, void))
    boundary = np.zeros(mask.shape, bool)
    for part in (np.s_[:-1, 1:], np.s_[1:, :-1], np.s_[1:, 1:]):
        boundary |= (mask != padded[part]) & ~void & ~unknown[part]
    return boundary


def _f1(predicted: np.ndarray, truth: np.ndarray, tolerance: float) -> float:
    if not predicted.any() or not truth.any():
        return float(predicted.any() == truth.any())
    precision = (ndimage.distance_transform_edt(~truth)[predicted] <= tolerance).mean()
    recall = (ndimage.distance_transform_edt(~predicted)[truth] <= tolerance).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _same_shape(predicted: np.ndarray, truth: np.ndarray) -> None:
    if predicted.shape != truth.shape or truth.ndim != 3:
        raise ValueError(f"masks must be two (B, H, W); got {predicted.shape} and {truth.shape}")
