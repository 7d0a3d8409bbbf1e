"""The rows of `rows/`, decoded once: tensors in a file, then on the device.

    python3 -m benchmarks.gpu.rows FOLDER [--visits N] [--limit ROWS] [--workers N] [--tiny]

Every visit of a row has its own background, mirroring and hole, drawn as in training from Parquet.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.gpu.shared import HERE, read_config
from mmdiff_ray.batch import Batch
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.data.plan import GroupTable, Window
from mmdiff_ray.data.reader import DATA, RowReader
from mmdiff_ray.models.denoiser import build_modalities

ROWS = HERE / "rows"
VISITS = {"train": 32, "val": 8}


@dataclass(frozen=True)
class Rows:
    """Rows on a device. ids, visits: (N,); data: instance -> (N, ...); visit_count: visits of each row."""

    ids: Tensor
    visits: Tensor
    data: dict[str, Tensor]
    visit_count: int

    @classmethod
    def load(cls, file: Path, device: torch.device) -> "Rows":
        """Return the rows of a file that `decode` wrote."""
        tensors = load_file(str(file), device=str(device))
        data = {name.removeprefix(DATA): value for name, value in tensors.items() if name.startswith(DATA)}
        return cls(tensors["ids"], tensors["visits"], data, int(tensors["visits"].max()) + 1)

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, wanted: Tensor) -> "Rows":
        """Return the rows where `wanted` (N,) is true."""
        data = {name: value[wanted] for name, value in self.data.items()}
        return Rows(self.ids[wanted], self.visits[wanted], data, self.visit_count)

    def batch(
        self,
        chosen: Tensor,
        instances: Sequence[str],
        passes: int = 0,
        absent: dict[str, Tensor] | None = None,
    ) -> Batch:
        """Return the chosen rows as a batch.

        passes: how often all rows were seen before, which keys the noise. absent: instance -> (N,) bool, the
        rows that lack it.
        """
        here = torch.ones(len(chosen), dtype=torch.bool, device=self.ids.device)
        present = {name: here if name not in (absent or {}) else ~absent[name][chosen] for name in instances}  # type: ignore[index]
        data = {name: self.data[name][chosen] for name in instances}
        return Batch(self.ids[chosen], self.visits[chosen] + passes * self.visit_count, here, data, present)

    def stream(
        self, size: int, instances: Sequence[str], seed: int, absent: dict[str, Tensor] | None = None
    ) -> Iterator[Batch]:
        """Yield batches for ever: all rows in a new random order per pass, without a short last batch."""
        assert len(self) >= size, f"{len(self)} rows make no batch of {size}"
        for passes in itertools.count():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + passes)
            order = torch.randperm(len(self), generator=generator).to(self.ids.device)
            for start in range(0, len(self) - size + 1, size):
                yield self.batch(order[start : start + size], instances, passes, absent)

    def whole(self, size: int, instances: Sequence[str]) -> list[Batch]:
        """Return all rows in order, `size` at a time."""
        places = torch.arange(len(self), device=self.ids.device)
        return [self.batch(part, instances) for part in places.split(size)]


def annotated(ids: Tensor, strata: Tensor, share: float, seed: int) -> Tensor:
    """Return which rows are annotated, (N,) bool: a share of the ids of every stratum, redrawn per seed.

    ids, strata: (N,); rows of one id have the same answer.
    """
    found, first = np.unique(ids.cpu().numpy(), return_index=True)
    groups = strata.cpu().numpy()[first]
    chosen: list[int] = []
    for group in np.unique(groups):
        members = found[groups == group]
        order = np.random.default_rng([seed, int(group)]).permutation(members)
        chosen += order[: max(1, round(share * len(members)))].tolist()
    return torch.isin(ids, torch.tensor(chosen, device=ids.device))


def read_visit(visit: int, split: str, limit: int | None, tiny: bool) -> dict[str, np.ndarray]:
    """Return the rows of a split as one visit sees them. Raises ValueError for a row that cannot be read."""
    config = read_config("correctness", tiny)  # has all instances of the cells
    reader = RowReader(build_modalities(config), [str(ROWS)], config.data, config.seed)
    table = GroupTable(read_manifest(str(ROWS)).splits[split])
    pieces = [table.piece(number, 0, int(rows)) for number, rows in enumerate(table.rows)]
    if limit is not None:
        pieces = [pieces[0]._replace(stop=min(limit, pieces[0].stop))]
    arrays = reader.read(Window(0, visit, tuple(pieces)))
    if not arrays["real"].all():
        raise ValueError(f"rows/ has a row that cannot be read: {max(arrays['error'])}")
    return {
        name: value for name, value in arrays.items() if name in ("ids", "visits") or name.startswith(DATA)
    }


def decode(folder: Path, visits: int | None, limit: int | None, workers: int, tiny: bool) -> None:
    """Write `train.safetensors` and `val.safetensors` with all rows, visit after visit."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, usual in VISITS.items():
        read = partial(read_visit, split=split, limit=limit, tiny=tiny)
        numbers = range(visits or usual)
        if workers:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                parts = list(pool.map(read, numbers))
        else:
            parts = [read(number) for number in numbers]
        whole = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        save_file(whole, str(folder / f"{split}.safetensors"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Decode the rows."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--visits", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    decode(given.folder, given.visits, given.limit, given.workers, given.tiny)


if __name__ == "__main__":
    main()
