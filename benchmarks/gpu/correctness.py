"""Part 1: equal losses on CPU and GPU, eager and compiled, plain, DDP and FSDP; lines that wait for the GPU.

    python3 -m benchmarks.gpu.correctness FOLDER CHECK [CHECK ...] [--tiny]

FOLDER holds the decoded rows; each check writes FOLDER/correctness-CHECK.json.
"""

import argparse
import dataclasses
import itertools
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.figures import Figure, plain_figures
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.shared import HERE, device_of, read_config, turn
from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config
from mmdiff_ray.models.denoiser import Denoiser, build_denoiser
from mmdiff_ray.training.checkpoint import write_json
from mmdiff_ray.training.fit import calibrate
from mmdiff_ray.training.parallel import is_sharded
from mmdiff_ray.training.trainer import Trainer

STEPS = 8
ROOT = HERE.parents[1]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a check works with. batches: on the CPU; one batch is one step."""

    config: Config
    batches: list[Batch]
    device: torch.device

    def trainer(self, device: torch.device | None = None, **changes: Any) -> Trainer:
        """Return a new trainer with the same initial weights. changes: of the `train` section."""
        config = dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, **changes))
        return Trainer(config, self.denoiser(config), device or self.device)

    def denoiser(self, config: Config) -> Denoiser:
        """Return the calibrated, untrained model."""
        denoiser = build_denoiser(config)
        calibrate(denoiser.modalities, self.batches)
        return denoiser


def train(trainer: Trainer, batches: Sequence[Batch]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the losses of the first step and the mean losses of the others."""
    stream, rows = itertools.cycle(batches), trainer.config.train.global_batch
    reports = [trainer.advance(stream, rows), trainer.advance(stream, STEPS * rows)]
    first, later = [{k: v for k, v in report.items() if k.startswith("loss/")} for report in reports]
    return first, later


def largest_difference(a: dict[str, float], b: dict[str, float]) -> float:
    """Return the largest relative difference between two reports of losses, with a floor of 1e-3."""
    return max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-3) for key in b)


def compare(what: str, ours: Any, reference: Any, first: float, later: float) -> list[Figure]:
    """Return how far two runs of `train` are apart. first, later: the limits."""
    return [
        Figure(
            f"{what}: loss of step 1, relative difference",
            largest_difference(ours[0], reference[0]),
            target=first,
        ),
        Figure(
            f"{what}: losses of steps 2 to {STEPS}, relative difference",
            largest_difference(ours[1], reference[1]),
            target=later,
        ),
    ]


def check_devices(task: Task) -> list[Figure]:
    """Compare the device with the CPU in float32, and bfloat16 with float32 on the device."""
    on_cpu = train(task.trainer(torch.device("cpu")), task.batches)
    on_device = train(task.trainer(), task.batches)
    bfloat16 = train(task.trainer(precision="bfloat16"), task.batches)
    return [
        *compare(f"{task.device.type} against CPU, float32", on_device, on_cpu, 1e-3, 2e-2),
        *compare("bfloat16 against float32", bfloat16, on_device, 5e-2, 5e-2),
    ]


def check_compiled(task: Task, precision: str, first: float, later: float) -> list[Figure]:
    """Compare compiled with eager training. first, later: limits as in `compare`."""
    eager, compiled = (
        train(task.trainer(precision=precision, compile=chosen), task.batches) for chosen in (False, True)
    )
    return compare(f"compiled against eager, {precision}", compiled, eager, first, later)


def check_ddp(task: Task) -> list[Figure]:
    """Compare DistributedDataParallel with one rank and plain training."""
    plain = train(task.trainer(), task.batches)
    with one_rank(task.device):
        trainer = task.trainer()
        devices = [task.device.index] if task.device.type == "cuda" else None
        trainer.model = DistributedDataParallel(trainer.model, device_ids=devices, broadcast_buffers=False)
        wrapped = train(trainer, task.batches)
    return compare("DDP with one rank against plain", wrapped, plain, 1e-4, 1e-2)


def check_fsdp(task: Task) -> list[Figure]:
    """Compare FSDP2 with one rank and plain training."""
    plain = train(task.trainer(), task.batches)
    workers = dataclasses.replace(task.config.workers, strategy="fsdp")
    with one_rank(task.device):
        trainer = dataclasses.replace(
            task, config=dataclasses.replace(task.config, workers=workers)
        ).trainer()
        assert is_sharded(trainer.denoiser), "the model was not sharded"
        sharded = train(trainer, task.batches)
    return compare("FSDP with one rank against plain", sharded, plain, 1e-4, 1e-2)


def check_syncs(task: Task) -> list[Figure]:
    """Count the lines of a training step that wait for the GPU, eager."""
    trainer = task.trainer()
    batch = task.batches[0].to(task.device)
    for _ in range(2):
        trainer.step(batch)
    lines = synchronizing_lines(lambda: trainer.step(batch)) if task.device.type == "cuda" else None
    note = "; ".join(f"{line} x {count}" for line, count in (lines or {}).items())
    value = None if lines is None else float(sum(lines.values()))
    return [Figure("host synchronisations in a step", value, target=0, note=note)]


def synchronizing_lines(step: Callable[[], None]) -> dict[str, int]:
    """Return file:line -> how often it waits for the GPU during a call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(warning.filename).as_posix().removeprefix(f'{ROOT.as_posix()}/')}:{warning.lineno}"
        for warning in found
        if "called a synchronizing CUDA operation" in str(warning.message)
    ]
    return dict(Counter(places))


@contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """Open a process group of one rank."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


CHECKS = {
    "devices": check_devices,
    "compiled_float32": partial(check_compiled, precision="float32", first=1e-3, later=2e-2),
    "compiled_bfloat16": partial(check_compiled, precision="bfloat16", first=2e-2, later=5e-2),
    "ddp": check_ddp,
    "fsdp": check_fsdp,
    "syncs": check_syncs,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run checks, each with its result in a file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checks", nargs="+", choices=CHECKS)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    config = read_config("correctness", given.tiny)
    size, instances = config.train.global_batch, list(config.modalities)
    rows = Rows.load(given.folder / "train.safetensors", torch.device("cpu"))
    batches = list(itertools.islice(rows.stream(size, instances, seed=0), 4))
    task = Task(config, batches, device_of(config))
    torch.backends.cudnn.allow_tf32 = False  # float32 as on a CPU
    for check in given.checks:
        with turn(given.folder, alone=False):
            write_json(given.folder / f"correctness-{check}.json", plain_figures(CHECKS[check](task)))


if __name__ == "__main__":
    main()
