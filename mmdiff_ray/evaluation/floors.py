"""Trivial rules, printed beside every model: what a figure is worth is how far it lies above its floor.

Everything here is numpy on the CPU. Images are (..., 3, H, W) and masks (..., H, W), with any number of
leading axes, none included.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Colour = Sequence[int]


def mean_visible_colour(image: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Fill each image's hole with the mean colour of what is visible; mid grey where nothing is.

    image: (..., 3, H, W), uint8 or float in [-1, 1]; visible: (..., H, W), true or positive where the image
    is known. Returns an image of the same type, unchanged where visible.
    """
    shown = (visible > 0)[..., None, :, :]
    count = shown.sum(axis=(-2, -1), keepdims=True)
    total = np.where(shown, image, 0).sum(axis=(-2, -1), keepdims=True, dtype=np.float64)
    colour = np.where(count > 0, total / np.maximum(count, 1), _grey(image))
    return np.where(shown, image, _like(image, colour))


def nearest_visible_pixel(image: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Fill each pixel of the hole with the nearest visible pixel (Euclidean); mid grey where nothing is.

    Shapes and types as for `mean_visible_colour`.
    """
    filled = [
        _nearest(picture, shown)
        for picture, shown in zip(image.reshape(-1, *image.shape[-3:]), _flat(visible > 0), strict=True)
    ]
    return np.stack(filled).reshape(image.shape)


def biharmonic(image: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Fill each image's hole smoothly, with the biharmonic function that meets what is visible around it.

    Values are clipped to the image's range, [0, 255] or [-1, 1]; mid grey where nothing is visible. Shapes
    and types as for `mean_visible_colour`. It solves one sparse system per image, of as many unknowns as its
    hole has pixels.
    Source: Damelin and Hoang, "On Surface Completion and Image Inpainting by Biharmonic Functions", 2018, by
    scikit-image.
    """
    filled = [
        _smooth(picture, shown)
        for picture, shown in zip(image.reshape(-1, *image.shape[-3:]), _flat(visible > 0), strict=True)
    ]
    return np.stack(filled).reshape(image.shape)


def threshold_fill(image: np.ndarray, threshold: float = 0.6) -> np.ndarray:
    """Return the foreground of pictures on white: pixels with a channel below the threshold, holes filled.

    image: (..., 3, H, W), uint8 or float in [0, 1]; threshold: in [0, 1] for both. Returns bool (..., H, W).
    Raises ValueError for floats outside [0, 1].
    """
    scale = 255 if image.dtype == np.uint8 else 1
    if scale == 1 and image.size and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"float images must lie in [0, 1]; got {image.min():.4g} to {image.max():.4g}")
    dark = image.min(axis=-3) < threshold * scale
    return np.stack([ndimage.binary_fill_holes(mask) for mask in _flat(dark)]).reshape(dark.shape)


def unlike_border(image: np.ndarray, threshold: float = 0.2) -> np.ndarray:
    """Return the foreground of pictures over any smooth background: what differs from the border, holes
    filled.

    The background is the plane of colour (a constant and a gradient) fitted to the outermost pixels;
    foreground is what lies further from it than the threshold in a channel. image: uint8 (..., 3, H, W);
    threshold: in [0, 1]. Returns bool (..., H, W).
    """
    height, width = image.shape[-2:]
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    plane = np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3)
    edge = np.ones((height, width), dtype=bool)
    edge[1:-1, 1:-1] = False
    colours = image.reshape(-1, 3, height * width).astype(np.float64) / 255
    fit = colours[:, :, edge.ravel()] @ np.linalg.pinv(plane[edge.ravel()]).T  # (n, 3, 3)
    far = np.abs(colours - fit @ plane.T).max(axis=1) > threshold
    masks = far.reshape(-1, height, width)
    return np.stack([ndimage.binary_fill_holes(mask) for mask in masks]).reshape(
        *image.shape[:-3], height, width
    )


def nearest_palette_colour(
    image: np.ndarray, colours: Sequence[Colour | None], foreground: np.ndarray | None = None
) -> np.ndarray:
    """Return the class of the colour nearest to each pixel (squared distance in RGB), uint8 (..., H, W).

    image: uint8 (..., 3, H, W). colours: class -> (red, green, blue) in [0, 255], or None for a class that
    has no colour, as the background, class 0, has none: such a class is never the nearest. foreground: (...,
    H, W), true where a class other than 0 may stand; pixels outside become class 0. `threshold_fill(image)`
    makes the stronger rule on white; without a foreground no pixel is background.
    """
    classes = np.array([index for index, colour in enumerate(colours) if colour is not None], dtype=np.uint8)
    palette = np.array([colour for colour in colours if colour is not None], dtype=np.float32)  # (K, 3)
    pixels = np.moveaxis(image, -3, -1).astype(np.float32)  # (..., H, W, 3)
    # |p - c|^2 without the term |p|^2, which no choice of c changes
    nearest = classes[(np.square(palette).sum(axis=1) - 2 * pixels @ palette.T).argmin(axis=-1)]
    return nearest if foreground is None else np.where(foreground > 0, nearest, np.uint8(0))


def majority_class(counts: Sequence[int]) -> int:
    """Return the most frequent class, the answer of one that has not looked; the first of several."""
    return int(np.argmax(counts))


def mean_embedding(embeddings: np.ndarray) -> np.ndarray:
    """Return the unit vector that is nearest in cosine to all embeddings together, float32 (D,).

    embeddings: (n, D), unit norm. Raises ValueError where they cancel out.
    """
    total = embeddings.sum(axis=0, dtype=np.float64)
    norm = np.linalg.norm(total)
    if not norm > 1e-12:
        raise ValueError(f"the mean of {len(embeddings)} embeddings has no direction")
    return (total / norm).astype(np.float32)


def _nearest(image: np.ndarray, visible: np.ndarray) -> np.ndarray:
    if not visible.any():
        return _like(image, np.full(image.shape, _grey(image)))
    rows, columns = ndimage.distance_transform_edt(~visible, return_distances=False, return_indices=True)
    return image[:, rows, columns]


def _smooth(image: np.ndarray, visible: np.ndarray) -> np.ndarray:
    from skimage.restoration import inpaint_biharmonic

    if visible.all() or not visible.any():
        return _nearest(image, visible)
    low, high = (0, 255) if image.dtype == np.uint8 else (-1, 1)
    unit = (image.astype(np.float64) - low) / (high - low)
    smooth = inpaint_biharmonic(unit, ~visible, channel_axis=0).clip(0, 1)
    return np.where(visible, image, _like(image, smooth * (high - low) + low))


def _flat(masks: np.ndarray) -> np.ndarray:
    return masks.reshape(-1, *masks.shape[-2:])


def _grey(image: np.ndarray) -> float:
    return 127.5 if image.dtype == np.uint8 else 0.0


def _like(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    return (np.rint(values) if image.dtype == np.uint8 else values).astype(image.dtype)
