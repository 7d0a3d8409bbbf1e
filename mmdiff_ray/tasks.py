"""Tasks: rows of roles with frequencies. The role of every modality in a sample is drawn here alone."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import ConfigError, TaskConfig
from mmdiff_ray.diffusion import rng
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN

ROLES = {"absent": ABSENT, "given": GIVEN, "generated": GENERATED}
ALTERNATIVES = 6
"""A list of roles is written out to this many equally likely entries: 1, 2, 3 or 6 come out even."""


class Tasks:
    """The configured tasks.

    instances: the modality instances, in order. table: (tasks, instances, ALTERNATIVES) roles.
    """

    def __init__(
        self, tasks: Mapping[str, TaskConfig], instances: Sequence[str], only_given: set[str]
    ) -> None:
        self.names = list(tasks)
        self.instances = list(instances)
        self.frequencies = np.array([task.frequency for task in tasks.values()], dtype=np.float64)
        self.drop = np.array([task.drop for task in tasks.values()], dtype=np.float64)
        self.one_pass = np.array([task.one_pass for task in tasks.values()], dtype=np.float64)
        if not self.frequencies.sum() > 0:
            raise ConfigError("tasks: every frequency is 0; give at least one task a frequency above 0")
        self.table = np.array(
            [
                [_alternatives(name, task, instance, only_given) for instance in instances]
                for name, task in tasks.items()
            ]
        )

    def draw(self, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a task and the roles of every sample: (B,) task index and instance -> (B,) roles.

        A modality that a row lacks is absent; only tasks that still generate something in the row are drawn.
        Where there is none (and in padding) every role is absent. Where the draws from lists generate
        nothing, one instance that the task may generate is. All is a function of (seed, visit, id).
        """
        count, device = len(self.instances), batch.ids.device
        draws = rng.uniform(seed, "task", batch.visits.cpu(), batch.ids.cpu(), 2 + 2 * count).numpy()
        present = np.stack([batch.present[name].cpu().numpy() for name in self.instances], axis=1)  # (B, I)
        generates = (self.table == GENERATED).any(-1)  # (T, I)
        weights = self.frequencies * (generates[None] & present[:, None]).any(-1)  # (B, T)
        below = weights.cumsum(1) <= draws[:, :1] * weights.sum(1, keepdims=True)
        task = below.sum(1).clip(max=len(self.names) - 1)
        pick = (draws[:, 1 : 1 + count] * ALTERNATIVES).astype(np.int64)
        roles = np.take_along_axis(self.table[task], pick[..., None], axis=2)[..., 0]  # (B, I)
        dropped = (roles == GIVEN) & (draws[:, 1 + count : 1 + 2 * count] < self.drop[task][:, None])
        roles = np.where(dropped | ~present, ABSENT, roles)
        roles = _generate_one(roles, generates[task] & present, draws[:, -1])
        nothing = (weights.sum(1) == 0) | ~batch.real.cpu().numpy()
        drawn = torch.from_numpy(np.where(nothing[:, None], ABSENT, roles)).to(device)
        return torch.from_numpy(task), dict(zip(self.instances, drawn.unbind(1), strict=True))

    def draw_one_pass(self, task: Tensor, batch: Batch, seed: int) -> Tensor | None:
        """Return which samples train at t = 1, bool (B,), or None if no task has such (`tasks.*.one_pass`).

        task: (B,), as `draw` returns it.
        """
        if not self.one_pass.any():
            return None
        draws = rng.uniform(seed, "one pass", batch.visits.cpu(), batch.ids.cpu(), 1)[:, 0].numpy()
        return torch.from_numpy(draws < self.one_pass[task.numpy()]).to(batch.ids.device)

    def roles(self, task: str, batch: Batch) -> dict[str, Tensor]:
        """Return a named task's roles for a batch without any draw: of lists the first, what lacks absent.

        Raises ConfigError for an unknown task.
        """
        if task not in self.names:
            raise ConfigError(f"tasks: unknown {task!r}; known: {', '.join(self.names)}")
        row = self.table[self.names.index(task), :, 0].tolist()
        return {
            name: torch.where(batch.present[name], role, ABSENT)
            for name, role in zip(self.instances, row, strict=True)
        }


def _generate_one(roles: np.ndarray, possible: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Return the roles with one of the possible instances generated in rows that generate nothing.

    roles: (B, I); possible: (B, I) bool; draw: (B,) in [0, 1), which picks evenly.
    """
    wanted = (draw * possible.sum(1)).astype(np.int64) + 1
    chosen = possible & (possible.cumsum(1) == wanted[:, None])
    return np.where(chosen & ~(roles == GENERATED).any(1, keepdims=True), GENERATED, roles)


def _alternatives(name: str, task: TaskConfig, instance: str, only_given: set[str]) -> list[int]:
    roles = task.alternatives(instance)
    if instance in only_given and "generated" in roles:
        raise ConfigError(
            f"tasks.{name}.roles.{instance}: it is made from another modality, so it can be given or absent, "
            "never generated (it would be counted twice)"
        )
    if not roles or ALTERNATIVES % len(roles):
        raise ConfigError(f"tasks.{name}.roles.{instance}: got {len(roles)} alternatives, want 1, 2, 3 or 6")
    return [ROLES[role] for role in roles] * (ALTERNATIVES // len(roles))
