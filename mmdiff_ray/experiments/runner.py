"""`mmdiff experiment`: run all cells of a table on Ray as child runs of one MLflow run; write the result."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmdiff_ray import config as configuration
from mmdiff_ray.config import RunError, named
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.data.manifest import is_built
from mmdiff_ray.distributed.tasks import run_tasks
from mmdiff_ray.evaluation.run import check_evaluators
from mmdiff_ray.experiments.archive import archive_file, pack, result_file, unpack
from mmdiff_ray.experiments.cell import CellHooks, is_trained, lock_cell, run_cell
from mmdiff_ray.experiments.gallery import draw_gallery
from mmdiff_ray.experiments.measurement import Say
from mmdiff_ray.experiments.page import markdown
from mmdiff_ray.experiments.parts import Cell
from mmdiff_ray.experiments.plots import draw_curves, draw_overview, draw_watched
from mmdiff_ray.experiments.spec import Experiment
from mmdiff_ray.experiments.table import refusals, result
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.storage.lock import lock_folder
from mmdiff_ray.tracking import run_life
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.store import tracking_uri
from mmdiff_ray.tracking.tracker import Tracker
from mmdiff_ray.training.checkpoint import write_json


def run_experiment(experiment: Experiment, runs: Path, out: Path, say: Say, cells: Sequence[Cell]) -> Path:
    """Train and measure the unfinished cells, write the result next to `out`, and return its page.

    Cells that are in `runs` or in the archive next to `out` are not trained again, even if they come from
    another machine. Raises ConfigError for a wrong configuration before any cell starts. Raises RunError at
    the end if cells failed; the result then has the other cells.
    """
    folder, uri = experiment.folder(runs), tracking_uri(None, runs.absolute())
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        restore(experiment, runs, out, say)
        check_cells(experiment, runs)
        root, name = folder / "tracking", f"experiment-{experiment.name}"
        settings = {"experiment": experiment.name, "preset": experiment.preset.name, "main": experiment.main}
        yaml = configuration.to_yaml(experiment)
        parent = _start_or_resume(uri, root, name, folder.name, settings, yaml)
        try:
            failed = _run_cells(experiment, cells, runs, uri, parent, say)
        except KeyboardInterrupt:
            run_life.end_run(uri, parent, "KILLED", root)
            say("stopped; run the same command to resume, or with --table to see the result so far")
            raise
        written = write_result(experiment, runs, out, say)
        tracker = Tracker(uri, parent, root)
        for path in written:
            tracker.artifact(path, "result")
        tracker.close(timeout_s=30)
        run_life.end_run(uri, parent, "FAILED" if failed else "FINISHED", root)
    if failed:
        errors = "; ".join(f"{key}: {error}" for key, error in failed.items())
        raise RunError(f"{len(failed)} cells failed; run the same command to retry them: {errors}")
    if left := sum(Log(place).waiting for place in folder.glob("**/tracking")):
        raise RunError(
            f"the result is in {written[0]}, but {left} records are not in MLflow yet; "
            f"send them with: mmdiff sync {folder}"
        )
    return written[0]


def restore(experiment: Experiment, runs: Path, out: Path, say: Say) -> None:
    """Restore the archived cells of a result and print their number."""
    if found := unpack(experiment, runs, out):
        say(f"{found} of {len(experiment.cells())} cells restored from {archive_file(out)}")


def check_cells(experiment: Experiment, runs: Path) -> None:
    """Check the configuration of every cell and measure. Raises ConfigError for the first wrong one."""
    refusals(experiment)
    for cell in experiment.cells():
        folder = experiment.folder(runs, cell)
        config = experiment.config(cell, folder.parent)
        is_trained(experiment, cell, runs)
        if (data := experiment.own_data(cell, runs)) and not is_built(data.uri):
            continue
        manifests = read_sources(config)
        if cell.seed != experiment.preset.seeds[0]:
            continue  # other seeds differ only in their data sources
        config = resolve_modalities(config, manifests)
        for method in experiment.evaluated_on(cell.method):
            for measure in experiment.measures_of(method):
                evaluated = experiment.evaluation_config(config, method, measure)
                check_evaluators(evaluated)
                with named(f"{experiment.name}, method {method.name}, measure {measure.name}"):
                    build_denoiser(evaluated)
                    if evaluated.data.sources != config.data.sources:
                        read_sources(evaluated)


def write_result(experiment: Experiment, runs: Path, out: Path, say: Say) -> list[Path]:
    """Write the result so far: OUT.md, OUT.json, OUT.cells.zip and figures. Return the files, the page first.

    If an existing result has more cells, it is kept, and this one is written into the experiment's folder in
    `runs`.
    """
    values, archive = result(experiment, runs), pack(experiment, runs, out)
    table = result_file(out, ".json")
    existing = json.loads(table.read_text(encoding="utf8")) if table.is_file() else {}
    if len(existing.get("cells", [])) > len(values["cells"]):
        say(f"{table} is kept: it has {len(existing['cells'])} cells, this result has {len(values['cells'])}")
        out = experiment.folder(runs) / experiment.name
        out.parent.mkdir(parents=True, exist_ok=True)
        table = result_file(out, ".json")
    write_json(table, values)
    gallery = draw_gallery(experiment, runs, out)
    page, *pictures = write_page(experiment, values, out)
    done = len(experiment.cells()) - len(values["missing"]) - len(values["unmeasured"])
    say(f"{done} of {len(experiment.cells())} cells are in {page}")
    return [page, table, archive, *gallery, *pictures]


def write_page(experiment: Experiment, values: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the page of a result, OUT.md, and its figures; return the files, the page first.

    The page includes OUT-pictures.png and OUT.discussion.md, if they exist.
    """
    file = result_file(out, ".discussion.md")
    discussion = file.read_text(encoding="utf8") if file.is_file() else ""
    overview = draw_overview(values, experiment.overview, out)
    pictures = draw_curves(values, experiment.curves, out)
    pictures += draw_watched(values, experiment.task_words, out)
    page = result_file(out, ".md")
    main, others = ([one.name for one in files] for files in (overview, pictures))
    grid = result_file(out, "-pictures.png")
    main += [grid.name] if experiment.pictures and grid.is_file() else []
    text = markdown(values, discussion, main, others, experiment.overview)
    page.write_text(text, encoding="utf8")
    return [page, *overview, *pictures]


