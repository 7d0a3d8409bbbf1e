"""Read a built data set back, for tests."""

import io
from typing import Any

import numpy as np
from PIL import Image

from mmdiff_ray.data.manifest import Manifest, read_manifest
from mmdiff_ray.data.parquet import read_row_group


def read_rows(uri: str) -> dict[str, dict[str, Any]]:
    """Return key -> row of all rows of a data set, in the order of its files."""
    manifest = read_manifest(uri)
    rows = {}
    for split in manifest.splits.values():
        for shard in split.shards:
            for group in range(len(shard.row_groups)):
                columns = read_row_group(uri, shard.row_group(group), ["key", *manifest.columns])
                for values in zip(*columns.values(), strict=True):
                    row = dict(zip(columns, values, strict=True))
                    rows[row["key"]] = row
    return rows


def keys_of(uri: str, manifest: Manifest, split: str) -> list[str]:
    """Return the keys of a split's rows."""
    shards = manifest.splits[split].shards
    groups = [shard.row_group(group) for shard in shards for group in range(len(shard.row_groups))]
    return [key for group in groups for key in read_row_group(uri, group, ["key"])["key"]]


def decode(data: bytes) -> np.ndarray:
    """Return the pixels of an image file's bytes."""
    return np.asarray(Image.open(io.BytesIO(data)))
