"""One cell of a table: train a method with one seed, then measure it. Both resume after an interruption.

`python -m mmdiff_ray.experiments.cell FILE METHOD SEED` trains a cell in one process without Ray and MLflow.
It needs torch, pyarrow, omegaconf, Pillow and safetensors.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from mmdiff_ray import __version__
from mmdiff_ray import config as configuration
from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config, ConfigError, RunError
from mmdiff_ray.config.checks import unknown
from mmdiff_ray.data.batches import local_batches, split_batches
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.experiments.digest import training_digest
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.experiments.measurement import Say, is_measured, measure_cell
from mmdiff_ray.experiments.parts import Cell
from mmdiff_ray.experiments.spec import Experiment
from mmdiff_ray.experiments.watch import Watch
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.sampling.export import WEIGHTS, save_export, weights_digest
from mmdiff_ray.storage.lock import lock_folder
from mmdiff_ray.training.checkpoint import CheckpointStore, complete
from mmdiff_ray.training.fit import Curves, fit
from mmdiff_ray.training.parallel import choose_device
from mmdiff_ray.training.progress import Progress
from mmdiff_ray.training.trainer import Trainer

REPORT_EVERY_S = 30.0
LOCK_WAIT_S = 60.0
"""How long to wait for a cell's lock: the tasks of a killed runner end a little later than the runner."""
WATCH_POINTS = 8
"""Number of evaluations of a cell's watched tasks during training."""


def is_trained(experiment: Experiment, cell: Cell, runs: Path) -> bool:
    """Return whether a cell is trained. Raises ConfigError if its settings, or its teacher's, have changed
    since."""
    folder = experiment.folder(runs, cell)
    file = folder / "export" / "facts.json"
    if not file.is_file():
        return False
    facts = json.loads(file.read_text(encoding="utf8"))
    teacher = _teacher_digest(experiment, cell, runs)
    changed = facts.get("digest") != training_digest(experiment.config(cell, folder.parent))
    if changed or facts.get("teacher", teacher) != teacher:
        raise ConfigError(
            f"{folder} was trained with settings that differ from the experiment's; "
            "move the folder away to train the cell again"
        )
    return True


def _teacher_digest(experiment: Experiment, cell: Cell, runs: Path) -> str | None:
    """Return the digest of the settings of a cell's teacher, None if it has none."""
    if cell.method.teacher is None:
        return None
    teacher = Cell(experiment.methods[cell.method.teacher], cell.seed)
    return training_digest(experiment.config(teacher, experiment.folder(runs)))


def _make_own_data(experiment: Experiment, cell: Cell, runs: Path) -> None:
    """Build the data set that a cell's teacher makes, unless it exists. Raises ConfigError if another model
    made it."""
    if data := experiment.own_data(cell, runs):
        from mmdiff_ray.datasets.build import build_missing

        build_missing(dataclasses.asdict(data))
        teacher = experiment.folder(runs, Cell(experiment.methods[str(cell.method.teacher)], cell.seed))
        if weights_digest(str(teacher / "export")) not in read_manifest(data.uri).description:
            raise ConfigError(
                f"{data.uri} was not made by the present model of {teacher.name}; remove it to make it again"
            )


