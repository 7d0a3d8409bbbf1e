"""Measure how fast rows are read and decoded: our reader against a torch DataLoader on the same pictures.

    .venv/bin/python benchmarks/read_rows.py [ROWS]

Both decode the same sprites (PNG, 64 x 64) to uint8 in the same number of worker threads or processes; turns
alternate, and the ratio is that of the medians. Writes benchmarks/results/read_rows.json.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmdiff_ray.config import DataConfig
from mmdiff_ray.data.batches import local_batches
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.data.parquet import read_row_group
from mmdiff_ray.data.plan import Plan
from mmdiff_ray.data.reader import RowReader
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.image import ImageModality, ImageOptions

BATCH, SIZE, WORKERS, TURNS = 64, 64, 2, 5


class Pictures(Dataset):
    """The pictures as a map-style data set: bytes in memory, decoded when asked for."""

    def __init__(self, pictures: list[bytes], modality: ImageModality) -> None:
        self.pictures, self.modality = pictures, modality

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> np.ndarray:
        context = RowContext((SIZE, SIZE), 0, 0, index, flip=False)
        return self.modality.read({"pixels": self.pictures[index]}, context, {})  # type: ignore[return-value]


def main() -> None:
    """Build sprites, measure both readers in turns, print and write the result."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        from mmdiff_ray.datasets.base import build

        build(
            "sprites",
            folder,
            {"limit": rows, "size": SIZE, "val_share": 0.01},
            force=True,
            workers=0,
            progress=False,
        )
        modality = ImageModality("pixels", ImageOptions(type="image", column="pixels"), (SIZE, SIZE))
        split = read_manifest(folder).splits["train"]
        groups = [shard.row_group(i) for shard in split.shards for i in range(len(shard.row_groups))]
        pictures = [row for group in groups for row in read_row_group(folder, group, ["pixels"])["pixels"]]
        ours, theirs = [], []
        for _ in range(TURNS):
            ours.append(_ours(folder, modality, split.rows))
            theirs.append(_theirs(Pictures(pictures, modality)))
    result = {
        "command": "benchmarks/read_rows.py",
        "rows": len(pictures),
        "workers": WORKERS,
        "rows_per_s": {"mmdiff_ray": statistics.median(ours), "torch DataLoader": statistics.median(theirs)},
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
    }
    path = Path(__file__).parent / "results" / "read_rows.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _ours(folder: str, modality: ImageModality, rows: int) -> float:
    reader = RowReader({"pixels": modality}, [folder], DataConfig(flip=False), 0)
    plan = Plan([(read_manifest(folder).splits["train"], 1.0)], 8, 4, BATCH, 0)
    begun = time.perf_counter()
    for _ in local_batches(plan, reader, stop_batch=rows // BATCH, threads=WORKERS):
        pass
    return rows // BATCH * BATCH / (time.perf_counter() - begun)


def _theirs(pictures: Pictures) -> float:
    loader = DataLoader(pictures, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)
    begun = time.perf_counter()
    count = sum(len(batch) for batch in loader)
    return count / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
