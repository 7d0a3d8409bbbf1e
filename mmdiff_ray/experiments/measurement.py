"""Measurements of trained cells: their settings, and the files with their figures."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.evaluation.tallies import save_tallies
from mmdiff_ray.experiments.digest import digest, training_digest
from mmdiff_ray.experiments.parts import Cell, Measure, Method
from mmdiff_ray.experiments.spec import Experiment
from mmdiff_ray.training.checkpoint import write_json

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measure of one method: a cell's model evaluated with `config`.

    file: JSON with the figures; tallies and pictures are saved next to it. digest: covers every setting that
    the figures depend on.
    """

    method: Method
    measure: Measure
    config: Config
    file: Path
    digest: str

    @property
    def is_done(self) -> bool:
        """Whether the file has figures measured with these settings."""
        return (
            self.file.is_file() and json.loads(self.file.read_text(encoding="utf8"))["digest"] == self.digest
        )

    @property
    def needs_judge(self) -> bool:
        return "judge" in self.measure.evaluators


def measurements_of(experiment: Experiment, cell: Cell, runs: Path) -> list[Measurement]:
    """Return the measurements of a trained cell, for every method that is evaluated on its model.

    The digest of a measurement with a judge covers the judge's training settings, not its weights: a judge
    that is retrained on another machine may differ by floating-point noise.
    """
    folder, found = experiment.folder(runs, cell), []
    config = configuration.load_saved(folder / "export" / "config.yaml")
    judge, export, judge_digest = experiment.judge_cell(), None, None
    if judge is not None:
        export = str(experiment.folder(runs, judge) / "export")
        judge_digest = training_digest(experiment.config(judge, runs))
    for method in experiment.evaluated_on(cell.method):
        for measure in experiment.measures_of(method):
            evaluated = experiment.evaluation_config(config, method, measure, export)
            by = judge_digest if "judge" in measure.evaluators else None
            settings = dataclasses.replace(evaluated.evaluate, judge=by)
            file = folder / "measured" / f"{method.name}.{measure.name}.json"
            key = training_digest(evaluated) + digest(settings)
            found.append(Measurement(method, measure, evaluated, file, key))
    return found


def is_measured(experiment: Experiment, cell: Cell, runs: Path) -> bool:
    """Return whether a cell is trained and all its measurements are done."""
    trained = (experiment.folder(runs, cell) / "export" / "facts.json").is_file()
    return trained and all(one.is_done for one in measurements_of(experiment, cell, runs))


def measure_cell(experiment: Experiment, cell: Cell, runs: Path, say: Say) -> None:
    """Do the missing measurements of a trained cell. Raises ConfigError if they need an untrained judge."""
    from mmdiff_ray.distributed.evaluate import measure, plain

    for one in measurements_of(experiment, cell, runs):
        if one.is_done:
            continue
        judge = Path(one.config.evaluate.judge or "")
        if one.needs_judge and judge.name and not (judge / "model.safetensors").is_file():
            raise ConfigError(
                f"{one.measure.name}: the judge is not trained; train {judge.parent.name} first"
            )
        start = time.monotonic()
        findings = measure(experiment.folder(runs, cell), one.config)
        one.file.parent.mkdir(exist_ok=True)
        save_tallies(one.file.with_suffix(".npz"), findings.figures)
        for name, picture in findings.pictures.items():
            picture.save(one.file.with_name(f"{one.file.stem}-{name}.png"))
        seconds = time.monotonic() - start
        figures = [plain(figure) for figure in findings.figures]
        write_json(one.file, {"digest": one.digest, "seconds": seconds, "figures": figures})
        say(f"{one.method.name}: {one.measure.name} measured in {seconds:.0f} s")
