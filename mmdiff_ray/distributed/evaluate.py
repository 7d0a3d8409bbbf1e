"""Evaluate a trained model on held-out rows, in this process or on Ray, and record the results in MLflow."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmdiff_ray import config as configuration
from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config, ConfigError, OutageError, RunError
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.data.parquet import Tables
from mmdiff_ray.distributed import flow
from mmdiff_ray.distributed.cluster import check_resources, cluster, cpus_needed
from mmdiff_ray.distributed.display import show_progress
from mmdiff_ray.distributed.worker import enter_folder
from mmdiff_ray.evaluation.context import Figure, Findings
from mmdiff_ray.evaluation.gallery import free_folder
from mmdiff_ray.evaluation.requests import SampleFn, SampleRequest, cached, run_request, sample_locally
from mmdiff_ray.evaluation.run import check_evaluators, evaluate, joined
from mmdiff_ray.evaluation.tallies import save_tallies
from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.runs import describe
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs.find import Model
from mmdiff_ray.sampling.export import load_export, read_config
from mmdiff_ray.sampling.generator import Generator, Samples
from mmdiff_ray.storage.filesystem import join
from mmdiff_ray.storage.mirror import fetched
from mmdiff_ray.tracking.models import log_model
from mmdiff_ray.tracking.recorder import DESCRIPTION_TAG
from mmdiff_ray.tracking.tracker import Tracker
from mmdiff_ray.training.checkpoint import write_json
from mmdiff_ray.training.parallel import choose_device

MAY_CHANGE = ("evaluate.", "data.", "train.device")
LOADER = "mmdiff_ray.sampling.export:load_export"


def evaluate_run(
    folder: Path, overrides: Sequence[str] = (), on_ray: bool = False, pool: int = 0, progress: bool = False
) -> tuple[Findings, Path]:
    """Evaluate the exported model of a run; return the findings and the folder they were written to.

    Writes `evaluation.json` and pictures, and records them in MLflow. With overrides, the results go to a new
    folder under `evaluations/`, and MLflow gets artifacts but no metrics. Samples are cached until the
    evaluation is written, so a killed evaluation resumes.

    overrides: of `evaluate.*`, `data.*` and `train.device`.
    on_ray: evaluate in a Ray task with the resources of one training worker.
    pool: number of Ray actors that draw the samples; 0: draw them in this process. Not with on_ray.
    progress: show a progress bar.

    Raises ConfigError if the run has no model yet, or for any other override.
    """
    fetched(join(runs.address(folder), "export"))
    file = folder / "export" / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{folder.name} has no trained model yet; resume training: mmdiff train --resume {folder}"
        )
    config = configuration.load_saved(file, list(overrides))
    jobs.check_kept(configuration.load_saved(file), config, MAY_CHANGE, "an evaluation")
    check_evaluators(config)
    if on_ray:
        with cluster(cpus_needed(config.workers)):
            check_resources(config.workers)
            findings = measure_on_ray(folder, config)
    else:
        cache = folder / "evaluations" / f"unfinished-{_cache_key(folder, config)}"
        with cluster() if pool else nullcontext():
            sample_fn = pooled(folder, config, pool) if pool else None
            findings = measure(folder, config, sample_fn, cache, progress)
    place = folder
    if overrides:
        place = free_folder(folder / "evaluations" / "evaluation", _evaluations(folder))
        place.mkdir(parents=True)
        (place / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf8")
    _record(folder, place, config, findings)
    if not on_ray:
        shutil.rmtree(cache, ignore_errors=True)
    return findings, place


def evaluate_model(model: Model, overrides: Sequence[str]) -> tuple[Findings, Path]:
    """Evaluate a published model or a checkpoint; write the results to a new folder under `evaluations/`.

    Returns what `evaluate_run` returns. Raises ConfigError if the overrides set no `data.sources`.
    """
    config = read_config(model.where, list(overrides))
    jobs.check_kept(read_config(model.where), config, MAY_CHANGE, "an evaluation")
    if not config.data.sources:
        raise ConfigError(f"{model.name} comes without data; add 'data.sources=[{{uri: data/NAME}}]'")
    check_evaluators(config)
    generator = load_export(model.where, str(choose_device(config.train)), config)
    findings = measure_model(generator, with_progress(sample_locally(generator)))
    place = free_folder(Path("evaluations") / model.name)
    _write(place, model.samples_seen, findings)
    return findings, place


def measure(
    folder: Path,
    config: Config,
    sample_fn: SampleFn | None = None,
    cache: Path | None = None,
    progress: bool = False,
    tables: Tables | None = None,
) -> Findings:
    """Run the configured evaluators on the exported model.

    sample_fn: draws the samples; by default in this process. cache: folder that caches the samples.
    progress: show a progress bar. tables: as in `Job`.
    """
    model = load_export(folder / "export", str(choose_device(config.train)), config)
    sample_fn = sample_fn or sample_locally(model)
    if cache is not None:
        sample_fn = cached(cache, sample_fn)
    if progress:
        sample_fn = with_progress(sample_fn)
    return measure_model(model, sample_fn, tables)


def measure_model(model: Generator, sample_fn: SampleFn, tables: Tables | None = None) -> Findings:
    """Run the evaluators on a loaded model, with the data of its configuration."""
    config = model.config
    manifests = read_sources(config)
    resolve_modalities(config, manifests)
    reader = jobs.make_reader(config, model.denoiser, tables)
    splits = [manifest.splits[config.evaluate.split] for manifest in manifests]
    settings = config.evaluate
    batches = split_batches(reader, splits, settings.rows, min(64, settings.rows), settings.visits)

    def training(rows: int) -> Batch:
        train = [manifest.splits["train"] for manifest in manifests]
        return joined(split_batches(reader, train, rows, min(64, rows)))

    return evaluate(model, batches, manifests[0].columns, sample_fn, training)


class ModelStage:
    """Draw samples with the exported model of a run, in a Ray actor."""

    def __init__(self, export: str, config: Config) -> None:
        self.export, self.config = export, config

    def __getstate__(self) -> dict[str, Any]:
        return {"export": self.export, "config": self.config}  # every actor loads the model itself

    @cached_property
    def model(self) -> Generator:
        """Return the model, on a GPU if this actor has one."""
        return load_export(self.export, str(choose_device(self.config.train)), self.config)

    def __call__(self, request: SampleRequest) -> Samples:
        """Draw the samples of a request."""
        return run_request(self.model, request)


def pooled(folder: Path, config: Config, workers: int) -> SampleFn:
    """Return a function that samples with a pool of Ray Data actors."""
    stage = ModelStage(join(runs.address(folder.absolute()), "export"), config)

    def sample_pooled(name: str, requests: Sequence[SampleRequest]) -> Iterator[Samples]:
        portable = [request.to("cpu") for request in requests]  # actors may lack this machine's GPU
        return flow.run(None, [stage], portable, min(workers, len(requests)))

    return sample_pooled


def with_progress(sample_fn: SampleFn) -> SampleFn:
    """Wrap `sample_fn` so that it shows a progress bar."""

    def sample_shown(name: str, requests: Sequence[SampleRequest]) -> Iterator[Samples]:
        total = sum(request.rows for request in requests)
        with show_progress(f"sampling, {name}", total, True) as advance:
            for request, samples in zip(requests, sample_fn(name, requests), strict=True):
                advance(request.rows)
                yield samples

    return sample_shown


def _cache_key(folder: Path, config: Config) -> str:
    """Return a hash of an evaluation's settings and of the model file's size and time."""
    weights = (folder / "export" / "model.safetensors").stat()
    text = f"{configuration.to_yaml(config)}{weights.st_size}{weights.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measure_on_ray(
    folder: Path, config: Config, tables: Tables | None = None, facts: Mapping[str, Any] | None = None
) -> Findings:
    """Run `measure` in a Ray task with the resources of one training worker.

    facts: the model's `facts.json`. Raises OutageError if the task's machine sees a different model.
    """
    import ray

    workers = config.workers
    # DEFAULT: outside the placement group of a sweep's trial, which has room for the trial's driver only.
    options: dict[str, Any] = {"num_cpus": workers.cpus, "num_gpus": workers.gpus}
    options |= {"resources": workers.resources} if workers.resources else {}
    options |= {"label_selector": workers.labels} if workers.labels else {}
    task = ray.remote(**options, scheduling_strategy="DEFAULT")(_with_all_threads)
    try:
        return ray.get(task.remote(runs.address(folder), config, os.getcwd(), tables, facts))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ConfigError | RunError) else error) from None


def _with_all_threads(
    where: str, config: Config, working_folder: str, tables: Tables | None, facts: Mapping[str, Any] | None
) -> Findings:
    enter_folder(working_folder)
    torch.set_num_threads(os.cpu_count() or 1)
    folder = fetched(join(where, "export")).parent
    if facts is not None and export_facts(folder) != facts:
        raise OutageError(f"{where} has an older model: the one to evaluate was not uploaded")
    return measure(folder, config, tables=tables)


def export_facts(folder: Path) -> dict[str, Any]:
    """Return the `facts.json` of a run's exported model; empty if the run has none."""
    file = folder / "export" / "facts.json"
    return json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}


