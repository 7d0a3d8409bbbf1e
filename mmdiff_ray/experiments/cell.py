"""One cell of a table: train a method with a seed, then measure it. Both go on where they stopped.

`python -m mmdiff_ray.experiments.cell FILE METHOD SEED` trains a cell in one process without Ray and MLflow:
with torch, pyarrow and omegaconf, what they need, Pillow and safetensors, any machine can contribute cells.
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
from mmdiff_ray.data.batches import local_batches, split_batches
from mmdiff_ray.experiments.spec import Cell, Experiment, Measure, Method, digest, load_experiment
from mmdiff_ray.experiments.watch import Watch
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs.exclusive import alone
from mmdiff_ray.sampling.export import save_export
from mmdiff_ray.training.checkpoint import CheckpointStore, write_json
from mmdiff_ray.training.fit import fit
from mmdiff_ray.training.parallel import choose_device
from mmdiff_ray.training.progress import Progress
from mmdiff_ray.training.trainer import Trainer

Say = Callable[[str], None]
SAY_EVERY_S = 30.0
ENDING_S = 60.0
"""How long a cell waits for who holds it: the tasks of a runner that was killed end a little later."""
WATCH_POINTS = 8
"""How often a watched cell's tasks are looked at while it trains."""


def training_digest(config: Config) -> str:
    """Return a short name of the settings that the trained model depends on.

    Where a model is stored, how it is measured, who trains it and how often that is reported leave the
    digest as it is; so does a key at its reference default (`spec.digest`).
    """
    plain = Config()
    kept = ("log_every_samples", "device", "compile", "channels_last")
    train = dataclasses.replace(config.train, **{key: getattr(plain.train, key) for key in kept})
    data = dataclasses.replace(config.data, bad_row_limit=plain.data.bad_row_limit)
    apart = ("name", "runs", "tracking", "evaluate", "workers", "checkpoint")
    rest = {key: getattr(plain, key) for key in apart}
    return digest(dataclasses.replace(config, train=train, data=data, **rest))


def is_trained(folder: Path, config: Config) -> bool:
    """Return whether a cell's model is there. Raises ConfigError if it was trained with other settings."""
    file = folder / "export" / "facts.json"
    if not file.is_file():
        return False
    facts = json.loads(file.read_text(encoding="utf8"))
    if facts.get("digest") != training_digest(config):
        raise ConfigError(
            f"{folder} was trained with other settings than the experiment asks for now; "
            "move it away to train it anew"
        )
    return True


