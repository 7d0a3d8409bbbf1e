"""`mmdiff experiment`: all cells of a table on Ray, as child runs of one MLflow run, and their result."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.denoiser import build_denoiser
from mmdiff_ray.distributed.cluster import cluster
from mmdiff_ray.evaluation.run import check_evaluators
from mmdiff_ray.experiments.cell import CellHooks, cell_folder, is_trained, run_cell
from mmdiff_ray.experiments.curves import draw_curves
from mmdiff_ray.experiments.spec import Cell, Experiment, named
from mmdiff_ray.experiments.table import markdown, result
from mmdiff_ray.tracking import run_life
from mmdiff_ray.tracking.store import tracking_uri
from mmdiff_ray.tracking.tracker import Tracker
from mmdiff_ray.training.checkpoint import write_json

POLL_S = 2.0
Say = Callable[[str], None]


def run_experiment(experiment: Experiment, runs: Path, out: Path, say: Say) -> Path:
    """Train and measure every cell that is not done, and write the result beside `out`: json, md, figures.

    runs: where cells are kept; whatever is there already is not done again. Cells trained elsewhere count
    once their folders lie there. Raises ConfigError before anything is started for a cell whose configuration
    is wrong, and RunError at the end if cells failed; the result is written from those that did not.
    """
    build_data(experiment, say)
    check_cells(experiment, runs)
    uri = tracking_uri(None, runs.absolute())
    parent = _parent(experiment, runs, uri)
    failed = _run_cells(experiment, runs, uri, parent, say)
    written = write_result(experiment, runs, out, say)
    tracker = Tracker(uri, parent, _tracking(experiment, runs))
    for path in written:
        tracker.artifact(path, "result")
    tracker.close(timeout_s=30)
    run_life.end_run(uri, parent, "FAILED" if failed else "FINISHED", _tracking(experiment, runs))
    if failed:
        words = "; ".join(f"{key}: {error}" for key, error in failed.items())
        raise RunError(f"{len(failed)} cells failed, the same command tries them again: {words}")
    return written[0]


def build_data(experiment: Experiment, say: Say) -> None:
    """Build the experiment's data set if it names one that is not there."""
    data = experiment.data
    if not data or (Path(data["uri"]) / "manifest.json").is_file():
        return
    from pipelines.base import build

    say(f"building {data['pipeline']} in {data['uri']}")
    options = {key: str(value) for key, value in data.get("options", {}).items()}
    build(data["pipeline"], data["uri"], options, workers=0)


def check_cells(experiment: Experiment, runs: Path) -> None:
    """Raise ConfigError for any cell or measure whose configuration is wrong, before any is started."""
    for cell in experiment.cells():
        folder = cell_folder(experiment, cell, runs)
        config = experiment.config(cell, folder.parent)
        is_trained(folder, config)
        if cell.seed != experiment.preset.seeds[0]:
            continue  # seeds differ in nothing that could be wrong
        config = resolve_modalities(config, read_sources(config))
        for method in experiment.askers(cell.method):
            for measure in experiment.measures_of(method):
                asked = experiment.asked(config, method, measure)
                check_evaluators(asked)
                with named(f"{experiment.name}, method {method.name}, measure {measure.name}"):
                    build_denoiser(asked)


def write_result(experiment: Experiment, runs: Path, out: Path, say: Say) -> list[Path]:
    """Write what is known so far: OUT.json, OUT.md and a figure per curve. Return the files."""
    values = result(experiment, runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), values)
    out.with_suffix(".md").write_text(markdown(values), encoding="utf8")
    pictures = draw_curves(values, experiment.curves, out)
    done = len(experiment.cells()) - len(values["missing"])
    say(f"{done} of {len(experiment.cells())} cells are in {out.with_suffix('.md')}")
    return [out.with_suffix(".json"), out.with_suffix(".md"), *pictures]


def _parent(experiment: Experiment, runs: Path, uri: str) -> str:
    """Return the MLflow run of the whole experiment, begun or gone on with."""
    root = _tracking(experiment, runs)
    known = root / "run.json"
    if known.is_file():
        run_id = json.loads(known.read_text(encoding="utf8"))["run_id"]
        run_life.resume_run(uri, run_id, root)
        return run_id
    root.mkdir(parents=True, exist_ok=True)
    settings = {"experiment": experiment.name, "preset": experiment.preset.name, "main": experiment.main}
    run_id = run_life.start_run(
        uri,
        f"experiment-{experiment.name}",
        f"{experiment.name}-{experiment.preset.name}",
        root,
        settings,
        configuration.to_yaml(experiment),
    )
    write_json(known, {"run_id": run_id})
    return run_id


def _tracking(experiment: Experiment, runs: Path) -> Path:
    return runs.absolute() / f"{experiment.name}-{experiment.preset.name}" / "tracking"