def _record(folder: Path, place: Path, config: Config, findings: Findings) -> None:
    """Write the findings of an evaluation to a folder and record them in MLflow.

    place: the run's own folder, or one for an evaluation with overrides, which logs no metrics.
    """
    run, seen, own = jobs.read_run(folder), _samples_seen(folder), place == folder
    pictures, where = place / "pictures", "evaluation" if own else f"evaluations/{place.name}"
    _write(place, seen, findings)
    tracker = Tracker(run["tracking_uri"], run["run_id"], folder / "tracking")
    tracker.artifact(place / "evaluation.json", where)
    if own:
        tracker.metrics(describe.metrics(findings.figures), seen)
        tracker.table(f"{where}/figures.json", describe.COLUMNS, describe.rows_of(findings.figures))
        text = describe.description(config, runs.address(folder), seen, findings.figures)
        tracker.tags({DESCRIPTION_TAG: text})
    else:
        tracker.artifact(place / "config.yaml", where)
    for name, image in findings.pictures.items():
        if own:
            tracker.image(f"samples/{name}", to_png(image), seen)  # ends the series drawn during training
        tracker.artifact(pictures / f"{name}.png", where)
    for name in findings.sounds:
        tracker.artifact(place / "sounds" / f"{name}.wav", where)
    tracker.close(timeout_s=30)
    if (mirror := runs.mirror_of(folder)) is not None:
        drawn = [f"pictures/{name}.png" for name in findings.pictures]
        drawn += [f"sounds/{name}.wav" for name in findings.sounds]
        mirror.send(
            *(
                [*drawn, "evaluation.npz", "evaluation.json"]
                if own
                else [place.relative_to(folder).as_posix()]
            )
        )