def train_cell(config: Config, folder: Path, hooks: "CellHooks", watched: Sequence[str] = ()) -> None:
    """Train a cell in this process, from its last checkpoint if there is one, and write its export.

    watched: tasks whose losses and gradients are written to `watched.json` on the way.
    """
    period = config.train.samples // WATCH_POINTS if watched else 0
    config = dataclasses.replace(
        config,
        evaluate=dataclasses.replace(config.evaluate, evaluators=[], every_samples=period),
        workers=dataclasses.replace(config.workers, count=0),
    )
    job = jobs.prepare(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings, config = training_digest(config), job.config
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
        raise RunError(f"{job.folder.name} was stopped with a checkpoint; the same command goes on with it")
    hooks.evaluate(trainer)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    known = {
        "progress": vars(trainer.progress),
        "digest": settings,
        "parameters": parameters,
        "machine": machine(trainer.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "mmdiff_ray": __version__,
        },
    }
    shutil.rmtree(folder / "measured", ignore_errors=True)  # of another model than this one
    save_export(job.export, config, trainer.ema.model, known)


class CellHooks:
    """Say how far training is, now and then, and record its metrics."""

    def __init__(self, say: Say, record: Callable[[dict[str, float], int], None] | None = None) -> None:
        self.say, self.record = say, record
        self.said = time.monotonic()
        self.watch: Watch | None = None

    def resumed(self, progress: Progress) -> None:
        """Say where training goes on."""
        if progress.samples_seen:
            self.say(f"goes on from {progress.samples_seen:,} samples")

    def report(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Take the metrics of the last steps."""
        if self.record is not None:
            self.record(metrics, progress.samples_seen)
        if time.monotonic() - self.said > SAY_EVERY_S:
            self.said = time.monotonic()
            rate = metrics.get("train/samples_per_s", 0.0)
            self.say(f"{progress.samples_seen:,} of {progress.total_samples:,} samples, {rate:.0f}/s")

    def evaluate(self, trainer: Trainer) -> None:
        """Look at the tasks, where that is wanted; the cell itself is measured at its end."""
        if self.watch is not None:
            self.watch(trainer)

    def should_stop(self, progress: Progress) -> bool:
        """Return False: a cell that is killed goes on from its checkpoint."""
        return False


def machine(device: torch.device) -> str:
    """Return what a model was trained on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores ({platform.machine()})"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A measure of a trained cell. file: where it is kept. mark: of all settings that it depends on."""

    method: Method
    measure: Measure
    config: Config
    file: Path
    mark: str

    @property
    def taken(self) -> bool:
        """Return whether it was measured with these settings."""
        return self.file.is_file() and json.loads(self.file.read_text(encoding="utf8"))["digest"] == self.mark

    @property
    def judged(self) -> bool:
        """Return whether the judge's model is needed for it."""
        return "judge" in self.measure.evaluators and self.config.evaluate.judge is not None


def asked_of(experiment: Experiment, cell: Cell, runs: Path) -> list[Asked]:
    """Return all that is measured of a trained cell and of the methods that ask its model.

    Where a measure is judged, its mark has the settings that the judge is trained with, not its weights: one
    that is trained again on another machine may differ by what machines differ in.
    """
    folder, found = cell_folder(experiment, cell, runs), []
    config = configuration.load_saved(folder / "export" / "config.yaml")
    judge = next((other for other in experiment.cells() if experiment.is_judge(other)), None)
    place = None if judge is None else str(cell_folder(experiment, judge, runs) / "export")
    judges = None if judge is None else training_digest(experiment.config(judge, runs))
    for method in experiment.askers(cell.method):
        for wanted in experiment.measures_of(method):
            asked = experiment.asked(config, method, wanted, place)
            by = judges if "judge" in wanted.evaluators else None
            mark = training_digest(asked) + digest(dataclasses.replace(asked.evaluate, judge=by))
            found.append(Asked(method, wanted, asked, measured_file(folder, method, wanted), mark))
    return found


def measure_cell(experiment: Experiment, cell: Cell, runs: Path, say: Say) -> None:
    """Measure a trained cell, and the methods that ask its model, whatever was not measured yet."""
    from mmdiff_ray.distributed.evaluate import measure, plain
    from mmdiff_ray.experiments.tallies import save_tallies

    for wanted in asked_of(experiment, cell, runs):
        if wanted.taken:
            continue
        judge = Path(wanted.config.evaluate.judge or "")
        if wanted.judged and not (judge / "model.safetensors").is_file():
            raise ConfigError(
                f"{wanted.measure.name}: the judge is not trained; train {judge.parent.name} first"
            )
        begun, file = time.monotonic(), wanted.file
        findings = measure(cell_folder(experiment, cell, runs), wanted.config)
        file.parent.mkdir(exist_ok=True)
        save_tallies(file.with_suffix(".npz"), findings.figures)
        for name, picture in findings.pictures.items():
            picture.save(file.with_name(f"{file.stem}-{name}.png"))
        seconds = time.monotonic() - begun
        figures = [plain(figure) for figure in findings.figures]
        write_json(file, {"digest": wanted.mark, "seconds": seconds, "figures": figures})
        say(f"{wanted.method.name}: {wanted.measure.name} measured in {seconds:.0f} s")


def measured_file(folder: Path, method: Method, wanted: Measure) -> Path:
    """Return where a measure of a method is kept, in the folder of the cell whose model it asks."""
    return folder / "measured" / f"{method.name}.{wanted.name}.json"


def main(arguments: list[str] | None = None) -> int:
    """Train one cell in this process, and measure it where asked to."""
    parser = argparse.ArgumentParser(prog="python -m mmdiff_ray.experiments.cell", description=main.__doc__)
    parser.add_argument("experiment", help="the name of a shipped experiment, or a YAML file")
    parser.add_argument("method")
    parser.add_argument("seed", type=int)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--measure", action="store_true", help="measure it too (needs all of the packages)")
    given = parser.parse_args(arguments)
    try:
        experiment = load_experiment(given.experiment, given.preset)
        wanted = [cell for cell in experiment.cells() if cell.key == f"{given.method}-{given.seed}"]
        if not wanted:
            known = ", ".join(cell.key for cell in experiment.cells())
            raise ConfigError(f"no cell {given.method}-{given.seed}; there are: {known}")
        with hold(experiment, wanted[0], given.runs):
            run_cell(experiment, wanted[0], given.runs, given.measure, print)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run_cell(
    experiment: Experiment, cell: Cell, runs: Path, measured: bool, say: Say, hooks: "CellHooks | None" = None
) -> None:
    """Train a cell if it is not trained yet, and measure it if asked to. Its folder must be held (`hold`).

    Where a cell's measures came without its model, they are enough; for others it is trained once more.
    Raises ConfigError where the judge that it is measured by is not there.
    """
    folder = cell_folder(experiment, cell, runs)
    config = experiment.config(cell, folder.parent)
    if not is_trained(folder, config) or (measured and _lacks_model(experiment, cell, runs)):
        train_cell(config, folder, hooks or CellHooks(say), experiment.watch.get(cell.method.name, ()))
    if measured:
        measure_cell(experiment, cell, runs, say)


def hold(experiment: Experiment, cell: Cell, runs: Path) -> AbstractContextManager[None]:
    """Hold a cell's folder. Raises ConfigError where another process does."""
    folder = cell_folder(experiment, cell, runs)
    folder.mkdir(parents=True, exist_ok=True)
    return alone(folder, ENDING_S)


def has_model(folder: Path) -> bool:
    """Return whether a cell's model is there, and not its measures alone."""
    return (folder / "export" / "model.safetensors").is_file()


def _lacks_model(experiment: Experiment, cell: Cell, runs: Path) -> bool:
    """Return whether a trained cell of which only the measures are here is asked for what takes its model."""
    if has_model(cell_folder(experiment, cell, runs)):
        return False
    if not is_measured(experiment, cell, runs):
        return True
    return experiment.is_judge(cell) and any(
        "judge" in wanted.evaluators
        for other in experiment.cells()
        if not is_measured(experiment, other, runs)
        for method in experiment.askers(other.method)
        for wanted in experiment.measures_of(method)
    )


def is_measured(experiment: Experiment, cell: Cell, runs: Path) -> bool:
    """Return whether everything was measured that a cell's model is asked."""
    trained = (cell_folder(experiment, cell, runs) / "export" / "facts.json").is_file()
    return trained and all(asked.taken for asked in asked_of(experiment, cell, runs))


def cell_folder(experiment: Experiment, cell: Cell, runs: Path) -> Path:
    """Return the folder of a cell."""
    return runs.absolute() / f"{experiment.name}-{experiment.preset.name}" / cell.key


if __name__ == "__main__":
    sys.exit(main())
