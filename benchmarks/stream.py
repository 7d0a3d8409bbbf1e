"""Measure how fast rows reach a consumer that takes no time, against a torch DataLoader on the same shards.

Both read the same Parquet row groups from disk and turn them into the same arrays by the same code (decode,
mirror, background), with the same number of reading threads, actors or processes; turns alternate.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.figures import Figure
from mmdiff_ray import config as configuration
from mmdiff_ray.batch import Batch
from mmdiff_ray.config import DataConfig
from mmdiff_ray.data.batches import local_batches
from mmdiff_ray.data.check import resolve_modalities
from mmdiff_ray.data.manifest import Manifest, read_manifest
from mmdiff_ray.data.parquet import read_row_group
from mmdiff_ray.data.plan import Plan
from mmdiff_ray.data.reader import RowReader
from mmdiff_ray.datasets.build import build
from mmdiff_ray.distributed.stream import stream_batches
from mmdiff_ray.modalities.base import Modality, RowContext
from mmdiff_ray.models.denoiser import build_modalities

SIZE, BATCH, WORKERS, TURNS = 64, 64, 2, 3
SPRITES = 20_000
PLAIN = {
    "space": {"height": SIZE, "width": SIZE},
    "tasks": {"joint": {"roles": {"pixels": "generated"}}},
}


class Shards(IterableDataset):
    """The rows of a split, a part of its row groups in every worker process, in a new order every epoch."""

    def __init__(self, uri: str, manifest: Manifest, modalities: Mapping[str, Modality]) -> None:
        self.uri, self.modalities = uri, dict(modalities)
        shards = manifest.splits["train"].shards
        self.groups = [shard.row_group(index) for shard in shards for index in range(len(shard.row_groups))]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        info = get_worker_info()
        number, total = (info.id, info.num_workers) if info else (0, 1)
        columns = [name for modality in self.modalities.values() for name in modality.columns]
        visit = 0
        while True:
            order = np.random.default_rng(visit).permutation(len(self.groups))
            for index in order[number::total]:
                found = read_row_group(self.uri, self.groups[index], ["id", *columns])
                for row_id, *values in zip(*(found[name] for name in ("id", *columns)), strict=True):
                    context = RowContext((SIZE, SIZE), 0, visit, row_id)
                    row = dict(zip(columns, values, strict=True))
                    done: dict[str, np.ndarray] = {}
                    for name, modality in self.modalities.items():
                        done[name] = np.array(modality.read(row, context, done))
                    yield done
            visit += 1


def measure() -> list[Figure]:
    """Return rows per second of sprites and OpenMoji at 64 pixels, in process and through Ray Data."""
    torch.set_num_threads(1)
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        sprites = str(Path(folder) / "sprites")
        options = {"limit": SPRITES, "size": SIZE, "val_share": 0.01}
        build("sprites", sprites, options, force=True, progress=False)
        for name, uri, types in (
            ("sprites", sprites, {"pixels": {"type": "image"}}),
            ("OpenMoji", "data/openmoji", {"pixels": {"type": "image"}, "palette": {"type": "mask"}}),
        ):
            found += list(_data_set(name, uri, types))
    ray.shutdown()
    return found


def _data_set(name: str, uri: str, types: Mapping[str, Any]) -> Iterator[Figure]:
    manifest = read_manifest(uri)
    plain_config = {**PLAIN, "modalities": types, "data": {"sources": [{"uri": uri}]}}
    config = resolve_modalities(configuration.from_plain(plain_config), [manifest])
    modalities = build_modalities(config)
    data = DataConfig(window=config.data.window)
    kept, plain = (RowReader(modalities, [uri], replace(data, cache_mb=mb), 0) for mb in (1024, 0))
    plan = Plan([(manifest.splits["train"], 1.0)], data.lanes, data.window, BATCH, 0)
    batches = SPRITES // BATCH
    rows = manifest.splits["train"].rows

    def loader() -> Iterator[Any]:
        shards = Shards(uri, manifest, modalities)
        return iter(DataLoader(shards, batch_size=BATCH, num_workers=WORKERS))

    def in_process(reader: RowReader) -> Callable[[], Iterator[Batch]]:
        return lambda: local_batches(plan, reader, threads=WORKERS)

    def through_ray() -> Iterator[Batch]:
        return stream_batches(plan, plain, 0, 1, 0, 10 * batches, WORKERS)

    readers = {
        "DataLoader": loader,
        "in process, nothing kept": in_process(plain),
        "through Ray Data, nothing kept": through_ray,
    }
    rates: dict[str, list[float]] = {key: [] for key in readers}
    first: dict[str, list[float]] = {key: [] for key in readers}
    for _ in range(TURNS):
        for key, make in readers.items():
            first_s, rate = consume(make(), batches)
            rates[key].append(rate)
            first[key].append(first_s)
    for _ in islice(local_batches(plan, kept, threads=WORKERS), rows // BATCH + data.lanes):
        pass  # the first epoch decodes
    rates["in process, later epochs"] = [
        consume(local_batches(plan, kept, threads=WORKERS), batches)[1] for _ in range(TURNS)
    ]
    baseline = statistics.median(rates.pop("DataLoader"))
    for key, values in rates.items():
        note = f"first batch {statistics.median(first[key]):.2f} s" if key in first else ""
        value = statistics.median(values)
        yield Figure(f"{name}, {key}: rows/s", value, baseline, 1.0, lower=False, note=note)


def consume(batches: Iterator[Any], count: int) -> tuple[float, float]:
    """Return seconds to the first batch, and rows per second of `count` batches from the second on."""
    start = time.perf_counter()
    next(batches)
    first = time.perf_counter()
    for _ in range(count):
        next(batches)
    done = time.perf_counter()
    close = getattr(batches, "close", None)
    if close:
        close()
    return first - start, count * BATCH / (done - first)


if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")
    for figure in measure():
        print(figure.plain())
