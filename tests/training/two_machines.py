"""Two workers of `test_remote_checkpoints` as on two machines, each with a disk and a network of its own."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmdiff_ray.config import CheckpointConfig
from mmdiff_ray.runs.job import Job
from mmdiff_ray.storage import upload
from mmdiff_ray.storage.mirror import Mirror
from mmdiff_ray.training.checkpoint import CheckpointStore, restore
from mmdiff_ray.training.remote_checkpoints import RemoteCheckpoints
from mmdiff_ray.training.trainer import Trainer
from tests import s3
from tests import sprites as tiny
from tests.faults import Faults, faulty

WORLD = 2
RUN = "the id of the run"


def make_store(uri: str, folder: Path, run: str = RUN) -> CheckpointStore:
    """Return the checkpoints of a run in storage, on a machine that keeps it in a folder."""
    mirror = Mirror(uri, folder)
    return CheckpointStore(
        folder / "checkpoints", CheckpointConfig(), remote=RemoteCheckpoints(mirror, run, keep_last=2)
    )


def work(rank: int, job: Job, bucket: s3.Bucket, folder: Path) -> None:
    """Be one of two workers and write down what was seen."""
    torch.set_num_threads(1)
    upload.STALL_S = 4.0
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    with faulty(bucket.port) as network:
        uri = bucket.uri("apart", network.port)
        seen = {
            **cut_off(job, rank, network, uri, folder / f"disk-{rank}"),
            **joined(job, rank, network, uri, folder / f"disk-{rank}"),
            "back": back(job, rank, uri, folder / f"fresh-{rank}"),
            "same disk": same_disk(job, rank, bucket.uri("together", network.port), folder / "together"),
        }
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


def cut_off(job: Job, rank: int, network: Faults, uri: str, folder: Path) -> dict[str, Any]:
    """Save twice; the second time one machine has no network at first."""
    trainer, store = tiny.trainer(job), make_store(uri, folder)
    batches = tiny.batches(job, 0, rank, WORLD)
    trainer.advance(batches, 48)
    store.save(trainer, {}, 2.0)
    store.close()
    first = stored(store, rank)
    trainer.advance(batches, 80)
    then = tiny.weights(trainer.denoiser)
    network.down = rank == 1
    store.save(trainer, {}, 1.0)
    trainer.advance(batches, 112)  # goes on meanwhile
    store.poll()
    store.close()
    without = store.unsent, stored(store, rank)
    network.down = False
    store.close()
    return {"first": first, "without": without, "with": (store.unsent, stored(store, rank)), "at 80": then}


def joined(job: Job, rank: int, network: Faults, uri: str, folder: Path) -> dict[str, Any]:
    """End with a checkpoint of which each machine has a part and storage nothing; go on from it."""
    store, trainer = make_store(uri, folder), tiny.trainer(job)
    restore(trainer, store.latest() or Path("none"))
    trainer.advance(tiny.batches(job, trainer.progress.steps, rank, WORLD), 112)
    network.down = rank == 1
    store.save(trainer, {}, 3.0)
    store.close()
    without = stored(store, rank)
    network.down = False
    after, again = make_store(uri, folder), tiny.trainer(job)
    path = after.latest()
    restore(again, path or Path("none"))
    after.close()
    same = tiny.same(tiny.weights(trainer.denoiser), tiny.weights(again.denoiser))
    return {"lost": without, "joined": (path and path.name, same, stored(after, rank))}


def back(job: Job, rank: int, uri: str, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the newest checkpoint on a machine that never saw the run."""
    trainer, store = tiny.trainer(job), make_store(uri, folder)
    restore(trainer, store.latest() or Path("none"))
    return tiny.weights(trainer.denoiser)


def same_disk(job: Job, rank: int, uri: str, folder: Path) -> list[str]:
    """Return which files are in storage after two workers of one machine have saved three times."""
    trainer, store = tiny.trainer(job), make_store(uri, folder)
    for samples in (16, 32, 48):
        trainer.advance(tiny.batches(job, trainer.progress.steps, rank, WORLD), samples)
        store.save(trainer, {}, float(samples))
        store.close()
    assert store.remote is not None
    dist.barrier()
    return sorted(store.remote.mirror.files())


def stored(store: CheckpointStore, rank: int) -> list[str]:
    """Return the names of the complete checkpoints in storage, as the first worker sees them."""
    assert store.remote is not None
    return sorted(store.remote.stored()) if rank == 0 else []


def one_trainer(job: Job, path: Path | None) -> Trainer:
    """Return the trainer of a process alone with the state of a checkpoint."""
    trainer = tiny.trainer(job)
    assert path is not None
    restore(trainer, path)
    return trainer
