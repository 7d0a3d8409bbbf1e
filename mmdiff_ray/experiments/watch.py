"""Held-out losses and gradient conflicts of tasks, recorded during the training of a cell."""

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

DRAWS = 2
"""Draws of time and noise for each held-out row."""


class Watch:
    """Append a point with losses and gradients of tasks to a JSON file.

    A point has `samples`, the samples seen; `losses`: task -> total loss of the EMA model on held-out rows,
    with this task only; `gradients`: task -> squared norm of its gradient in the backbone; `cosines`:
    `task~task` -> cosine of the two gradients.

    Each gradient is estimated twice, from independent draws. Norms and cosines use only products of different
    estimates, so noise does not bias them. A cosine is NaN if an estimated squared norm is not positive.
    """

    def __init__(self, tasks: Sequence[str], batches: Sequence[Batch], file: Path) -> None:
        self.tasks, self.batches, self.file = list(tasks), list(batches), file

    def __call__(self, trainer: Trainer) -> None:
        """Add a point. Drops points at the same or a later position, which were recorded before a restart."""
        losses, gradients = {}, {}
        batches = [batch.to(trainer.device) for batch in self.batches]
        for name in self.tasks:
            tasks = single_task(trainer, name)
            losses[name] = held_out_loss(trainer, tasks, batches)
            gradients[name] = [gradient(trainer, tasks, batches, draw) for draw in range(DRAWS)]
        trainer.optimizer.zero_grad(set_to_none=True)
        norms = {name: _inner_product(parts, parts) for name, parts in gradients.items()}
        cosines = {}
        for first, second in itertools.combinations(self.tasks, 2):
            product = _inner_product(gradients[first], gradients[second])
            known = norms[first] > 0 and norms[second] > 0
            scale = norms[first] * norms[second]
            cosines[f"{first}~{second}"] = product / scale**0.5 if known else float("nan")
        samples = trainer.progress.samples_seen
        point = {"samples": samples, "losses": losses, "gradients": norms, "cosines": cosines}
        write_json(self.file, [*(other for other in read(self.file) if other["samples"] < samples), point])


def read(file: Path) -> list[dict[str, Any]]:
    """Return the points of a file, or an empty list if it does not exist."""
    return json.loads(file.read_text(encoding="utf8")) if file.is_file() else []


def single_task(trainer: Trainer, name: str) -> Tasks:
    """Return a task distribution with one task of the trainer's configuration."""
    modalities = trainer.denoiser.modalities
    given = {instance for instance, modality in modalities.items() if modality.only_given}
    task = dataclasses.replace(trainer.config.tasks[name], frequency=1)
    return Tasks({name: task}, list(modalities), given)


@torch.no_grad()
def held_out_loss(trainer: Trainer, tasks: Tasks, batches: Sequence[Batch]) -> float:
    """Return the total loss of the EMA model over all rows and draws."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for batch, draw in itertools.product(batches, range(DRAWS)):
        drawn, roles, count = _draw_roles(trainer, tasks, batch, draw)
        for into, values in ((sums, trainer.average_loss(drawn, roles)), (counts, count)):
            for key, value in values.items():
                into[key] = into.get(key, 0) + value.double()
    return float(trainer.objective.total(sums, counts))


def gradient(trainer: Trainer, tasks: Tasks, batches: Sequence[Batch], draw: int) -> Tensor:
    """Return the gradient of the mean total loss with respect to the backbone, as one flat vector."""
    trainer.optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        drawn, roles, counts = _draw_roles(trainer, tasks, batch, draw)
        (trainer.objective.total(trainer.loss(drawn, roles), counts) / len(batches)).backward()
    parts = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad
        for weight in trainer.denoiser.backbone.parameters()
    ]
    return torch.cat([part.flatten() for part in parts])


def _draw_roles(
    trainer: Trainer, tasks: Tasks, batch: Batch, draw: int
) -> tuple[Batch, dict[str, Tensor], dict[str, Tensor]]:
    """Return the batch with visit numbers shifted by `draw`, its roles, and the counts of its loss terms."""
    drawn = dataclasses.replace(batch, visits=batch.visits + draw)
    _, roles = tasks.draw(drawn, trainer.config.seed)
    return drawn, roles, trainer.loss.counts(drawn, roles)


def _inner_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the mean inner product over pairs of estimates from different draws."""
    pairs = list(itertools.permutations(range(DRAWS), 2))
    return sum(float(first[i].double() @ second[j].double()) for i, j in pairs) / len(pairs)
