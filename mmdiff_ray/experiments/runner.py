"""`mmdiff experiment`: all cells of a table on Ray, as child runs of one MLflow run, and their result."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmdiff_ray import config as configuration
from mmdiff_ray.config import RunError, named
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.distributed.tasks import run_tasks
from mmdiff_ray.evaluation.run import check_evaluators
from mmdiff_ray.experiments.archive import archive_file, pack, unpack
from mmdiff_ray.experiments.cell import CellHooks, cell_folder, hold, is_trained, run_cell
from mmdiff_ray.experiments.files import beside
from mmdiff_ray.experiments.page import markdown
from mmdiff_ray.experiments.plots import draw_curves, draw_overview, draw_watched
from mmdiff_ray.experiments.spec import Cell, Experiment
from mmdiff_ray.experiments.table import refusals, result
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.runs.exclusive import alone
from mmdiff_ray.tracking import run_life
from mmdiff_ray.tracking.log import waiting_in
from mmdiff_ray.tracking.store import tracking_uri
from mmdiff_ray.tracking.tracker import Tracker
from mmdiff_ray.training.checkpoint import write_json

Say = Callable[[str], None]


def run_experiment(
    experiment: Experiment, runs: Path, out: Path, say: Say, cells: Sequence[Cell] | None = None
) -> Path:
    """Train and measure every cell that is not done, and write the result beside `out`: json, md, figures.

    runs: where cells are kept; whatever is there already is not done again. Cells trained elsewhere count
    once their folders lie there, and so do those that are kept beside `out`. cells: those to run, all where
    None. Raises ConfigError before anything is started for a cell whose configuration is wrong, and RunError
    at the end if cells failed; the result is written from those that did not.
    """
    folder = _tracking(experiment, runs).parent
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        return _run(experiment, runs, out, say, cells)


def _run(experiment: Experiment, runs: Path, out: Path, say: Say, cells: Sequence[Cell] | None) -> Path:
    restore(experiment, runs, out, say)
    check_cells(experiment, runs)
    uri = tracking_uri(None, runs.absolute())
    parent = _parent(experiment, runs, uri)
    wanted = experiment.cells() if cells is None else cells
    try:
        failed = _run_cells(experiment, wanted, runs, uri, parent, say)
    except KeyboardInterrupt:
        run_life.end_run(uri, parent, "KILLED", _tracking(experiment, runs))
        say("stopped; the same command goes on with what is done, and --table shows it")
        raise
    written = write_result(experiment, runs, out, say)
    tracker = Tracker(uri, parent, _tracking(experiment, runs))
    for path in written:
        tracker.artifact(path, "result")
    tracker.close(timeout_s=30)
    run_life.end_run(uri, parent, "FAILED" if failed else "FINISHED", _tracking(experiment, runs))
    if failed:
        words = "; ".join(f"{key}: {error}" for key, error in failed.items())
        raise RunError(f"{len(failed)} cells failed, the same command tries them again: {words}")
    folder = _tracking(experiment, runs).parent
    if left := sum(waiting_in(place) for place in folder.glob("**/tracking")):
        raise RunError(
            f"the result is in {written[0]}; {left} records of {folder} wait for MLflow; send them with: "
            f"mmdiff sync {folder}"
        )
    return written[0]


def restore(experiment: Experiment, runs: Path, out: Path, say: Say) -> None:
    """Lay the cells that are kept beside a result where they count, and say how many."""
    if found := unpack(experiment, runs, out):
        say(f"{found} of {len(experiment.cells())} cells are those of {archive_file(out)}")


def check_cells(experiment: Experiment, runs: Path) -> None:
    """Raise ConfigError for any cell or measure whose configuration is wrong, before any is started."""
    refusals(experiment)
    for cell in experiment.cells():
        folder = cell_folder(experiment, cell, runs)
        config = experiment.config(cell, folder.parent)
        is_trained(folder, config)
        manifests = read_sources(config)
        if cell.seed != experiment.preset.seeds[0]:
            continue  # seeds differ in nothing else that could be wrong
        config = resolve_modalities(config, manifests)
        for method in experiment.askers(cell.method):
            for measure in experiment.measures_of(method):
                asked = experiment.asked(config, method, measure)
                check_evaluators(asked)
                with named(f"{experiment.name}, method {method.name}, measure {measure.name}"):
                    build_denoiser(asked)


def write_result(experiment: Experiment, runs: Path, out: Path, say: Say) -> list[Path]:
    """Write what is known so far: OUT.json, OUT.md, a figure per curve, and OUT.cells.zip with what these are
    made of. Return the files. A result of more cells is not replaced: this one is then written beside them.

    The main figure, what people wrote about it in OUT.discussion.md, and the other figures stand in OUT.md
    before the tables.
    """
    values, archive = result(experiment, runs), pack(experiment, runs, out)
    table = beside(out, ".json")
    there = json.loads(table.read_text(encoding="utf8")) if table.is_file() else {}
    if len(there.get("cells", [])) > len(values["cells"]):
        more, fewer = len(there["cells"]), len(values["cells"])
        say(f"{table} stays: it has {more} cells, here are {fewer}")
        out = runs / f"{experiment.name}-{experiment.preset.name}" / experiment.name
        out.parent.mkdir(parents=True, exist_ok=True)
        table = beside(out, ".json")
    write_json(table, values)
    page, *pictures = write_page(experiment, values, out)
    done = len(experiment.cells()) - len(values["missing"]) - len(values["unmeasured"])
    say(f"{done} of {len(experiment.cells())} cells are in {page}")
    return [page, table, archive, *pictures]


def write_page(experiment: Experiment, values: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the page of a result, OUT.md, and its figures; return the files, the page first."""
    said = beside(out, ".discussion.md")
    discussion = said.read_text(encoding="utf8") if said.is_file() else ""
    overview = draw_overview(values, experiment.overview, out)
    pictures = [
        *draw_curves(values, experiment.curves, out),
        *draw_watched(values, experiment.task_words, out),
    ]
    text = markdown(values, discussion, [one.name for one in overview], [one.name for one in pictures])
    page = beside(out, ".md")
    page.write_text(text, encoding="utf8")
    return [page, *overview, *pictures]


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


