"""Fashion-MNIST: 70,000 grey pictures of clothes in ten classes, from its four files of bytes."""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.base import Item, Options, Pipeline, Stage, look_stages
from mmdiff_ray.modalities.image import to_png

NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FOLDER = "/usr/share/datasets/fashion-mnist"
PARTS = {"train": "train", "test": "t10k"}
"""Part of the data set -> how its files begin."""
SIDE = 28
UNSIGNED_BYTES = 8


@dataclass(frozen=True)
class FashionMnistOptions(Options):
    """source: the folder of the four .gz files, which the Debian package dataset-fashion-mnist installs.
    size: pixels a side, at least 28; black is put around the pictures. look: embedder of the picture, which
    makes the column look: efficientnet-lite0, open_clip:MODEL[:weights] or off."""

    source: str = FOLDER
    size: int = 32
    look: str = "off"


@registry.register("pipeline", "fashion_mnist")
class FashionMnist(Pipeline):
    """Fashion-MNIST: clothes on black, with their class and a mask of what is not black.

    Keys are train/00000 to train/59999 and test/00000 to test/09999; which rows are held out is chosen anew
    among all of them.
    """

    Options = FashionMnistOptions
    annotations = ("label",)
    credit = "Fashion-MNIST by Zalando SE, MIT licence."

    def __init__(self, options: FashionMnistOptions) -> None:
        super().__init__(options)
        if options.size < SIDE:
            raise ConfigError(f"size ({options.size}) must be at least {SIDE}")
        self.source = Path(options.source).expanduser().resolve()

    def columns(self) -> dict[str, dict[str, Any]]:
        return {
            "pixels": {"kind": "image", "channels": 3},
            "alpha": {"kind": "mask", "classes": 2, "names": ["background", "foreground"]},
            "label": {"kind": "label", "names": list(NAMES)},
        }

    def stages(self) -> list[Stage]:
        return look_stages(self.options.look)

    def items(self) -> list[Item]:
        found: list[Item] = []
        for part in PARTS:
            pictures, labels = read_part(self.source, part)
            rows = enumerate(zip(pictures, labels.tolist(), strict=True))
            found.extend(Item(f"{part}/{index:05d}", row) for index, row in rows)
        return found

    def row(self, item: Item) -> dict[str, Any]:
        picture, label = item.source
        margin = self.options.size - SIDE
        grey = np.pad(picture, (margin // 2, margin - margin // 2))  # (size, size)
        return {
            "pixels": to_png(np.repeat(grey[..., None], 3, axis=2)),
            "alpha": to_png((grey > 0).astype(np.uint8)),
            "label": label,
        }


def read_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures, uint8 (n, 28, 28), and classes, uint8 (n,), of "train" or "test".

    Raises ConfigError where a file is missing or holds something else.
    """
    files = [folder / f"{PARTS[part]}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    pictures, labels = (read_idx(file) for file in files)
    if pictures.shape[1:] != (SIDE, SIDE) or labels.shape != (len(pictures),):
        raise ConfigError(
            f"source: {files[0].name} and {files[1].name} in {folder} hold {pictures.shape} and "
            f"{labels.shape}; want (n, {SIDE}, {SIDE}) and (n,)"
        )
    if labels.size and labels.max() >= len(NAMES):
        raise ConfigError(f"source: {files[1]} holds class {labels.max()}; want 0 to {len(NAMES) - 1}")
    return pictures, labels


def read_idx(file: Path) -> np.ndarray:
    """Return the array of bytes in a gzipped IDX file, uint8 of the shape that its head says.

    IDX: two zeros, the type (8: unsigned bytes), the number of dimensions, each of these as a big-endian
    32-bit integer, then the values. Raises ConfigError for a missing file or another content.
    """
    try:
        content = gzip.decompress(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"source: no file {file}; install it (apt-get install dataset-fashion-mnist) or name the folder "
            "that holds the four files of Fashion-MNIST: source=FOLDER"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"source: cannot read {file}: {error}") from None
    head = 4 + 4 * content[3] if content[:3] == bytes([0, 0, UNSIGNED_BYTES]) and len(content) > 3 else 0
    shape = struct.unpack_from(f">{content[3]}I", content, 4) if 0 < head <= len(content) else ()
    if not shape or len(content) != head + math.prod(shape):
        raise ConfigError(
            f"source: {file} is no whole IDX file of bytes; got {len(content)} bytes beginning with "
            f"{content[:4].hex()}"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
