"""What evaluators ask of a model, a chunk of rows at a time, and what keeps the answers."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmdiff_ray.sampling.generator import Generator, Known, Samples, sample

CHUNK = 64
"""Rows sampled at once."""


@dataclass(frozen=True)
class Ask:
    """Samples of a chunk of rows; what comes back depends on nothing else.

    start: the number of the first row; it and those after it, with the seed, key the noise. rows: how many.
    roles: instance -> the role it has in all of them. given: instance -> (rows, ...). heads: instances whose
    last predictions are wanted, too. The rest: as `training.inference.sample` takes it.
    """

    start: int
    rows: int
    roles: dict[str, int]
    given: dict[str, Tensor]
    seed: int
    steps: int
    sampler: str
    guidance: float = 1.0
    known: Known | None = None
    heads: list[str] = field(default_factory=list)
    likely: bool = False


Drawer = Callable[[str, Sequence[Ask]], Iterator[Samples]]
"""From a name for what is asked, and the asks, to the answers in order, on the CPU."""


def draw(model: Generator, ask: Ask) -> Samples:
    """Return what is asked of a model, on the CPU."""
    device = model.device
    known = ask.known
    if known is not None:
        known = Known(known.data.to(device), known.visible.to(device), known.repeats)
    drawn = sample(
        model.denoiser,
        {name: torch.full((ask.rows,), role, device=device) for name, role in ask.roles.items()},
        {name: value.to(device) for name, value in ask.given.items()},
        ids=torch.arange(ask.start, ask.start + ask.rows, device=device),
        seed=ask.seed,
        steps=ask.steps,
        sampler=ask.sampler,
        guidance=ask.guidance,
        known=known,
        likely=ask.likely,
    )
    return Samples(
        {name: value.cpu() for name, value in drawn.data.items()},
        {name: drawn.heads[name].cpu() for name in ask.heads},
        drawn.agreement,
    )


def draw_here(model: Generator) -> Drawer:
    """Return what draws in this process, one chunk after another."""

    def drawer(name: str, asks: Sequence[Ask]) -> Iterator[Samples]:
        return map(functools.partial(draw, model), asks)

    return drawer


def kept_in(folder: Path, drawer: Drawer) -> Drawer:
    """Return a drawer that writes every answer into a folder, and does not ask again for what is there."""

    def file(name: str, ask: Ask) -> Path:
        return folder / f"{name}-{ask.start:09d}.pt"

    def drawer_kept(name: str, asks: Sequence[Ask]) -> Iterator[Samples]:
        missing = [ask for ask in asks if not file(name, ask).is_file()]
        fresh = drawer(name, missing)
        there = {ask.start for ask in asks} - {ask.start for ask in missing}
        folder.mkdir(parents=True, exist_ok=True)
        for ask in asks:
            place = file(name, ask)
            if ask.start in there:
                yield Samples(**torch.load(place, weights_only=True))
                continue
            samples = next(fresh)
            partial = place.with_suffix(".partial")
            torch.save(vars(samples), partial)
            os.replace(partial, place)
            yield samples

    return drawer_kept