def _run_cells(
    experiment: Experiment, wanted: Sequence[Cell], runs: Path, uri: str, parent: str, say: Say
) -> dict[str, str]:
    """Run cells as Ray tasks; return those that failed, with why."""
    cells = {cell.key: cell for cell in wanted}
    logs = {key: cell_log(experiment, runs, key) for key in cells}
    told = {key: log.stat().st_size for key, log in logs.items() if log.is_file()}
    calls = {key: (experiment, cell, runs.absolute(), uri, parent) for key, cell in cells.items()}
    judges = [key for key, cell in cells.items() if experiment.is_judge(cell)]
    left, failed = len(cells), {}
    for ended in run_tasks(_cell_task, calls, experiment.preset.cpus, experiment.preset.gpus, judges):
        for key, log in logs.items():
            _tell(log, key, told, say)
        if ended is None:
            continue
        key, outcome = ended
        left -= 1
        if isinstance(outcome, Exception):
            failed[key] = str(outcome).strip().split("\n")[0]
        say(f"{key}: {'failed: ' + failed[key] if key in failed else 'done'} ({left} left)")
    return failed


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


def _cell_task(experiment: Experiment, cell: Cell, runs: Path, uri: str, parent: str) -> None:
    """Run one cell in a Ray worker, recorded as a child run."""
    torch.set_num_threads(max(1, int(experiment.preset.cpus)))
    folder = cell_folder(experiment, cell, runs)
    log = cell_log(experiment, runs, cell.key)
    log.parent.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        with log.open("a", encoding="utf8") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    with hold(experiment, cell, runs):
        run_id = _child(experiment, cell, folder, uri, parent)
        tracker = Tracker(uri, run_id, folder / "tracking")
        status = "FAILED"
        try:
            run_cell(experiment, cell, runs, True, say, CellHooks(say, tracker.metrics))
            for file in sorted((folder / "measured").glob("*.json")):
                measured = json.loads(file.read_text(encoding="utf8"))["figures"]
                tracker.metrics(
                    {f"{file.stem}/{f['key']}": f["value"] for f in measured if not f["bound"]}, 0
                )
                tracker.artifact(file, "measured")
            status = "FINISHED"
        finally:
            tracker.close(timeout_s=20)
            run_life.end_run(uri, run_id, status, folder / "tracking")


def _child(experiment: Experiment, cell: Cell, folder: Path, uri: str, parent: str) -> str:
    """Return the id of a cell's own run, begun or gone on with."""
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
            required=False,  # the experiment's own run has begun
        )
        write_json(known, {"run_id": run_id})
    return run_id
