"""One batch of multi-modal rows, keyed by modality instance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of a data set as tensors.

    ids: (B,) int64, the stable id of each row; it keys every random draw made for the row.
    visits: (B,) int64, how often the row's data set had been gone through before (the row's own epoch).
    real: (B,) bool, True = a row, False = padding, which weighs nothing.
    data: instance -> (B, ...) in the modality's own data format; rows that lack it hold a filler.
    present: instance -> (B,) bool, True = the row has it.
    """

    ids: Tensor
    visits: Tensor
    real: Tensor
    data: Mapping[str, Tensor]
    present: Mapping[str, Tensor]

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device (copied without waiting where memory is pinned)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> "Batch":
        """Return rows start to stop."""
        return self._map(lambda tensor: tensor[start:stop])

    def where(self, wanted: Tensor) -> "Batch":
        """Return the rows where `wanted` (B,) is true."""
        return self._map(lambda tensor: tensor[wanted])

    def _map(self, function) -> "Batch":
        return Batch(
            ids=function(self.ids),
            visits=function(self.visits),
            real=function(self.real),
            data={name: function(value) for name, value in self.data.items()},
            present={name: function(value) for name, value in self.present.items()},
        )


def share(batches: Sequence[Batch], rank: int, world: int) -> list[Batch]:
    """Return a worker's share of batches that all workers have: as many for each, filled up with padding."""
    own = list(batches[rank::world])
    if len(own) < -(-len(batches) // world):
        own.append(replace(batches[0], real=torch.zeros_like(batches[0].real)))
    return own
