"""The implementation of `mmdiff train`: train, evaluate, log the model; dry run."""

import json
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmdiff_ray.config import Config, without_passwords
from mmdiff_ray.distributed import launch
from mmdiff_ray.distributed.cluster import resources
from mmdiff_ray.distributed.display import Display, duration, make_console
from mmdiff_ray.distributed.evaluate import evaluate_run, record_model
from mmdiff_ray.evaluation.run import tables
from mmdiff_ray.models.cost import forward_flops
from mmdiff_ray.models.denoiser import Denoiser, inert_settings
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs import records
from mmdiff_ray.runs.find import find_run
from mmdiff_ray.runs.job import Job
from mmdiff_ray.storage.filesystem import is_uri
from mmdiff_ray.tracking.run_life import run_page
from mmdiff_ray.tracking.store import is_server, tracking_uri
from mmdiff_ray.training.parallel import choose_device

TIMED_STEPS = 6
"""Steps that a dry run times; the first is a warm-up."""


def train_and_evaluate(
    config: Config | None,
    resumed: str | None,
    where: str,
    overrides: Sequence[str],
    new_mlflow_run: bool = False,
) -> int:
    """Train a new run or resume one, evaluate it, log its model, and print where the results are.

    where, new_mlflow_run: for a resumed run, the folder of all runs, and whether to use a new MLflow run.
    """
    console = make_console()
    go: Callable[[Job, Display], Path] = launch.train
    if config is not None:
        job = jobs.prepare(config, jobs.new_folder(config))
    else:
        assert resumed is not None
        job = jobs.load_job(find_run(resumed, where), overrides)
        go = partial(launch.resume, new_mlflow_run=new_mlflow_run)
    for sentence in inert_settings(job.config):
        console.print(f"note: {sentence}")
    if resumed is None and job.config.train.init:
        console.print(f"init      {jobs.init_match(job)} from {job.config.train.init}", soft_wrap=True)
    if resumed is not None and is_finished(job):
        console.print(
            f"{job.folder.name} is finished at {job.config.train.samples:,} samples; to train longer: "
            f"mmdiff train --resume {_called(job.folder)} train.samples=N"
        )
        return exit_code(console, job.folder)
    if config is not None:
        launch.check_tracking(job)
    begun = time.monotonic()
    with resources(job.config.workers):
        folder = go(job, Display(console))
        run = jobs.read_run(folder)
        if run["state"] != "finished":
            console.print(
                f"stopped with a checkpoint; resume with: mmdiff train --resume {_called(folder)}",
                soft_wrap=True,
            )
            return 130
        if job.config.evaluate.evaluators == []:
            _say_where(console, folder, run["tracking_uri"])
            return exit_code(console, folder)
        rows = min(job.config.evaluate.rows, held_out(job))
        console.print(f"trained in {duration(time.monotonic() - begun)}; evaluating on {rows} rows")
        findings, _ = evaluate_run(folder, on_ray=job.config.workers.count > 0)
    if job.config.tracking.log_model:
        record_model(folder)
    for table in tables(findings.figures):
        console.print(table)
    _say_where(console, folder, run["tracking_uri"])
    return exit_code(console, folder)


def exit_code(console: Console, folder: Path) -> int:
    """Wait until a run is completely in MLflow and storage; return 0 on success, else 1."""
    return 0 if records.finish(folder, lambda text: console.print(text, soft_wrap=True)) else 1


def is_finished(job: Job) -> bool:
    """Return whether a run is trained and evaluated to the end of its current configuration."""
    facts, figures = job.export / "facts.json", job.folder / "evaluation.json"
    if jobs.read_run(job.folder)["state"] != "finished" or not facts.is_file() or not figures.is_file():
        return False
    progress = json.loads(facts.read_text(encoding="utf8"))["progress"]
    by_time = job.config.train.max_minutes is not None
    return progress["samples_seen"] >= (progress["total_samples"] if by_time else job.config.train.samples)


def held_out(job: Job) -> int:
    """Return the number of rows to evaluate on."""
    return sum(manifest.splits[job.config.evaluate.split].rows for manifest in job.manifests)


def _say_where(console: Console, folder: Path, uri: str) -> None:
    console.print(f"run       {runs.display_path(folder, folder)}", soft_wrap=True)
    console.print(f"pictures  {runs.display_path(folder, folder / 'pictures')}", soft_wrap=True)
    console.print(f"MLflow    {_ui(folder, uri)}", soft_wrap=True)
    console.print(f"next      mmdiff sample {_called(folder)} --num 16", soft_wrap=True)


