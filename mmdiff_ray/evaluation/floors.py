"""Trivial rules without a model. Each figure of a model is reported with the rules' values on the same rows.

All functions use numpy on the CPU. Images are uint8 (n, 3, H, W), masks (n, H, W).
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Colour = Sequence[int]
GREY = 127.5
"""Fill of an image without any visible pixel."""


def mean_visible_colour(images: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Fill each image's hole with the mean of its visible pixels. visible: (n, H, W), positive = visible."""
    shown = (visible > 0)[:, None]
    count = shown.sum(axis=(-2, -1), keepdims=True)
    total = np.where(shown, images, 0).sum(axis=(-2, -1), keepdims=True, dtype=np.float64)
    colour = np.where(count > 0, total / np.maximum(count, 1), GREY)
    return np.where(shown, images, np.rint(colour).astype(np.uint8))


def nearest_visible_pixel(images: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Fill each pixel of the hole with the nearest visible pixel (Euclidean)."""
    return np.stack([_nearest(*pair) for pair in zip(images, visible > 0, strict=True)])


def biharmonic(images: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Fill each image's hole with the biharmonic function that matches its surroundings, clipped to [0, 255].

    Solves one sparse system per image, with an unknown for each pixel of its hole.
    Source: Damelin and Hoang, "On Surface Completion and Image Inpainting by Biharmonic Functions", 2018, by
    scikit-image.
    """
    return np.stack([_smooth(*pair) for pair in zip(images, visible > 0, strict=True)])


def threshold_fill(images: np.ndarray, threshold: float = 0.6) -> np.ndarray:
    """Return the foreground of images on white, bool (n, H, W): below the threshold, holes filled."""
    dark = images.min(axis=1) < threshold * 255
    return np.stack([ndimage.binary_fill_holes(mask) for mask in dark])


def unlike_border(images: np.ndarray, threshold: float = 0.2) -> np.ndarray:
    """Return the foreground of images over a smooth background, bool (n, H, W), holes filled.

    The background is the plane of colour (a constant and a gradient) fitted to the outermost pixels;
    foreground pixels differ from it by more than the threshold, in [0, 1], in some channel.
    """
    height, width = images.shape[-2:]
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    plane = np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3)  # (H * W, 3)
    edge = np.ones((height, width), dtype=bool)
    edge[1:-1, 1:-1] = False
    colours = images.reshape(-1, 3, height * width).astype(np.float64) / 255
    fit = colours[:, :, edge.ravel()] @ np.linalg.pinv(plane[edge.ravel()]).T  # (n, 3, 3)
    far = np.abs(colours - fit @ plane.T).max(axis=1) > threshold  # (n, H * W)
    return np.stack([ndimage.binary_fill_holes(mask) for mask in far.reshape(-1, height, width)])


def nearest_palette_colour(images: np.ndarray, colours: Sequence[Colour | None]) -> np.ndarray:
    """Return the class whose colour is nearest to each pixel (squared distance in RGB), uint8 (n, H, W).

    colours: class -> (red, green, blue) in [0, 255], or None for a class without a colour, as the background,
    which is never the nearest.
    """
    classes = np.array([index for index, colour in enumerate(colours) if colour is not None], dtype=np.uint8)
    palette = np.array([colour for colour in colours if colour is not None], dtype=np.float32)  # (K, 3)
    pixels = np.moveaxis(images, -3, -1).astype(np.float32)  # (n, H, W, 3)
    # |p - c|^2 without the term |p|^2, which no choice of c changes
    return classes[(np.square(palette).sum(axis=1) - 2 * pixels @ palette.T).argmin(axis=-1)]


def majority_class(counts: Sequence[int]) -> int:
    """Return the most frequent class, or the first of them."""
    return int(np.argmax(counts))


def nearest_labels(queries: np.ndarray, known: np.ndarray, labels: np.ndarray, k: int = 5) -> np.ndarray:
    """Return the most frequent label of the k nearest known embeddings by cosine; the nearest wins ties.

    queries: (n, D); known: (m, D); labels: int (m,). Returns int (n,).
    """
    unit = known / np.linalg.norm(known, axis=1, keepdims=True)
    order = np.argsort(-queries @ unit.T, axis=1, kind="stable")[:, :k]  # (n, k)
    votes = labels[order]
    counts = (votes[:, :, None] == votes[:, None, :]).sum(axis=2)  # of each vote's class among the k
    return votes[np.arange(len(votes)), counts.argmax(axis=1)]  # argmax takes the first, the nearest


def mean_embedding(embeddings: np.ndarray) -> np.ndarray:
    """Return the unit vector of the greatest mean cosine to all embeddings, float32 (D,).

    embeddings: (n, D), unit norm. Raises ValueError if they cancel out.
    """
    total = embeddings.sum(axis=0, dtype=np.float64)
    norm = np.linalg.norm(total)
    if not norm > 1e-12:
        raise ValueError(f"the mean of {len(embeddings)} embeddings has no direction")
    return (total / norm).astype(np.float32)


def _nearest(image: np.ndarray, visible: np.ndarray) -> np.ndarray:
    if not visible.any():
        return np.full_like(image, np.rint(GREY))
    rows, columns = ndimage.distance_transform_edt(~visible, return_distances=False, return_indices=True)
    return image[:, rows, columns]


def _smooth(image: np.ndarray, visible: np.ndarray) -> np.ndarray:
    from skimage.restoration import inpaint_biharmonic

    if visible.all() or not visible.any():
        return _nearest(image, visible)
    smooth = inpaint_biharmonic(image.astype(np.float64) / 255, ~visible, channel_axis=0).clip(0, 1)
    return np.where(visible, image, np.rint(smooth * 255).astype(np.uint8))
