"""A tiny model of sprites, and what the tests of training, evaluation and commands do with it."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdiff_ray import config as configuration
from mmdiff_ray.batch import Batch
from mmdiff_ray.cli import main
from mmdiff_ray.config import Config
from mmdiff_ray.data.batches import local_batches, split_batches
from mmdiff_ray.datasets.build import build
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs.job import Job
from mmdiff_ray.sampling.generator import Generator
from mmdiff_ray.training.trainer import Trainer

MODEL = {
    "backbone": "unet",
    "preset": "nano",
    "options": {
        "width": 8,
        "multipliers": [1, 2],
        "blocks": [1, 1],
        "attention": [1],
        "embedding_channels": 16,
    },
}
PLAIN: dict[str, Any] = {
    "name": "tiny",
    "space": {"height": 8, "width": 8},
    "modalities": {
        "pixels": {"type": "image"},
        "shapes": {"type": "mask"},
        "shape": {"type": "label", "weights": {"scale": 0.2}},
        "factors": {"type": "embedding", "code_channels": 2},
        "masked": {"type": "masked_image"},
    },
    "tasks": {
        "joint": {"roles": dict.fromkeys(["pixels", "shapes", "shape", "factors"], "generated")},
        "understand": {
            "roles": {"pixels": "given", **dict.fromkeys(["shapes", "shape", "factors"], "generated")}
        },
        "restore": {"roles": {"masked": "given", "pixels": "generated"}},
        "prompt": {"roles": {"shape": "given", "pixels": "generated", "shapes": "generated"}},
    },
    "model": MODEL,
    "train": {
        "samples": 160,
        "global_batch": 16,
        "learning_rate": 2e-3,
        "warmup_samples": 64,
        "ema_samples": 64,
        "log_every_samples": 32,
    },
    "checkpoint": {"every_samples": 64},
    "evaluate": {"evaluators": ["joint"], "rows": 12, "steps": 3, "grid_rows": 2},
    "tracking": {"log_model": False, "system_metrics": False},
}


RECORDED = (
    "evaluate.evaluators=[segmentation, labels, embeddings, joint, bound]",
    "evaluate.every_samples=64",
    "tracking.log_model=true",
    "tracking.system_metrics=true",
)
"""Overrides with which a run records all that it can."""


def build_sprites(folder: Path) -> str:
    """Build 200 drawn scenes in a folder of its own and return its path."""
    out = str(folder / "sprites")
    build("sprites", out, {"count": 200, "size": 16}, workers=0, progress=False)
    return out


def config(data: str, *overrides: str, plain: Mapping[str, Any] = PLAIN) -> Config:
    """Return the tiny configuration of a data set, with overrides; without any, omegaconf is not needed."""
    plain = {**plain, "data": {"sources": [{"uri": data}]}}
    return (
        configuration.load(base=plain, overrides=overrides) if overrides else configuration.from_plain(plain)
    )


def write_config(folder: Path, data: str, *overrides: str) -> Path:
    """Write the tiny configuration as a YAML file, with runs in the same folder, and return its path."""
    file = folder / "tiny.yaml"
    file.write_text(configuration.to_yaml(config(data, f"runs={folder / 'runs'}", *overrides)))
    return file


@dataclass(frozen=True)
class Finished:
    """A run that was trained and evaluated by the command. output: what it printed."""

    folder: Path
    config_file: Path
    output: str

    @property
    def runs(self) -> str:
        return str(self.folder.parent)


def finish(folder: Path, data: str) -> Finished:
    """Train and evaluate by the command, in this process, with everything recorded."""
    file = write_config(folder, data, *RECORDED)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["train", str(file)]) == 0
    return Finished(folder / "runs" / "tiny", file, output.getvalue())


def job(data: str, *overrides: str, folder: Path = Path("unused")) -> Job:
    """Return the prepared job of the tiny configuration."""
    return jobs.prepare(config(data, *overrides), folder)


def trainer(made: Job) -> Trainer:
    """Return a job's trainer on the CPU."""
    return Trainer(made.config, made.denoiser(), torch.device("cpu"))


def batches(made: Job, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Return a rank's share of a job's batches from one of them on."""
    return local_batches(made.plan(), made.reader(made.denoiser()), rank, world, start)


def held_out(made: Job, rows: int = 12, size: int = 4) -> list[Batch]:
    """Return held-out rows."""
    splits = [manifest.splits["val"] for manifest in made.manifests]
    return list(split_batches(made.reader(made.denoiser()), splits, rows, size))


def generator(made: Job) -> Generator:
    """Return the job's untrained model for use."""
    return Generator(made.config, made.denoiser())


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of a model's parameters."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Return whether two sets of tensors are the same bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