def _run_cells(experiment: Experiment, runs: Path, uri: str, parent: str, say: Say) -> dict[str, str]:
    """Run all cells as Ray tasks, as many at once as the cluster holds; return those that failed."""
    import ray

    preset, failed = experiment.preset, {}
    with cluster(os.cpu_count() or 1):
        _check_fits(experiment)
        task = ray.remote(num_cpus=preset.cpus, num_gpus=preset.gpus, max_retries=1)(_cell_task)
        settings = (runs.absolute(), uri, parent, os.getcwd())
        first = [cell for cell in experiment.cells() if experiment.is_judge(cell)]
        waiting = {task.remote(experiment, cell, *settings): cell for cell in first}
        after = list(waiting)  # what a task is given, it waits for
        others = [cell for cell in experiment.cells() if not experiment.is_judge(cell)]
        waiting |= {task.remote(experiment, cell, *settings, *after): cell for cell in others}
        logs = {cell.key: cell_log(experiment, runs, cell.key) for cell in experiment.cells()}
        told = {key: log.stat().st_size for key, log in logs.items() if log.is_file()}
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=POLL_S)
            for key in (cell.key for cell in waiting.values()):
                _tell(logs[key], key, told, say)
            for reference in ready:
                cell = waiting.pop(reference)
                try:
                    ray.get(reference)
                    say(f"{cell.key}: done ({len(waiting)} left)")
                except ray.exceptions.RayTaskError as error:
                    failed[cell.key] = str(error.cause).split("\n")[0]
                    say(f"{cell.key}: failed: {failed[cell.key]}")
    return failed


def _check_fits(experiment: Experiment) -> None:
    import ray

    total = ray.cluster_resources()
    for resource, wanted in (("CPU", experiment.preset.cpus), ("GPU", experiment.preset.gpus)):
        if wanted > total.get(resource, 0):
            raise ConfigError(
                f"preset {experiment.preset.name}: a cell needs {wanted:g} {resource}s, the cluster has "
                f"{total.get(resource, 0):g}"
            )


def cell_log(experiment: Experiment, runs: Path, key: str) -> Path:
    """Return the file that a cell's task writes its lines to."""
    return runs.absolute() / f"{experiment.name}-{experiment.preset.name}" / f"{key}.log"


def _tell(log: Path, key: str, told: dict[str, int], say: Say) -> None:
    """Say the lines that a cell has added to its log since the last look."""
    if not log.is_file():
        return
    with log.open(encoding="utf8") as file:
        file.seek(told.get(key, 0))
        lines = file.readlines()
        told[key] = file.tell()
    for line in lines:
        say(f"{key}: {line.rstrip()}")


def _cell_task(
    experiment: Experiment,
    cell: Cell,
    runs: Path,
    uri: str,
    parent: str,
    working_folder: str,
    *after: None,
) -> None:
    """Run one cell in a Ray worker, recorded as a child run. after: tasks that had to end before."""
    os.chdir(working_folder)
    torch.set_num_threads(max(1, int(experiment.preset.cpus)))
    folder = cell_folder(experiment, cell, runs)
    log = cell_log(experiment, runs, cell.key)
    log.parent.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        with log.open("a", encoding="utf8") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    tracker = _child(experiment, cell, folder, uri, parent)
    status = "FAILED"
    try:
        run_cell(experiment, cell, runs, True, say, CellHooks(say, tracker.metrics))
        for file in sorted((folder / "measured").glob("*.json")):
            measured = json.loads(file.read_text(encoding="utf8"))["figures"]
            tracker.metrics({f"{file.stem}/{f['key']}": f["value"] for f in measured if not f["bound"]}, 0)
            tracker.artifact(file, "measured")
        status = "FINISHED"
    finally:
        tracker.close(timeout_s=20)
        run_life.end_run(uri, tracker.run_id, status, folder / "tracking")


def _child(experiment: Experiment, cell: Cell, folder: Path, uri: str, parent: str) -> Tracker:
    """Return the tracker of a cell's own run, begun or gone on with."""
    root = folder / "tracking"
    known = root / "run.json"
    if known.is_file():
        run_id = json.loads(known.read_text(encoding="utf8"))["run_id"]
        run_life.resume_run(uri, run_id, root)
    else:
        config = experiment.config(cell, folder.parent)
        root.mkdir(parents=True, exist_ok=True)
        run_id = run_life.start_run(
            uri,
            f"experiment-{experiment.name}",
            cell.key,
            root,
            configuration.flatten(config),
            configuration.to_yaml(config),
            tags={"mlflow.parentRunId": parent, "method": cell.method.name, "seed": cell.seed},
        )
        write_json(known, {"run_id": run_id})
    return Tracker(uri, run_id, root)