def train_cell(
    config: Config,
    folder: Path,
    hooks: "CellHooks",
    watched: Sequence[str] = (),
    teacher: str | None = None,
) -> None:
    """Train a cell in this process and write its export. Resumes from the last checkpoint, if any.

    watched: tasks whose losses and gradients are recorded in `watched.json`. teacher: digest of the settings
    of the model that made the cell's data.
    """
    period = config.train.samples // WATCH_POINTS if watched else 0
    config = dataclasses.replace(
        config,
        evaluate=dataclasses.replace(config.evaluate, evaluators=[], every_samples=period),
        workers=dataclasses.replace(config.workers, count=0),
    )
    settings, init = training_digest(config), config.train.init
    job = jobs.prepare(_with_init(config, _cell_export(folder.parent, init)), folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = job.config
    if config.workers.threads:
        torch.set_num_threads(config.workers.threads)
    denoiser = job.denoiser()
    reader = job.reader(job.denoiser())
    store = CheckpointStore(job.checkpoints, config.checkpoint)
    if store.latest() is None:
        job.initialize(denoiser)
    trainer = Trainer(config, denoiser, choose_device(config.train))

    def stream(start: int) -> Iterator[Batch]:
        return local_batches(
            job.plan(), reader, start_batch=start, threads=max(1, config.workers.data_workers)
        )

    if watched:
        splits = [manifest.splits[config.evaluate.split] for manifest in job.manifests]
        rows = list(split_batches(reader, splits, config.evaluate.rows, min(64, config.evaluate.rows)))
        hooks.watch = Watch(watched, rows, folder / "watched.json")
    facts = {"config": configuration.to_plain(config), "version": __version__, "torch": torch.__version__}
    if fit(trainer, store, stream, list, hooks, facts) != "finished":
        raise RunError(f"{job.folder.name} was stopped with a checkpoint; run the same command to resume")
    hooks.evaluate(trainer, True)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    versions = {
        "python": platform.python_version(), "torch": torch.__version__, "mmdiff_ray": __version__
    }  # fmt: skip
    known = {
        "progress": vars(trainer.progress),
        "digest": settings,
        "parameters": parameters,
        "machine": machine(trainer.device),
        "versions": versions,
    } | ({"teacher": teacher} if teacher else {})
    shutil.rmtree(folder / "measured", ignore_errors=True)  # they belong to an earlier model
    save_export(job.export, _with_init(config, init), trainer.ema.model, known)


def _cell_export(cells: Path, init: str | None) -> str | None:
    """Return the weights file of the cell that `init` names; any other `train.init` unchanged."""
    file = cells / (init or "") / "export" / WEIGHTS
    return str(file) if init and file.is_file() else init


def _with_init(config: Config, init: str | None) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, init=init))