def _ui(folder: Path, uri: str) -> str:
    """Return how to open a run in MLflow: `mmdiff ui` if it finds the store, else a URI."""
    where = folder.parent
    if is_uri(runs.address(folder)) or is_server(uri) or uri != without_passwords(tracking_uri(None, where)):
        return run_page(uri, jobs.read_run(folder)["run_id"])
    return (
        "mmdiff ui"
        if where == Path("runs").absolute()
        else f"mmdiff ui --runs {runs.display_path(where, where)}"
    )


def _called(folder: Path) -> str:
    """Return the shortest argument that refers to a run from the working folder."""
    return (
        folder.name
        if folder.parent == Path("runs").absolute()
        else shlex.quote(runs.display_path(folder, folder))
    )


def dry_run(config: Config) -> int:
    """Check a configuration against its data; print parameters, channels, tasks, priors and cost."""
    console = make_console()
    job = jobs.prepare(config, jobs.new_folder(config))
    denoiser = job.denoiser()
    console.print(_modality_table(job, denoiser))
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    console.print(f"parameters  {parameters:,} ({config.model.backbone}, preset {config.model.preset})")
    console.print(f"forward     {forward_flops(denoiser) / 1e9:.3g} GFLOP per sample in the backbone")
    console.print(
        f"space       {denoiser.process.channels} channels x {denoiser.size[0]} x {denoiser.size[1]}"
    )
    rows = sum(manifest.splits["train"].rows for manifest in job.manifests)
    samples = config.train.samples
    console.print(f"data        {rows:,} training rows; {samples / rows:.1f} epochs in {samples:,} samples")
    console.print(_cost(job, denoiser))
    if config.train.init:
        console.print(f"init        {jobs.init_match(job)}")
    for sentence in inert_settings(job.config):
        console.print(f"note        {sentence}")
    console.print("nothing was started; train with the same command without --dry-run")
    return 0


def _modality_table(job: Job, denoiser: Denoiser) -> Table:
    shown = Table(title=f"{job.config.name}: modalities", title_justify="left")
    for heading in ("instance", "type", "channels", "profile", "prior L0 (nats/dim)", "likelihood"):
        shown.add_column(heading)
    for name, modality in denoiser.modalities.items():
        where, weights = denoiser.process.layout[name], modality.weights
        anchor = name == denoiser.anchor
        profile = "sqrt(abar)" if anchor else f"{weights.family} x {weights.scale:g}, shape {weights.shape:g}"
        shown.add_row(
            name + (" (anchor)" if anchor else ""),
            job.config.modalities[name].type,
            f"{where.start}-{where.stop - 1}",
            "given only" if modality.only_given else profile,
            "" if modality.only_given else f"{denoiser.process.prior_nats(name):.2g}",
            modality.likelihood,
        )
    return shown


def rows_per_s(job: Job, denoiser: Denoiser) -> tuple[float, int, torch.device] | None:
    """Measure (rows per second of one worker, rows per step, device) on this machine.

    None if workers have GPUs and this machine has none.
    """
    from mmdiff_ray.data.batches import split_batches
    from mmdiff_ray.training.trainer import Trainer

    config = job.config
    if config.workers.gpus and not torch.cuda.is_available():
        return None
    splits = [manifest.splits["train"] for manifest in job.manifests]
    workers = max(1, config.workers.count)
    size = config.train.micro_batch or config.train.global_batch // workers
    batch = next(split_batches(job.reader(denoiser), splits, size, size))
    trainer = Trainer(config, denoiser, choose_device(config.train))
    if config.workers.threads or workers > 1:
        torch.set_num_threads(config.workers.threads or max(1, int(config.workers.cpus)))
    times = []
    for _ in range(TIMED_STEPS):
        begun = time.perf_counter()
        trainer.step(batch)
        trainer.report()
        times.append(time.perf_counter() - begun)
    return size / statistics.median(times[1:]), size, trainer.device


def _cost(job: Job, denoiser: Denoiser) -> str:
    """Return the cost of a step and of the run, from the time of a step on this machine."""
    config = job.config
    timed = rows_per_s(job, denoiser)
    if timed is None:
        return "a step      not timed: workers have GPUs (workers.gpus), this machine has none"
    rate, size, device = timed
    workers = max(1, config.workers.count)
    minutes = config.train.samples / (rate * workers) / 60
    limit = config.train.max_minutes
    length = f"about {minutes:.3g} minutes" + (
        f", shortened to {limit:g} (train.max_minutes)" if limit and limit < minutes else ""
    )
    return (
        f"a step      {size} rows in {size / rate:.2g} s on {device} here ({rate:.0f} rows/s)\n"
        f"the run     {length} at this speed with {workers} worker{'s' if workers > 1 else ''}, if each has "
        "its own cores and data loading keeps up"
    )