def _start_or_resume(
    uri: str, root: Path, experiment: str, name: str, settings: Mapping[str, Any], yaml: str, **options: Any
) -> str:
    """Resume the MLflow run whose log is in `root`, or start a new one; return its id."""
    file = root / "run.json"
    if file.is_file():
        run_id = json.loads(file.read_text(encoding="utf8"))["run_id"]
        run_life.resume_run(uri, run_id, root)
        return run_id
    root.mkdir(parents=True, exist_ok=True)
    run_id = run_life.start_run(uri, experiment, name, root, settings, yaml, **options)
    write_json(file, {"run_id": run_id})
    return run_id


def _run_cells(
    experiment: Experiment, cells: Sequence[Cell], runs: Path, uri: str, parent: str, say: Say
) -> dict[str, str]:
    """Run cells as Ray tasks and print their logs; return cell key -> error for failed cells."""
    logs = {cell.key: experiment.folder(runs) / f"{cell.key}.log" for cell in cells}
    printed = {key: log.stat().st_size if log.is_file() else 0 for key, log in logs.items()}
    calls = {cell.key: (experiment, cell, runs.absolute(), uri, parent) for cell in cells}
    first = [cell.key for cell in experiment.needed_first() if cell in cells]
    left, failed = len(cells), {}
    for ended in run_tasks(_cell_task, calls, experiment.preset.cpus, experiment.preset.gpus, first):
        for key, log in logs.items():
            if log.is_file():
                with log.open(encoding="utf8") as file:
                    file.seek(printed[key])
                    for line in file.readlines():
                        say(f"{key}: {line.rstrip()}")
                    printed[key] = file.tell()
        if ended is None:
            continue
        key, outcome = ended
        left -= 1
        if isinstance(outcome, Exception):
            failed[key] = str(outcome).strip().split("\n")[0]
        say(f"{key}: {'failed: ' + failed[key] if key in failed else 'done'} ({left} left)")
    return failed


def _cell_task(experiment: Experiment, cell: Cell, runs: Path, uri: str, parent: str) -> None:
    """Run one cell in a Ray worker and record it as a child run."""
    torch.set_num_threads(max(1, int(experiment.preset.cpus)))
    folder, log = experiment.folder(runs, cell), experiment.folder(runs) / f"{cell.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        with log.open("a", encoding="utf8") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    with lock_cell(experiment, cell, runs):
        config, root = experiment.config(cell, folder.parent), folder / "tracking"
        run_id = _start_or_resume(
            uri,
            root,
            f"experiment-{experiment.name}",
            cell.key,
            configuration.flatten(config),
            configuration.to_yaml(config),
            tags={"mlflow.parentRunId": parent, "method": cell.method.name, "seed": cell.seed},
            required=False,  # the store was reachable when the parent run started
        )
        tracker, status = Tracker(uri, run_id, root), "FAILED"
        try:
            run_cell(experiment, cell, runs, True, say, CellHooks(say, tracker.metrics))
            for file in sorted((folder / "measured").glob("*.json")):
                figures = json.loads(file.read_text(encoding="utf8"))["figures"]
                tracker.metrics({f"{file.stem}/{f['key']}": f["value"] for f in figures if not f["bound"]}, 0)
                tracker.artifact(file, "measured")
            status = "FINISHED"
        finally:
            tracker.close(timeout_s=20)
            run_life.end_run(uri, run_id, status, root)
