"""What two and three processes that share a model do for `test_sharing`; the first writes down what it
saw."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mmdiff_ray.batch import share
from mmdiff_ray.config import CheckpointConfig
from mmdiff_ray.runs.job import Job
from mmdiff_ray.training.checkpoint import CheckpointStore, complete, restore
from mmdiff_ray.training.parallel import is_sharded, world
from mmdiff_ray.training.trainer import Trainer
from tests import sprites as tiny

BATCH, SAVED, END = 20, 60, 120
"""Rows of a step, of which three workers get 6, 7 and 7; the samples at which checkpoints are written; those
at which runs end."""
ALONE = ("dit", "dit_tokens", "bfloat16", "text")
"""Jobs that also run in one process, to be compared with."""
WRITTEN = ("ddp on 1", "ddp on 2", "fsdp on 2", "fsdp on 3")
LOADED = ("ddp on 1", "ddp on 2", "fsdp on 2", "ddp on 3", "fsdp on 3")


def work(rank: int, jobs: dict[str, Job], folder: Path) -> None:
    """Be one of three processes, of which two are together at first, then three, then two."""
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for turn, (count, what) in enumerate([(2, begin_on_two), (3, all_on_three), (2, go_on_on_two)]):
        if rank < count:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/meeting-{turn}", rank=rank, world_size=count
            )
            seen |= what(jobs, folder)
            dist.destroy_process_group()
    torch.save(seen, folder / f"{rank}.pt")


def begin_on_two(jobs: dict[str, Job], folder: Path) -> dict[str, Any]:
    seen = {name: trained(jobs[name]) for name in ("micro", *ALONE)}
    seen |= {f"{name} on 2": trained(jobs[name], folder / f"{name} on 2") for name in ("ddp", "fsdp")}
    return {**seen, "held": held(jobs["fsdp"])}


def all_on_three(jobs: dict[str, Job], folder: Path) -> dict[str, Any]:
    seen = {"fsdp on 3": trained(jobs["fsdp"], folder / "fsdp on 3")}
    return seen | loaded(jobs, folder)


def go_on_on_two(jobs: dict[str, Job], folder: Path) -> dict[str, Any]:
    return loaded(jobs, folder)


def loaded(jobs: dict[str, Job], folder: Path) -> dict[str, Any]:
    """Return what runs end with that go on from each of the checkpoints."""
    return {
        f"{written} -> {name} on {world()[1]}": went_on(jobs[name], folder / written)
        for written in WRITTEN
        for name in ("ddp", "fsdp")
    }


def trained(job: Job, folder: Path | None = None) -> dict[str, Any]:
    """Return what a run shows; with a folder it writes a checkpoint in its middle and goes on meanwhile."""
    rank, count = world()
    trainer, batches = tiny.trainer(job), tiny.batches(job, 0, rank, count)
    steps = [trainer.advance(batches, seen) for seen in range(BATCH, SAVED + 1, BATCH)]
    validation = trainer.validate(share(tiny.held_out(job), rank, count))
    if folder is not None:
        store = CheckpointStore(folder, CheckpointConfig())
        store.save(trainer, {})
    rest = trainer.advance(batches, END)
    if folder is not None:
        store.wait()
    return {"steps": steps, "validation": validation, **state(trainer, rest)}


def went_on(job: Job, folder: Path) -> dict[str, Any]:
    """Return what a run ends with that goes on from a checkpoint."""
    rank, count = world()
    trainer = tiny.trainer(job)
    restore(trainer, complete(folder)[-1])
    return state(trainer, trainer.advance(tiny.batches(job, trainer.progress.steps, rank, count), END))


def state(trainer: Trainer, report: dict[str, float]) -> dict[str, Any]:
    """Return a report beside the parameters and their average, all of them whole."""
    averaged = trainer.averaged()
    return {
        "report": report,
        "weights": {name: whole(value) for name, value in trainer.denoiser.named_parameters()},
        "averaged": averaged and tiny.weights(averaged),
    }


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def held(job: Job) -> dict[str, float]:
    """Return which share of its parameters, their average and the moments a worker holds."""
    rank, count = world()
    trainer = tiny.trainer(job)
    trainer.advance(tiny.batches(job, 0, rank, count), BATCH)
    trainer.validate(share(tiny.held_out(job), rank, count))
    assert is_sharded(trainer.denoiser) and is_sharded(trainer.ema.model)
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    parts = {"model": [*trainer.denoiser.parameters()], "average": [*trainer.ema.model.parameters()]}
    return {name: _share_held(tensors) for name, tensors in (*parts.items(), ("moments", moments))}


def _share_held(tensors: list[Any]) -> float:
    own = sum(tensor.to_local().numel() for tensor in tensors)
    return own / sum(tensor.numel() for tensor in tensors)
