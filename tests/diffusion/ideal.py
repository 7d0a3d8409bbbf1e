"""The ideal denoiser of a finite data set: the exact posterior over its points, behind the real interface."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdiff_ray.config import ScheduleConfig, WeightsConfig
from mmdiff_ray.diffusion.process import GENERATED, GIVEN, Codes, Prediction, Process, Roles
from mmdiff_ray.diffusion.samplers import walk
from mmdiff_ray.diffusion.schedule import make_schedule
from mmdiff_ray.diffusion.weights import make_profile

OWN = {"pixels": slice(0, 1), "label": slice(1, 2), "mask": slice(2, 3)}
OVERLAPPING = {"pixels": slice(0, 1), "label": slice(0, 1), "mask": slice(0, 1)}


@dataclass(frozen=True)
class FiniteData:
    """A data set of P points. codes: instance -> (P, c, H, W); shares: (P,), how often each point occurs."""

    codes: dict[str, Tensor]
    shares: Tensor

    def alike(self, name: str) -> Tensor:
        """Return the class of every point: points with the same code are of one class, (P,)."""
        return torch.unique(self.codes[name].flatten(1), dim=0, return_inverse=True)[1]

    def law(self, **known: int) -> Tensor:
        """Return the share of every point among those that are in the known classes, (P,)."""
        shares = self.shares
        for name, index in known.items():
            shares = shares * (self.alike(name) == index)
        return shares / shares.sum()

    def merged(self, law: Tensor, names: list[str]) -> Tensor:
        """Return a law in which points alike in all of these instances count as the first of them, (P,)."""
        same = torch.stack([self.alike(name)[:, None] == self.alike(name)[None] for name in names]).all(0)
        return torch.zeros_like(law).index_add(0, same.int().argmax(1), law)

    def point_of(self, codes: Codes) -> Tensor:
        """Return which point the codes are nearest to, each modality by itself, (B,).

        The first of several that are alike in these modalities; P where they make none.
        """
        found = torch.ones(len(next(iter(codes.values()))), len(self.shares), dtype=torch.bool)
        for name, code in codes.items():
            distance = torch.cdist(code.flatten(1), self.codes[name].flatten(1))
            alike = self.alike(name)
            found &= alike[None] == alike[distance.argmin(1)][:, None]
        return torch.where(found.any(1), found.int().argmax(1), len(self.shares))


@dataclass(frozen=True)
class IdealDenoiser:
    """The exact E[codes | z_t, what is given] of a finite data set, called like the production denoiser.

    likeliest: instances whose code is the likeliest class's in place of the expected code. hears_codes:
    False: what is given is heard through z_t alone (`z_only`).
    """

    process: Process
    data: FiniteData
    likeliest: tuple[str, ...] = ()
    hears_codes: bool = True

    def __call__(
        self, z_t: Tensor, t: Tensor, roles: Roles, codes: Codes, conditions: Mapping[str, Tensor]
    ) -> Prediction:
        chances = self.chances(z_t, t, roles, codes)  # (B, P)
        expected = {
            name: torch.einsum("bp,pchw->bchw", self._sharpened(name, chances), code.to(z_t.dtype))
            for name, code in self.data.codes.items()
        }
        return Prediction(expected, {name: chances.log() for name in expected})

    def chances(self, z_t: Tensor, t: Tensor, roles: Roles, codes: Codes) -> Tensor:
        """Return the probability of every point given z_t, roles and the given codes, (B, P)."""
        betas = self.process.betas(t, roles)
        variance = 2 * self.process.schedule.sigma(t).square().to(z_t.dtype)
        logits = []
        for index, share in enumerate(self.data.shares):
            point = {
                name: code[index].to(z_t.dtype).expand(len(z_t), *code.shape[1:])
                for name, code in self.data.codes.items()
            }
            distance = (z_t - self.process.place(point, betas)).square().flatten(1).sum(1)
            logit = share.log().to(z_t.dtype) - distance / variance
            for name, code in codes.items() if self.hears_codes else ():
                differs = (code != point[name]).flatten(1).any(1) & (roles[name] == GIVEN)
                logit = logit.masked_fill(differs, -torch.inf)
            logits.append(logit)
        return torch.stack(logits, dim=1).softmax(1)

    def _sharpened(self, name: str, chances: Tensor) -> Tensor:
        """Return the weight of every point's code, (B, P): its chance, or all to the likeliest class."""
        if name not in self.likeliest:
            return chances
        alike = torch.nn.functional.one_hot(self.data.alike(name)).to(chances.dtype)  # (P, classes)
        best = (chances @ alike).argmax(1)
        return torch.nn.functional.one_hot(alike.argmax(0)[best], chances.shape[1]).to(chances.dtype)


def four_points() -> FiniteData:
    """Return four points, unevenly frequent: an image of two cells, one of two labels, one of three masks."""
    image = torch.tensor([[1.0, 0.6], [0.4, -1.0], [-0.4, 1.0], [-1.0, -0.6]])
    label = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]])
    mask = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    codes = {"pixels": image, "label": label, "mask": mask}
    return FiniteData(
        {name: code.reshape(4, 1, 1, 2) for name, code in codes.items()}, torch.tensor([0.4, 0.3, 0.2, 0.1])
    )


def make_process(
    layout: Mapping[str, slice],
    weights: Mapping[str, WeightsConfig] | None = None,
    kappa: float = 1.0,
    schedule: ScheduleConfig | None = None,
) -> Process:
    """Return the process of a layout, its first instance being the anchor. weights: of the others."""
    weights = weights or {}
    made = make_schedule(schedule or ScheduleConfig(), len(layout))
    return Process(
        schedule=made,
        profiles={name: make_profile(name, weights.get(name, WeightsConfig()), made) for name in layout},
        kappas={name: kappa for name in layout},
        layout=layout,
        anchor=next(iter(layout)),
        channels=max(where.stop for where in layout.values()),
    )


def roles_of(rows: int, **roles: int | Tensor) -> dict[str, Tensor]:
    """Return the roles of every row, given as (rows,) or as one for all; what is not named is generated."""
    return {name: torch.as_tensor(roles.get(name, GENERATED)).expand(rows) for name in OWN}


def draw(
    ideal: IdealDenoiser,
    rows: int,
    steps: int,
    sampler: str,
    given: Codes | None = None,
    seed: int = 0,
    **roles: int | Tensor,
) -> Prediction:
    """Return the end of a walk of the production samplers with the ideal denoiser, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, ideal.process.channels, *next(iter(ideal.data.codes.values())).shape[2:])
    given = given or {}
    prediction, _ = walk(
        ideal.process,
        lambda z, t, asked: ideal(z, t, asked, given, {}),
        lambda purpose: torch.randn(shape, generator=generator),
        given,
        roles_of(rows, **roles),
        steps,
        sampler,
    )
    return prediction


def total_variation(drawn: Tensor, law: Tensor) -> float:
    """Return the total variation between points drawn, (B,), and a law, (P,); P, no point, counts in full."""
    counts = torch.bincount(drawn, minlength=len(law) + 1).double() / len(drawn)
    return float(0.5 * ((counts[:-1] - law).abs().sum() + counts[-1]))
