"""Measure a training step against the bare loop: the same network, optimizer and average, nothing else."""

import collections
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.figures import Figure
from benchmarks.gpu.bare import BareLoop
from benchmarks.gpu.shared import random_batch
from mmdiff_ray import config as configuration
from mmdiff_ray.data.check import resolve_modalities
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.runs.job import with_precision
from mmdiff_ray.training.trainer import Trainer

BATCH, THREADS, TURNS, STEPS = 64, 2, 15, 4
TARGETS = {"seven modalities": 1.08, "image only": 1.03}
MOST_OPERATORS = 1_100
VIEWS = frozenset(
    (
        "view", "_unsafe_view", "expand", "slice", "select", "unsqueeze", "squeeze", "permute", "transpose",
        "t", "detach", "alias", "as_strided", "unbind", "split", "split_with_sizes", "_reshape_alias",
    )
)  # fmt: skip
"""Operators that move no data."""
DEMO, ROWS = "pipelines/configs/demo.yaml", "data/openmoji"
IMAGE_ONLY = (
    "tasks={generate: {roles: {pixels: generated}}}",
    *(f"modalities.{name}=null" for name in ("alpha", "palette", "category", "look", "caption", "masked")),
    "loss.modalities={}",
    "loss.channels={}",
)


class Operators(TorchDispatchMode):
    """Count the operators that are dispatched while it is active, all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if name not in VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def measure() -> list[Figure]:
    """Return the figures of the demo's step and of a step of images alone, with its rows' modalities."""
    torch.set_num_threads(THREADS)
    found = []
    for name, overrides in (("seven modalities", ()), ("image only", IMAGE_ONLY)):
        trainer, batch, bare = prepared(*overrides)
        ours_s, _, ratio = in_turns(lambda t=trainer, b=batch: t.step(b), bare.step)  # type: ignore[misc]
        precision = trainer.config.train.precision
        found.append(
            Figure(f"{name}: step in {precision}, ms", 1e3 * ours_s, 1e3 * ours_s / ratio, TARGETS[name])
        )
        trainer, batch, bare = prepared("train.precision=float32", *overrides)
        with Operators() as ours:
            trainer.step(batch)
        with Operators() as theirs:
            bare.step()
        note = f"bare loop {theirs.found.total():,}"
        found.append(
            Figure(f"{name}: operators of a step", ours.found.total(), target=MOST_OPERATORS, note=note)
        )
    return found


def prepared(*overrides: str) -> tuple[Trainer, Any, BareLoop]:
    """Return a trainer of the demo's configuration, a batch, and the bare loop, each after one step."""
    config = configuration.load([DEMO], [f"train.global_batch={BATCH}", *overrides])
    config = with_precision(resolve_modalities(config, [read_manifest(ROWS)]))
    device = torch.device("cpu")
    denoiser = build_denoiser(config)
    trainer, batch = Trainer(config, denoiser, device), random_batch(denoiser, BATCH, device)
    bare = BareLoop(trainer, BATCH)
    trainer.step(batch)
    bare.step()
    return trainer, batch, bare


def in_turns(ours: Callable[[], None], theirs: Callable[[], None]) -> tuple[float, float, float]:
    """Return the median seconds per call of both, and the median ratio of neighbouring turns."""
    times = []
    for _ in range(TURNS):
        pair = []
        for call in (ours, theirs):
            start = time.perf_counter()
            for _ in range(STEPS):
                call()
            pair.append((time.perf_counter() - start) / STEPS)
        times.append(pair)
    mine, other = zip(*times, strict=True)
    ratio = statistics.median(one / two for one, two in times)
    return statistics.median(mine), statistics.median(other), ratio
