"""Rows of data with a process, an objective and predictions, for the tests of the objective."""

from collections.abc import Sequence
from itertools import product

import torch

from mmdiff_ray.config import Config, from_plain
from mmdiff_ray.diffusion.objective import Objective, Terms
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN
from mmdiff_ray.models.denoiser import build_modalities, build_process

STEPS, CELLS = 10, 16
NAMES = ("pixels", "label", "mask")


def make_config(place: str = "own", anchor_only: bool = False, **loss) -> Config:
    """Return a configuration of 4x4 cells and 10 steps; place: the channels that label and mask lie in."""
    modalities = {
        "label": {"type": "label", "classes": 3, "channels": place, "weights": {"shape": 0.5}},
        "pixels": {"type": "image"},
        "mask": {"type": "mask", "classes": 2, "channels": place, "weights": {"family": "linear"}},
    }
    if anchor_only:
        modalities = {"pixels": modalities["pixels"]}
    roles = dict.fromkeys(modalities, "generated")
    return from_plain(
        {
            "space": {"height": 4, "width": 4},
            "schedule": {"steps": STEPS},
            "modalities": modalities,
            "tasks": {"joint": {"roles": roles}},
            "loss": loss,
        }
    )


def make_objective(config: Config) -> Objective:
    modalities = build_modalities(config)
    return Objective(build_process(config, modalities), config.loss, dict(modalities.items()))


class Rows:
    """Rows of data with their codes, a role for each modality, times, z_t, and some wrong prediction."""

    def __init__(self, objective: Objective, roles: Sequence[tuple[int, ...]]) -> None:
        count, generator = len(roles), torch.Generator().manual_seed(0)
        process, self.names = objective.process, list(objective.modalities)
        data = {
            "pixels": torch.randint(0, 256, (count, 3, 4, 4), generator=generator).to(torch.uint8),
            "label": torch.randint(0, 3, (count,), generator=generator),
            "mask": torch.randint(0, 2, (count, 4, 4), generator=generator).to(torch.uint8),
        }
        self.data = {name: data[name] for name in self.names}
        self.codes = {name: objective.modalities[name].encode(value) for name, value in self.data.items()}
        self.roles = {name: torch.tensor([row[NAMES.index(name)] for row in roles]) for name in self.names}
        self.t = (torch.arange(count) % STEPS + 1).double() / STEPS
        self.noise = torch.randn(count, process.channels, 4, 4, generator=generator)
        self.z_t = process.marginal(self.codes, self.roles, self.t).sample(self.noise)
        self.heads = {
            name: torch.randn(count, *shape, generator=generator)
            for name, shape in (("pixels", (3, 4, 4)), ("label", (3,)), ("mask", (2, 4, 4)))
            if name in self.names
        }

    def sums(self, objective: Objective, rows: slice = slice(None)) -> Terms:
        def part(tensors):
            return {name: tensor[rows] for name, tensor in tensors.items()}

        predicted = {n: objective.modalities[n].expected_code(head) for n, head in self.heads.items()}
        found = objective.row_sums(
            self.z_t[rows],
            self.t[rows],
            part(self.roles),
            part(self.codes),
            part(self.data),
            part(predicted),
            part(self.heads),
        )
        return {key: value.sum() for key, value in found.items()}


ALL_ROLES = list(product((ABSENT, GIVEN, GENERATED), repeat=3))
EVERYTHING = [(GENERATED,) * 3] * STEPS
