"""Part 3: train cells that are compared with each other, all at once, and collect what they learned.

    python3 -m benchmarks.gpu.science FOLDER DEADLINE CELL [CELL ...] [--eager] [--tiny]

FOLDER holds the decoded rows. A cell trains in milestones of `train.log_every_samples` and starts none after
DEADLINE (seconds since 1970); it may be killed at any time. At each it writes its averaged model and its
losses to FOLDER/cells/. The learning rate is constant, so every milestone is a finished training of its
length, and cells are compared at the last milestone that all of them reached.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.gpu.cells import CELLS, Cell
from benchmarks.gpu.rows import Rows, annotated
from benchmarks.gpu.shared import device_of, read_config, until
from mmdiff_ray.config import Config
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.training.checkpoint import write_json
from mmdiff_ray.training.fit import calibrate
from mmdiff_ray.training.trainer import Trainer

CALIBRATION_ROWS = 2048
STRATA, MASKS = "category", ("alpha", "palette")
WHOLE_BELOW = 1024
"""Tensors of fewer elements stay float32 in an export; the others are stored as float16."""


def train(cell: Cell, config: Config, folder: Path, deadline: float) -> None:
    """Train a cell and write every milestone, at least one."""
    device, train_config = device_of(config), config.train
    rows = Rows.load(folder / "train.safetensors", device)
    held_out = Rows.load(folder / "val.safetensors", device)
    few = annotated(rows.ids, rows.data[STRATA], cell.annotated, config.seed)
    if cell.annotated_only:
        rows, few = rows.where(few), few[few]
    absent = {name: ~few for name in MASKS if name in config.modalities}
    denoiser, instances = build_denoiser(config), list(config.modalities)
    calibrate(
        denoiser.modalities, [rows.batch(torch.arange(min(len(rows), CALIBRATION_ROWS)), instances).to("cpu")]
    )
    trainer = Trainer(config, denoiser, device)
    stream = rows.stream(train_config.global_batch, instances, config.seed, absent)
    validation = held_out.whole(train_config.global_batch, instances)
    curve: list[dict[str, float]] = []
    begun = time.perf_counter()
    while not curve or until(deadline):
        metrics = trainer.advance(stream, trainer.progress.samples_seen + train_config.log_every_samples)
        metrics |= trainer.validate(validation)
        seen = trainer.progress.samples_seen
        save_file(stored(trainer.ema.model.state_dict()), str(milestone_file(folder, cell, seen)))
        curve.append({"samples": seen, **metrics, "seconds": time.perf_counter() - begun})
        write_json(folder / "cells" / f"{cell.name}.json", curve)
        if trainer.progress.done:
            return


def milestone_file(folder: Path, cell: Cell, samples: int) -> Path:
    """Return where a milestone's model lies."""
    return folder / "cells" / f"{cell.name}-{samples}.safetensors"


def stored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors as an export stores them: large ones as float16."""
    half = {
        name: value.half() if value.is_floating_point() and value.numel() >= WHOLE_BELOW else value
        for name, value in state.items()
    }
    return {name: value.detach().cpu().contiguous() for name, value in half.items()}


def collect(folder: Path, out: Path) -> dict[str, Any]:
    """Write science.json (curves) and exports.safetensors (models), and return what science.json holds.

    Of every table the models are those of the last milestone that all its cells reached.
    """
    curves = {
        name: json.loads(file.read_text(encoding="utf8"))
        for name in CELLS
        if (file := folder / "cells" / f"{name}.json").is_file()
    }
    exports: dict[str, Tensor] = {}
    samples: dict[str, int] = {}
    for table in dict.fromkeys(cell.table for cell in CELLS.values()):
        trained = [CELLS[name] for name in curves if CELLS[name].table == table]
        if not trained:
            continue
        common = set.intersection(*({int(row["samples"]) for row in curves[cell.name]} for cell in trained))
        if not common:
            continue
        samples[table] = max(common)
        for cell in trained:
            tensors = load_file(str(milestone_file(folder, cell, samples[table])))
            exports |= {f"{cell.name}/{name}": value for name, value in tensors.items()}
    if exports:
        save_file(exports, str(out / "exports.safetensors"), metadata={"samples": json.dumps(samples)})
    found = {"samples": samples, "missing": [name for name in CELLS if name not in curves], "curves": curves}
    write_json(out / "science.json", found)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Train cells, one after the other."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("deadline", type=float)
    parser.add_argument("cells", nargs="+", choices=CELLS)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    (given.folder / "cells").mkdir(exist_ok=True)
    for name in given.cells:
        config = read_config(CELLS[name].config, given.tiny)
        compiled = config.train.compile and not given.eager
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=compiled))
        train(CELLS[name], config, given.folder, given.deadline)


if __name__ == "__main__":
    main()