def _write(place: Path, seen: int, findings: Findings) -> None:
    """Write `evaluation.json`, the tallies of its figures, pictures and sounds to a folder."""
    write_json(
        place / "evaluation.json", {"samples_seen": seen, "figures": [plain(f) for f in findings.figures]}
    )
    save_tallies(place / "evaluation.npz", findings.figures)
    (place / "pictures").mkdir(exist_ok=True)
    for name, image in findings.pictures.items():
        (place / "pictures" / f"{name}.png").write_bytes(to_png(image))
    for name, wav in findings.sounds.items():
        (place / "sounds").mkdir(exist_ok=True)
        (place / "sounds" / f"{name}.wav").write_bytes(wav)


def _evaluations(folder: Path) -> list[str]:
    """Return the names of a run's evaluations in object storage."""
    mirror = runs.mirror_of(folder)
    try:
        return [] if mirror is None else [name.partition("/")[0] for name in mirror.files("evaluations")]
    except OSError as error:
        raise RunError(f"cannot list {runs.address(folder)}: {error}") from None


def record_model(folder: Path) -> None:
    """Log the exported model of a run to MLflow, for `mlflow.pyfunc.load_model`."""
    run = jobs.read_run(folder)
    tracker = Tracker(run["tracking_uri"], run["run_id"], folder / "tracking")
    log_model(tracker, folder / "export", LOADER, _samples_seen(folder))
    tracker.close(timeout_s=60)


def plain(figure: Figure) -> dict[str, Any]:
    """Convert a figure to a dict for JSON, without its tallies."""
    values: Mapping[str, Any] = dataclasses.asdict(dataclasses.replace(figure, tallies={}))
    return {key: value for key, value in values.items() if key != "tallies"}


def _samples_seen(folder: Path) -> int:
    facts = export_facts(folder)
    return int(facts["progress"]["samples_seen"])
