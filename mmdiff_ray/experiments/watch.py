"""What happens to tasks while a cell trains: their held-out losses, and whether their gradients conflict."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff_ray.batch import Batch
from mmdiff_ray.tasks import Tasks
from mmdiff_ray.training.checkpoint import write_json
from mmdiff_ray.training.trainer import Trainer

VISITS = 2
"""How often a held-out row is looked at, with another time and other noise each."""


class Watch:
    """Looks at a trainer now and then and adds what it sees to a file, a list of points.

    A point: `samples`; `losses`: task -> the total loss of the averaged model on held-out rows, as if it were
    the only task; `gradients`: task -> the squared length of its gradient in the backbone; `cosines`:
    `task~task` -> the cosine between the two. Both gradients are estimated on two halves of the draws, and
    only products of different halves count: noise makes neither longer nor more alike. NaN where a length is
    not told from 0.
    """

    def __init__(self, tasks: Sequence[str], batches: Sequence[Batch], file: Path) -> None:
        self.tasks, self.batches, self.file = list(tasks), list(batches), file

    def __call__(self, trainer: Trainer) -> None:
        """Add a point; one that is there already for these samples, from before a stop, is replaced."""
        losses, halves = {}, {}
        batches = [batch.to(trainer.device) for batch in self.batches]
        for name in self.tasks:
            tasks = only(trainer, name)
            losses[name] = held_out_loss(trainer, tasks, batches)
            halves[name] = [gradient(trainer, tasks, batches, visit) for visit in range(VISITS)]
        trainer.optimizer.zero_grad(set_to_none=True)
        lengths = {name: _across(parts, parts) for name, parts in halves.items()}
        cosines = {}
        for first, second in itertools.combinations(self.tasks, 2):
            scale = lengths[first] * lengths[second]
            product = _across(halves[first], halves[second])
            known = lengths[first] > 0 and lengths[second] > 0
            cosines[f"{first}~{second}"] = product / scale**0.5 if known else float("nan")
        point = {
            "samples": trainer.progress.samples_seen,
            "losses": losses,
            "gradients": lengths,
            "cosines": cosines,
        }
        kept = [other for other in read(self.file) if other["samples"] < point["samples"]]
        write_json(self.file, [*kept, point])


def read(file: Path) -> list[dict[str, Any]]:
    """Return the points of a file, none where there is no file."""
    return json.loads(file.read_text(encoding="utf8")) if file.is_file() else []


def only(trainer: Trainer, name: str) -> Tasks:
    """Return one task of a trainer's configuration, alone."""
    known = trainer.config.tasks
    modalities = trainer.denoiser.modalities
    given = {instance for instance, modality in modalities.items() if modality.only_given}
    return Tasks({name: dataclasses.replace(known[name], frequency=1)}, list(modalities), given)


@torch.no_grad()
def held_out_loss(trainer: Trainer, tasks: Tasks, batches: Sequence[Batch]) -> float:
    """Return the total loss of the averaged model over all rows and draws."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for batch, visit in itertools.product(batches, range(VISITS)):
        again, roles, count = _drawn(trainer, tasks, batch, visit)
        for into, values in ((sums, trainer.average_loss(again, roles)), (counts, count)):
            for key, value in values.items():
                into[key] = into.get(key, 0) + value.double()
    return float(trainer.objective.total(sums, counts))


def gradient(trainer: Trainer, tasks: Tasks, batches: Sequence[Batch], visit: int) -> Tensor:
    """Return the mean gradient of the total loss over batches in the backbone's parameters, one vector."""
    trainer.optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        again, roles, counts = _drawn(trainer, tasks, batch, visit)
        sums = trainer.loss(again, roles)
        (trainer.objective.total(sums, counts) / len(batches)).backward()
    parts = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad
        for weight in trainer.denoiser.backbone.parameters()
    ]
    return torch.cat([part.flatten() for part in parts])


def _drawn(
    trainer: Trainer, tasks: Tasks, batch: Batch, visit: int
) -> tuple[Batch, dict[str, Tensor], dict[str, Tensor]]:
    """Return a batch as on another visit, its roles, and the counts of its loss terms."""
    again = dataclasses.replace(batch, visits=batch.visits + visit)
    _, roles = tasks.draw(again, trainer.config.seed)
    return again, roles, trainer.loss.counts(again, roles)


def _across(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the mean inner product of different halves."""
    pairs = [(i, j) for i, j in itertools.product(range(VISITS), repeat=2) if i != j]
    return sum(float(first[i].double() @ second[j].double()) for i, j in pairs) / len(pairs)
