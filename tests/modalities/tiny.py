"""A tiny backbone, one small instance of every modality type, and rows of data for them."""

import io
import wave
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmdiff_ray import config as configuration
from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config
from mmdiff_ray.modalities.base import Features, Modality, RowContext
from mmdiff_ray.models.denoiser import build_modalities
from mmdiff_ray.registry import register

SIZE = (8, 12)
"""Height and width in cells; not square, so that swapped axes fail."""
NAMES = ["bird", "cat", "dog", "eel"]
COLUMNS: dict[str, dict[str, Any]] = {
    "pixels": {"kind": "image", "channels": 4},
    "alpha": {"kind": "mask", "classes": 2},
    "palette": {"kind": "mask", "classes": 5, "names": list("abcde"), "colors": [None] + [[9, 8, 7]] * 4},
    "category": {"kind": "label", "names": NAMES},
    "look": {"kind": "embedding", "dim": 6},
    "name": {"kind": "text"},
    "depth": {"kind": "map", "channels": 1, "range": [0.5, 4]},
    "attributes": {"kind": "labels", "names": ["dark", "large", "left"]},
    "place": {"kind": "vector", "dim": 2, "names": ["x", "y"]},
    "normals": {"kind": "map", "channels": 3, "range": [-1, 1], "content": "normals"},
    "caption": {"kind": "text"},
    "sound": {"kind": "audio"},
}
PLAIN: dict[str, Any] = {
    "space": {"height": SIZE[0], "width": SIZE[1]},
    "model": {"backbone": "tiny_test"},
    "modalities": {
        "pixels": {"type": "image"},
        "alpha": {"type": "mask", "classes": 2},
        "palette": {"type": "mask", "classes": 5},
        "category": {"type": "label", "classes": 4, "names": NAMES},
        "look": {"type": "embedding", "dim": 6, "code_channels": 2},
        "masked": {"type": "masked_image"},
    },
    "tasks": {
        "joint": {
            "roles": dict.fromkeys(["pixels", "alpha", "palette", "category", "look"], "generated"),
        },
        "read": {"roles": {"pixels": "given", "alpha": "generated", "category": "generated"}},
        "restore": {"roles": {"masked": "given", "pixels": "generated"}},
    },
}
MORE = {
    "depth": {"type": "map", "dim": 1, "range": [0.5, 4]},
    "attributes": {"type": "labels", "names": ["dark", "large", "left"]},
    "place": {"type": "vector", "dim": 2, "names": ["x", "y"]},
    "normals": {"type": "map", "dim": 3, "range": [-1, 1], "content": "normals", "likelihood": "laplace"},
    "caption": {"type": "text", "length": 12, "context_channels": 8},
    "sound": {"type": "audio", "seconds": 0.2},
}
EVERY: dict[str, Any] = {**PLAIN, "modalities": {**PLAIN["modalities"], **MORE}}
"""The tiny configuration with an instance of every type that has a column."""


@register("backbone", "tiny_test")
class TinyBackbone(nn.Module):
    """Two convolutions with the embedding, and the mean of tokens if there are any, added in between."""

    embedding_channels = 16
    feature_channels = 24
    pooled_channels = 24

    def __init__(self, in_channels: int, size: tuple[int, int], preset: str, **options: Any) -> None:
        super().__init__()
        self.enter = nn.Conv2d(in_channels, 24, 3, padding=1)
        self.shift = nn.Linear(16, 24)
        self.leave = nn.Conv2d(24, 24, 3, padding=1)
        self.read = nn.Linear(options["token_channels"], 24) if options.get("token_channels") else None

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None = None) -> Features:
        shift = self.shift(embedding)
        if self.read is not None:
            shift = shift + self.read(tokens).mean(1)
        hidden = nn.functional.silu(self.enter(x) + shift[:, :, None, None])
        features = nn.functional.silu(self.leave(hidden))  # (B, 24, H, W)
        return Features(features, features.mean((2, 3)))


def config(*overrides: str, plain: Mapping[str, Any] = PLAIN) -> Config:
    """Return the tiny configuration with overrides."""
    return configuration.load(base=plain, overrides=overrides)


def instances(*overrides: str, plain: Mapping[str, Any] = PLAIN) -> dict[str, Modality]:
    """Return the tiny configuration's modalities."""
    return build_modalities(config(*overrides, plain=plain))


def png(array: np.ndarray) -> bytes:
    """Return an array as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    """Return an array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.float32))
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    """Return samples from -1 to 1 as the bytes of a .wav file of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate, len(samples), "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def tone(hertz: float, seconds: float = 0.2, rate: int = 8000, loud: float = 0.5) -> np.ndarray:
    """Return a sine."""
    return loud * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def raw_row(index: int, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """Return one row as a data set holds it: a soft disc on transparency, its masks and maps, a label."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[: size[0], : size[1]]
    radius = rng.uniform(0.2, 0.5) * max(size)
    distance = np.hypot(y - rng.uniform(0, size[0]), x - rng.uniform(0, size[1]))
    cover = np.clip(radius - distance + 0.5, 0, 1)
    pixels = np.empty((*size, 4), np.uint8)
    pixels[..., :3] = rng.integers(0, 256, 3)
    pixels[..., 3] = (cover * 255).round()
    alpha = (pixels[..., 3] >= 128).astype(np.uint8)
    normals = np.stack([cover - 0.5, distance / max(size), np.full(size, 0.4)])
    vector = rng.normal(size=6) * [3, 2, 1, 0.5, 0.3, 0.2] + [1, 0, 0, 0, 0, 0]
    return {
        "id": index,
        "pixels": png(pixels),
        "alpha": png(alpha),
        "palette": png(alpha * rng.integers(1, 5, dtype=np.uint8)),
        "category": int(rng.integers(0, 4)),
        "look": (vector / np.linalg.norm(vector)).astype(np.float32),
        "name": f"{rng.normal(3, 2):.4f}",
        "depth": npy((1 + 2 * cover)[None]),
        "attributes": [k for k in range(3) if rng.random() < 0.5],
        "place": rng.normal(size=2) * [1, 0.3],
        "normals": npy(normals / np.linalg.norm(normals, axis=0)),
        "caption": [f"a {word}" for word in rng.permutation(["é", "bird", "longer bird"])[: 1 + index % 2]],
        "sound": wav(tone(rng.uniform(200, 3000), rng.uniform(0.1, 0.3)) * rng.uniform(0.2, 1)),
    }


def read(
    modalities: Mapping[str, Modality], row: Mapping[str, Any], context: RowContext
) -> dict[str, np.ndarray]:
    """Return what a row holds of every modality; what it lacks is left out."""
    done: dict[str, np.ndarray] = {}
    for name, modality in modalities.items():
        value = modality.read(row, context, done)
        if value is not None:
            assert value.shape == modality.data_shape
            assert value.dtype == modality.data_type
            done[name] = value
    return done


def rows(modalities: Mapping[str, Modality], count: int, seed: int = 0, visit: int = 0) -> Batch:
    """Return rows that have every modality, as a batch."""
    ids = torch.arange(count)
    read_rows = [
        read(modalities, raw_row(index), RowContext(SIZE, seed, visit, index)) for index in ids.tolist()
    ]
    return Batch(
        ids=ids,
        visits=torch.full((count,), visit),
        real=torch.ones(count, dtype=torch.bool),
        data={name: torch.from_numpy(np.stack([row[name] for row in read_rows])) for name in modalities},
        present={name: torch.ones(count, dtype=torch.bool) for name in modalities},
    )
