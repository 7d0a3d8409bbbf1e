"""Backgrounds for transparent images: colours, gradients and textures, drawn anew at every visit of a row."""

import numpy as np


def draw_background(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return a random background, float32 (H, W, 3) in [0, 1]: one colour, a gradient, or a texture."""
    paint = (_colour, _gradient, _texture)[generator.integers(3)]
    return paint(generator, size).astype(np.float32)


def _colour(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(generator.random(3), (*size, 3))


def _gradient(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    first, second = generator.random((2, 3))
    share = _ramp(generator, size)[..., None]
    return first * (1 - share) + second * share


def _texture(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Two near colours mixed by smooth noise or by stripes."""
    first = generator.random(3)
    second = np.clip(first + generator.uniform(-0.35, 0.35, 3), 0, 1)
    if generator.random() < 0.5:
        wave = np.sin(
            _ramp(generator, size) * 2 * np.pi * generator.uniform(1, 5) + generator.uniform(0, 6.28)
        )
        share = 0.5 + 0.5 * wave
    else:
        share = _smooth_noise(generator, size)
    return first * (1 - share[..., None]) + second * share[..., None]


def _ramp(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return a plane that rises from 0 to 1 in a random direction, (H, W)."""
    angle = generator.uniform(0, 2 * np.pi)
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    plane = x * np.cos(angle) + y * np.sin(angle)
    return (plane - plane.min()) / max(np.ptp(plane), 1e-9)


def _smooth_noise(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return bilinear noise on a coarse random grid, (H, W) in [0, 1]."""
    cells = int(generator.integers(2, 6))
    coarse = generator.random((cells + 1, cells + 1))
    rows, columns = (np.linspace(0, cells, n, endpoint=False) for n in size)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None], (columns - left)[None]
    upper = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
    lower = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
    return upper * (1 - down) + lower * down
