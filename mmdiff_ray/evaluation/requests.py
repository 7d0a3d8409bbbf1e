"""Requests for samples of a chunk of rows, and the functions that draw these samples."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mmdiff_ray.config import RunError, decoding
from mmdiff_ray.sampling.generator import Generator, Known, Samples, sample

CHUNK = 64
"""Rows sampled at once."""


@dataclass(frozen=True)
class SampleRequest:
    """A request for samples of a chunk of rows. Samples depend only on these fields and the model.

    start: number of the first row; row numbers and seed key the noise. rows: number of rows. roles: instance
    -> its role in all rows. given: instance -> data (rows, ...). heads: instances whose last head predictions
    to return. The other fields: arguments of `sampling.generator.sample`.
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

    def to(self, device: torch.device | str) -> "SampleRequest":
        """Return the request with its tensors on a device."""
        known = self.known
        if known is not None:
            known = Known(known.data.to(device), known.visible.to(device), known.repeats)
        given = {name: value.to(device) for name, value in self.given.items()}
        return replace(self, given=given, known=known)


SampleFn = Callable[[str, Sequence[SampleRequest]], Iterator[Samples]]
"""(name of the requests, requests) -> their samples in order, on the CPU."""


def run_request(model: Generator, request: SampleRequest) -> Samples:
    """Draw the samples of a request; return them on the CPU."""
    device, request = model.device, request.to(model.device)
    drawn = sample(
        model.denoiser,
        {name: torch.full((request.rows,), role, device=device) for name, role in request.roles.items()},
        request.given,
        ids=torch.arange(request.start, request.start + request.rows, device=device),
        seed=request.seed,
        steps=request.steps,
        sampler=request.sampler,
        guidance=request.guidance,
        known=request.known,
        likely=request.likely,
    )
    data = {name: value.cpu() for name, value in drawn.data.items()}
    return Samples(data, {name: drawn.heads[name].cpu() for name in request.heads}, drawn.agreement)


def sample_locally(model: Generator) -> SampleFn:
    """Return a function that samples in this process, one request after another."""
    return lambda name, requests: map(functools.partial(run_request, model), requests)


def _read(file: Path) -> Samples:
    try:
        with decoding():
            return Samples(**torch.load(file, weights_only=True))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} has no valid samples ({str(error).splitlines()[0]}); remove it") from None


def cached(folder: Path, sample_fn: SampleFn) -> SampleFn:
    """Wrap `sample_fn` with a persistent cache of its samples in `folder`."""

    def sample_cached(name: str, requests: Sequence[SampleRequest]) -> Iterator[Samples]:
        files = {request.start: folder / f"{name}-{request.start:09d}.pt" for request in requests}
        hits = {start for start, file in files.items() if file.is_file()}
        fresh = sample_fn(name, [request for request in requests if request.start not in hits])
        folder.mkdir(parents=True, exist_ok=True)
        for start, file in files.items():
            if start in hits:
                yield _read(file)
                continue
            samples = next(fresh)
            partial = file.with_suffix(".partial")
            torch.save(vars(samples), partial)
            os.replace(partial, file)
            yield samples

    return sample_cached
