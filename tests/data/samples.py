"""Tiny data for the tests of the data layer: splits without files, data sets of 8 x 8 pictures."""

import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import DataConfig, from_plain
from mmdiff_ray.data.batches import rank_batches
from mmdiff_ray.data.manifest import Manifest, Shard, Split
from mmdiff_ray.data.plan import Plan, Window
from mmdiff_ray.data.reader import Arrays, RowReader
from mmdiff_ray.data.shards import ShardWriter
from mmdiff_ray.modalities.base import Modality
from mmdiff_ray.registry import look_up

LABELS = ["ant", "bee", "cat"]
COLUMNS: dict[str, dict[str, Any]] = {
    "pixels": {"kind": "image", "channels": 4, "size": [8, 8]},
    "alpha": {"kind": "mask", "classes": 2, "names": ["background", "thing"]},
    "category": {"kind": "label", "names": LABELS},
    "look": {"kind": "embedding", "codec": "toy"},
    "caption": {"kind": "text"},
}
MODALITIES: dict[str, dict[str, Any]] = {
    "pixels": {"type": "image"},
    "alpha": {"type": "mask"},
    "category": {"type": "label"},
    "look": {"type": "embedding", "code_channels": 2},
    "masked": {"type": "masked_image"},
}


def png(pixels: np.ndarray) -> bytes:
    """Return pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int) -> dict[str, Any]:
    """Return a row that is a function of its number; some rows lack a label or an embedding."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = 255 * (pixels[..., 3] > 127)
    return {
        "key": f"row {number}",
        "pixels": png(pixels),
        "alpha": png((pixels[..., 3] > 0).astype(np.uint8)),
        "category": None if number % 7 == 3 else LABELS[number % 3],
        "look": None if number % 5 == 2 else rng.normal(size=4),
        "caption": f"picture {number}",
    }


def write(uri: str, numbers: Iterable[int], **options: Any) -> Manifest:
    """Write rows as a finished data set, by default in small shards of small row groups."""
    with_defaults = {"rows_per_shard": 16, "rows_per_group": 4, "val_share": 0.2} | options
    writer = ShardWriter(uri, "toy", COLUMNS, **with_defaults)
    for number in numbers:
        if f"row {number}" not in writer.done:
            writer.add(row(number))
    return writer.close()


def modalities(names: Iterable[str] = tuple(MODALITIES)) -> dict[str, Modality]:
    """Return real modalities for the columns above."""
    facts = {name: {**entry, "dim": 4} for name, entry in COLUMNS.items()}
    made = {}
    for name in names:
        kind = look_up("modality", MODALITIES[name]["type"])
        options = kind.Options(**{key: value for key, value in MODALITIES[name].items()})
        made[name] = kind(name, kind.resolve(name, options, facts), (8, 8))
    return made


def reader(
    uris: list[str], names: Iterable[str] = tuple(MODALITIES), seed: int = 0, **data: Any
) -> RowReader:
    """Return a reader of data sets written by `write`."""
    return RowReader(modalities(names), uris, DataConfig(**data), seed)


def config(uris: list[str], **changes: Any):
    """Return a configuration that names data sets written by `write`."""
    plain = {
        "modalities": MODALITIES,
        "tasks": {"joint": {"roles": {"pixels": "generated"}}},
        "space": {"height": 8, "width": 8},
        "data": {"sources": [{"uri": uri} for uri in uris]},
    }
    return from_plain({**plain, **changes})


def split(rows: int, rows_per_group: int = 4, rows_per_shard: int = 16) -> Split:
    """Return a split of so many rows, for plans; there are no files."""
    shards = []
    for number, start in enumerate(range(0, rows, rows_per_shard)):
        held = min(rows_per_shard, rows - start)
        groups = [min(rows_per_group, held - first) for first in range(0, held, rows_per_group)]
        shards.append(Shard(f"train/{number:05d}.parquet", held, 0, "", 0, tuple(groups)))
    return Split.of(shards)


def plan(sizes: list[int], weights: list[float] | None = None, seed: int = 0, **options: Any) -> Plan:
    """Return a plan over splits of these sizes."""
    with_defaults = {"lanes": 4, "window": 2, "global_batch": 8} | options
    sources = [
        (split(size), weight) for size, weight in zip(sizes, weights or [1.0] * len(sizes), strict=True)
    ]
    return Plan(sources, seed=seed, **with_defaults)


def numbers_of(window: Window) -> Arrays:
    """Return a window's rows as a reader would. A row's id: its number in its split, plus 10^6 per source."""
    numbers = [
        window.source * 10**6 + 16 * int(group.path[6:11]) + 4 * group.group + row
        for group, row, _ in window.places()
    ]
    return {
        "ids": np.array(numbers, np.int64),
        "visits": np.array([place.visit for place in window.places()], np.int64),
        "real": np.ones(len(numbers), bool),
        "error": np.full(len(numbers), ""),
    }


def planned(plan: Plan, batches: int, rank: int = 0, world: int = 1, start: int = 0) -> list[Batch]:
    """Return a rank's batches start to `batches` of a plan, without files."""
    windows = (
        (lane, window, numbers_of(window)) for lane, window in plan.rank_windows(rank, world, start, batches)
    )
    return list(rank_batches(plan, windows, rank, world, start, batches))


def pairs(batches: Iterable[Batch]) -> list[tuple[int, int]]:
    """Return the (visit, id) of every real row, in order."""
    real = (batch.where(batch.real) for batch in batches)
    return [(int(v), int(i)) for batch in real for v, i in zip(batch.visits, batch.ids, strict=True)]


def flip_bit(path: str, position: int) -> None:
    """Flip one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def interrupted(uri: str, numbers: Iterable[int], **options: Any) -> Iterator[int]:
    """Write rows and yield after each; whoever stops iterating leaves a build as a killed process does."""
    with_defaults = {"rows_per_shard": 16, "rows_per_group": 4, "val_share": 0.2} | options
    writer = ShardWriter(uri, "toy", COLUMNS, **with_defaults)
    for number in numbers:
        writer.add(row(number))
        yield number