class CellHooks:
    """Hooks of `fit`: print progress every REPORT_EVERY_S seconds and record metrics."""

    def __init__(self, say: Say, record: Callable[[dict[str, float], int], None] | None = None) -> None:
        self.say, self.record = say, record
        self.reported = time.monotonic()
        self.watch: Watch | None = None

    def resumed(self, progress: Progress) -> None:
        """Print where training resumes."""
        if progress.samples_seen:
            self.say(f"resumed at {progress.samples_seen:,} samples")

    def report(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Record the metrics of the last steps."""
        if self.record is not None:
            self.record(metrics, progress.samples_seen)
        if time.monotonic() - self.reported > REPORT_EVERY_S:
            self.reported = time.monotonic()
            rate = metrics.get("train/samples_per_s", 0.0)
            self.say(f"{progress.samples_seen:,} of {progress.total_samples:,} samples, {rate:.0f}/s")

    def evaluate(self, trainer: Trainer, pictures: bool) -> Curves:
        """Record the watched tasks; the cell itself is measured after training."""
        if self.watch is not None:
            self.watch(trainer)
        return {}

    def should_stop(self, progress: Progress) -> bool:
        """Return False: a cell needs no early stop, since a killed one resumes from its checkpoint."""
        return False


def machine(device: torch.device) -> str:
    """Return the name of the GPU, or the number and type of CPU cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores ({platform.machine()})"


def lock_cell(experiment: Experiment, cell: Cell, runs: Path) -> AbstractContextManager[None]:
    """Lock a cell's folder. Raises ConfigError if another process holds the lock."""
    folder = experiment.folder(runs, cell)
    folder.mkdir(parents=True, exist_ok=True)
    return lock_folder(folder, LOCK_WAIT_S)


def run_cell(
    experiment: Experiment, cell: Cell, runs: Path, measured: bool, say: Say, hooks: CellHooks | None = None
) -> None:
    """Train a cell unless it is trained; with `measured`, measure it too. The caller holds its lock.

    A cell restored from an archive has measurements but no model. It is trained again only if a measurement
    or another cell needs its model. Raises ConfigError if a cell that this one depends on is not trained.
    """
    folder = experiment.folder(runs, cell)
    config = experiment.config(cell, folder.parent)
    if not is_trained(experiment, cell, runs) or (
        measured and _is_missing_needed_model(experiment, cell, runs)
    ):
        for first in experiment.cells_before(cell):
            if not (experiment.folder(runs, first) / "export" / WEIGHTS).is_file():
                raise ConfigError(f"{cell.key} needs {first.key}, which is not trained; train that first")
        _make_own_data(experiment, cell, runs)
        copy_shared_checkpoint(experiment, cell, runs, say)
        watched, teacher = experiment.watch.get(cell.method.name, ()), _teacher_digest(experiment, cell, runs)
        train_cell(config, folder, hooks or CellHooks(say), watched, teacher)
    if measured:
        measure_cell(experiment, cell, runs, say)


def copy_shared_checkpoint(experiment: Experiment, cell: Cell, runs: Path, say: Say) -> None:
    """Start a new cell from the newest checkpoint that it shares with a longer or shorter cell.

    With `train.decay_samples`, cells that differ only in length take identical steps until the shortest one
    starts to decay. Reusing its checkpoint gives the same result as training each cell from scratch.
    """
    config, folder = experiment.config(cell, runs), experiment.folder(runs, cell)
    if config.train.decay_samples is None or complete(folder / "checkpoints"):
        return
    found: list[tuple[int, Path]] = []
    for other in experiment.cells():
        others = experiment.config(other, runs)
        if other.seed == cell.seed and others.train.decay_samples and _prefix(others) == _prefix(config):
            same = min(one.train.samples - (one.train.decay_samples or 0) for one in (config, others))
            places = complete(experiment.folder(runs, other) / "checkpoints")
            found += [(int(place.name), place) for place in places if int(place.name) <= same]
    if found:
        samples, place = max(found)
        target = folder / "checkpoints" / place.name
        shutil.copytree(place, target.with_name(f"{place.name}.partial"), dirs_exist_ok=True)
        target.with_name(f"{place.name}.partial").rename(target)
        say(f"starts from the checkpoint of {place.parent.parent.name} at {samples:,} samples")


def _prefix(config: Config) -> str:
    """Return the digest of the settings that determine the steps before the decay."""
    train = dataclasses.replace(config.train, samples=1, decay_samples=None)
    return training_digest(dataclasses.replace(config, train=train))


def _is_missing_needed_model(experiment: Experiment, cell: Cell, runs: Path) -> bool:
    """Return whether a trained cell has no model, but its measurements or other cells need one."""
    if (experiment.folder(runs, cell) / "export" / WEIGHTS).is_file():
        return False
    if not is_measured(experiment, cell, runs):
        return True
    others = [other for other in experiment.cells() if cell in experiment.cells_before(other)]
    if not all(is_measured(experiment, other, runs) for other in others):
        return True
    return cell == experiment.judge_cell() and any(
        "judge" in measure.evaluators
        for other in experiment.cells()
        if not is_measured(experiment, other, runs)
        for method in experiment.evaluated_on(other.method)
        for measure in experiment.measures_of(method)
    )


def main(arguments: list[str] | None = None) -> int:
    """Train one cell in this process; with --measure, measure it too."""
    parser = argparse.ArgumentParser(prog="python -m mmdiff_ray.experiments.cell", description=main.__doc__)
    parser.add_argument("experiment", help="the name of a shipped experiment, or a YAML file")
    parser.add_argument("method")
    parser.add_argument("seed", type=int)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--measure", action="store_true", help="measure it too (needs all packages)")
    given = parser.parse_args(arguments)
    try:
        experiment = load_experiment(given.experiment, given.preset)
        cells = {cell.key: cell for cell in experiment.cells()}
        key = f"{given.method}-{given.seed}"
        if key not in cells:
            raise ConfigError(unknown("cell", key, list(cells)))
        with lock_cell(experiment, cells[key], given.runs):
            run_cell(experiment, cells[key], given.runs, given.measure, print)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
