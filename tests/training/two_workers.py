"""What two processes do together for `test_parallel`; each writes down what it saw."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmdiff_ray.batch import Batch, share
from mmdiff_ray.config import CheckpointConfig
from mmdiff_ray.runs.job import Job
from mmdiff_ray.training.checkpoint import CheckpointStore, complete, restore
from mmdiff_ray.training.fit import fit
from mmdiff_ray.training.parallel import add_over_workers, largest_over_workers, same_everywhere
from mmdiff_ray.training.trainer import Trainer, TrainingError
from tests import sprites as tiny
from tests.training.test_fit import Diary

WORLD = 2


def work(rank: int, jobs: dict[str, Job], folder: Path) -> None:
    """Be one of two workers. folder: holds `one`, the checkpoints of one process; results go there too."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    seen = {
        "reduced": reduced(rank),
        "plain": reports(jobs["plain"], rank),
        "micro": reports(jobs["micro"], rank),
        "lacking": lacking(jobs["plain"], rank),
        "went_on": went_on(jobs["plain"], rank, folder / "one"),
        "saved": saved(jobs["plain"], rank, folder / "two"),
        "polled": polled(jobs["plain"], rank, folder / "polled"),
        "poisoned": poisoned(jobs["plain"], rank),
        "stopped": stopped(jobs["plain"], rank, folder / "stopped"),
    }
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


def reduced(rank: int) -> list[Any]:
    values = torch.tensor([1.0 + rank, 5.0 - rank])
    sums, largest = add_over_workers(values), largest_over_workers(values)
    return [sums.tolist(), largest.tolist(), values.tolist(), same_everywhere(10.0 + rank)]


def reports(job: Job, rank: int) -> dict[str, Any]:
    """Return the reports of five steps, held-out losses, and the weights."""
    trainer, batches = tiny.trainer(job), tiny.batches(job, 0, rank, WORLD)
    assert isinstance(trainer.model, DistributedDataParallel)
    steps = [trainer.advance(batches, seen) for seen in range(16, 81, 16)]
    return {
        "steps": steps,
        "validation": trainer.validate(share(tiny.held_out(job), rank, WORLD)),
        "weights": tiny.weights(trainer.denoiser),
    }


def lacking(job: Job, rank: int) -> dict[str, float]:
    """Return the report of steps in which no row has factors, and those of the first worker no shape."""
    trainer, batches = tiny.trainer(job), tiny.batches(job, 0, rank, WORLD)

    def without() -> Iterator[Batch]:
        for batch in batches:
            none = torch.zeros_like(batch.real)
            present = {**batch.present, "factors": none, **({} if rank else {"shape": none})}
            yield dataclasses.replace(batch, present=present)

    return trainer.advance(without(), 48)


def went_on(job: Job, rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights at the end of a run that one process began."""
    trainer = tiny.trainer(job)
    restore(trainer, complete(folder)[-1])
    start = trainer.progress.steps
    trainer.advance(tiny.batches(job, start, rank, WORLD), 160)
    return tiny.weights(trainer.denoiser)


def saved(job: Job, rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint at 80 samples while training goes on, and return the weights that it must hold."""
    trainer, batches = tiny.trainer(job), tiny.batches(job, 0, rank, WORLD)
    store = CheckpointStore(folder, CheckpointConfig())
    trainer.advance(batches, 80)
    then = tiny.weights(trainer.denoiser)
    store.save(trainer, {})
    trainer.advance(batches, 112)
    store.poll()
    store.wait()
    return then


def polled(job: Job, rank: int, folder: Path) -> list[int]:
    """Write checkpoints, asking without pause whether they are done, and return which are kept."""
    trainer, store = tiny.trainer(job), CheckpointStore(folder, CheckpointConfig())
    for samples in range(1, 9):
        trainer.progress.samples_seen = samples
        store.save(trainer, {})
        for _ in range(200):
            store.poll()
    store.wait()
    return [int(path.name) for path in complete(folder)]


def poisoned(job: Job, rank: int) -> str:
    """Return what is said when a row of the second worker alone holds no number."""
    trainer, batches = tiny.trainer(job), tiny.batches(job, 0, rank, WORLD)

    def bad() -> Iterator[Batch]:
        for number, batch in enumerate(batches, start=1):
            if rank == 1 and number == 2:
                factors = batch.data["factors"].clone()
                factors[:] = float("nan")
                batch = dataclasses.replace(batch, data={**batch.data, "factors": factors})
            yield batch

    try:
        trainer.advance(bad(), 64)
    except TrainingError as error:
        return str(error)
    return "nothing was said"


def stopped(job: Job, rank: int, folder: Path) -> tuple[str, int]:
    """Return how a run ends that only the first worker is asked to stop."""
    trainer: Trainer = tiny.trainer(job)
    ended = fit(
        trainer,
        CheckpointStore(folder, CheckpointConfig()),
        lambda start: tiny.batches(job, start, rank, WORLD),
        lambda: share(tiny.held_out(job), rank, WORLD),
        Diary(stop_at=None if rank else 40),
        {},
    )
    return ended, trainer.progress.samples_seen
