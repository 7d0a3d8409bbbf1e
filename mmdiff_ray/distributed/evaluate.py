"""Evaluate a finished run: all evaluators on held-out rows, as a Ray task or in this process, recorded in
MLflow."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError, RunError
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.distributed import job as jobs
from mmdiff_ray.distributed.cluster import check_resources, cluster, cpus_needed
from mmdiff_ray.evaluation.context import Figure, Findings
from mmdiff_ray.evaluation.gallery import free_folder
from mmdiff_ray.evaluation.grids import to_png
from mmdiff_ray.evaluation.run import check_evaluators, evaluate, metrics_of
from mmdiff_ray.tracking.models import log_model
from mmdiff_ray.tracking.tracker import Tracker
from mmdiff_ray.training.checkpoint import write_json
from mmdiff_ray.training.export import load_export
from mmdiff_ray.training.parallel import choose_device

MAY_CHANGE = ("evaluate.", "data.", "train.device")
LOADER = "mmdiff_ray.training.export:load_export"


def evaluate_run(folder: Path, overrides: Sequence[str] = (), on_ray: bool = False) -> tuple[Findings, Path]:
    """Evaluate the exported model of a run and record what was found: `evaluation.json`, pictures, MLflow.

    With overrides it is another evaluation than the run's own: it is kept in a folder of its own under
    `evaluations/`, and in MLflow as artifacts alone. overrides: of `evaluate.*`, `data.*` and `train.device`.
    on_ray: as a task that asks for what one training worker has. Returns what was found, and the folder it is
    in. Raises ConfigError where there is no model yet, or for any other override.
    """
    file = folder / "export" / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{folder.name} has no trained model yet; go on with: mmdiff train --resume {folder}"
        )
    config = configuration.load([file], list(overrides))
    jobs.check_changes(configuration.load([file]), config, MAY_CHANGE, "an evaluation")
    check_evaluators(config)
    if on_ray:
        with cluster(cpus_needed(config.workers)):
            check_resources(config.workers)
            findings = _on_ray(folder, config)
    else:
        findings = measure(folder, config)
    place = folder
    if overrides:
        place = free_folder(folder / "evaluations" / "evaluation")
        place.mkdir(parents=True)
        (place / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf8")
    _record(folder, place, findings)
    return findings, place


def measure(folder: Path, config: Config) -> Findings:
    """Return what the configured evaluators find for the exported model."""
    model = load_export(folder / "export", str(choose_device(config.train)), config)
    manifests = read_sources(config)
    resolve_modalities(config, manifests)
    reader = jobs.make_reader(config, model.denoiser)
    splits = [manifest.splits[config.evaluate.split] for manifest in manifests]
    batches = split_batches(reader, splits, config.evaluate.rows, min(64, config.evaluate.rows))
    return evaluate(model, batches, manifests[0].columns)


def _on_ray(folder: Path, config: Config) -> Findings:
    import ray

    workers = config.workers
    task = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(_with_all_threads)
    try:
        return ray.get(task.remote(folder, config, os.getcwd()))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ConfigError | RunError) else error) from None


def _with_all_threads(folder: Path, config: Config, working_folder: str) -> Findings:
    os.chdir(working_folder)
    torch.set_num_threads(os.cpu_count() or 1)
    return measure(folder, config)


def _record(folder: Path, place: Path, findings: Findings) -> None:
    """Write what was found into a folder, the run's own or another, and record it in MLflow."""
    run, seen, own = jobs.read_run(folder), _samples_seen(folder), place == folder
    pictures, where = place / "pictures", "evaluation" if own else f"evaluations/{place.name}"
    pictures.mkdir(exist_ok=True)
    write_json(
        place / "evaluation.json", {"samples_seen": seen, "figures": [plain(f) for f in findings.figures]}
    )
    tracker = Tracker(run["tracking_uri"], run["run_id"], folder / "tracking")
    tracker.artifact(place / "evaluation.json", where)
    if own:
        tracker.metrics(metrics_of(findings.figures), seen)
    else:
        tracker.artifact(place / "config.yaml", where)
    for name, image in findings.pictures.items():
        png = to_png(image)
        (pictures / f"{name}.png").write_bytes(png)
        if own:
            tracker.image(f"evaluation/{name}", png, seen)
        tracker.artifact(pictures / f"{name}.png", where)
    tracker.close(timeout_s=30)


def record_model(folder: Path) -> None:
    """Record the exported model of a run in MLflow, to be loaded by `mlflow.pyfunc.load_model`."""
    run = jobs.read_run(folder)
    tracker = Tracker(run["tracking_uri"], run["run_id"], folder / "tracking")
    log_model(tracker, folder / "export", LOADER, _samples_seen(folder))
    tracker.close(timeout_s=60)


def plain(figure: Figure) -> dict[str, Any]:
    """Return a figure as plain values, without its tallies."""
    values: Mapping[str, Any] = dataclasses.asdict(dataclasses.replace(figure, tallies={}))
    return {key: value for key, value in values.items() if key != "tallies"}


def _samples_seen(folder: Path) -> int:
    facts = json.loads((folder / "export" / "facts.json").read_text(encoding="utf8"))
    return int(facts["progress"]["samples_seen"])
