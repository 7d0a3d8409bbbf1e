"""Run a sweep on Ray Tune. Trials are child runs of one MLflow run; an interrupted sweep resumes."""

import dataclasses
import json
import logging
import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError, RunError, named, without_passwords
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.distributed.cluster import amount_of, check_resources, cluster, places, split_records
from mmdiff_ray.distributed.launch import stop_requests
from mmdiff_ray.distributed.nodes import autoscales
from mmdiff_ray.distributed.tune.callback import ProgressCallback
from mmdiff_ray.distributed.tune.schedulers import Deadline, make_scheduler
from mmdiff_ray.distributed.tune.searcher import SpaceSearcher
from mmdiff_ray.distributed.tune.table_cache import SharedTables, describe, start_cache
from mmdiff_ray.distributed.tune.trial import SCORE, run_trial, score
from mmdiff_ray.evaluation.run import evaluate, metrics_of
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs.find import find_run
from mmdiff_ray.runs.job import Job
from mmdiff_ray.sampling.generator import Generator
from mmdiff_ray.storage.filesystem import filesystem, is_uri, join
from mmdiff_ray.storage.mirror import cached
from mmdiff_ray.sweeps.journal import read_trials
from mmdiff_ray.sweeps.record import sweep_description
from mmdiff_ray.sweeps.space import Make, SpaceCheck, check_point, check_space, sizes_network
from mmdiff_ray.sweeps.spec import OPTIONS, Sweep
from mmdiff_ray.tracking import run_life
from mmdiff_ray.tracking.recorder import DESCRIPTION_TAG
from mmdiff_ray.tracking.store import tracking_uri, with_credentials
from mmdiff_ray.training.checkpoint import write_json

Say = Callable[[str], None]
FACTS, TEXT = runs.SWEEP, "sweep.yaml"
"""Files of a sweep: its MLflow run, and its YAML."""
FEW = 16
"""Rows on which `check_sweep` evaluates an untrained model, to learn which metrics exist."""
DRIVER_CPUS = 0.05
"""CPUs of a trial that only drives the workers of its own Ray Train run."""


def make_configs(sweep: Sweep) -> Make:
    """Return a function from a point of the space to a configuration resolved against the data."""
    manifests = read_sources(sweep.config({}))
    return lambda values: resolve_modalities(sweep.config(values), manifests)


def check_sweep(sweep: Sweep) -> tuple[SpaceCheck, Job]:
    """Check a sweep before it starts; return the result and the job of a point in the space.

    Checks the corners of the space, dimensions without effect, the data, and that the evaluators produce the
    metrics, by evaluating an untrained model on a few rows. Raises ConfigError for what would fail later.
    """
    workers = sweep.config({}).workers
    if workers.labels and workers.count < 2:
        raise ConfigError(
            "workers.labels: Ray Tune places one-worker trials on any node; remove it or set workers.count=2"
        )
    batch = sweep.config({}).train.global_batch
    if sweep.period < batch:
        raise ConfigError(
            f"budget.reports ({sweep.budget.reports}): {sweep.budget.samples} samples are "
            f"{-(-sweep.budget.samples // batch)} steps of {batch} rows (train.global_batch), fewer than "
            "reports; lower budget.reports or raise budget.samples"
        )
    make = make_configs(sweep)
    seen = check_space(sweep.space, make)
    if sweep.baseline:
        with named("baseline"):
            check_point(make({}), sizes_network(sweep.space))
    if seen.inert:
        raise ConfigError("; ".join(seen.inert))
    assert seen.good is not None
    config = sweep.config(seen.good)
    job = jobs.prepare(config, Path("unused"))
    few = configuration.load(
        (),
        [f"evaluate.rows={FEW}", "evaluate.steps=1", "evaluate.grid_rows=2"],
        configuration.to_plain(job.config),
    )
    splits = [manifest.splits[few.evaluate.split] for manifest in job.manifests]
    batches = list(split_batches(job.reader(job.denoiser()), splits, FEW, FEW))
    findings = evaluate(Generator(few, job.denoiser()), batches, job.columns)
    found = {key.removeprefix("eval/"): value for key, value in metrics_of(findings.figures).items()}
    score(sweep, found)
    return seen, job


def sweeps_in(where: str) -> str:
    """Return the address of the sweeps below `where`, a folder or storage of runs."""
    return join(where if is_uri(where) else str(Path(where).absolute()), "sweeps")


def sweep_folder(name: str, where: str = "runs") -> Path:
    """Return a sweep's folder on this machine; errors as in `find_run`."""
    return find_run(name, join(where, "sweeps"), FACTS, (FACTS, TEXT))


def read_facts(folder: Path) -> dict[str, Any]:
    """Read a sweep's `sweep.json`: tracking URI, run id, start time."""
    return json.loads((folder / FACTS).read_text(encoding="utf8"))


def write_text(folder: Path, text: str) -> None:
    """Write a sweep's YAML to its folder. Raises RunError if the upload fails."""
    (folder / TEXT).write_text(text, encoding="utf8")
    _upload(folder, TEXT)


def _upload(folder: Path, *names: str) -> None:
    mirror = runs.mirror_of(folder)
    if mirror is not None:
        mirror.send(*names)
        if left := mirror.flush():
            raise RunError(runs.not_sent(mirror.uri, folder, left))


def begin_sweep(sweep: Sweep, seen: SpaceCheck, text: str, command: str, where: str) -> Path:
    """Create the folder and the MLflow run of a new sweep; return the folder.

    seen: the result of `check_sweep`. text: the sweep's YAML with overrides applied. command: the user's
    command line. where: folder or storage of all runs.
    """
    first = sweep.config(seen.good or {})
    uri = tracking_uri(first.tracking.uri, where if is_uri(where) else Path(where).absolute())
    place = sweeps_in(where)
    taken = set(runs.names_in(place))
    numbers = range(1, 10_000)
    names = (sweep.name if number == 1 else f"{sweep.name}-{number}" for number in numbers)
    name = next(name for name in names if name not in taken)
    address = join(place, name)
    folder = cached(address)
    if is_uri(address):
        runs.claim(address)
        runs.make_cache(address)
    else:
        folder.mkdir(parents=True)
    settings = {
        **{
            f"space.{key}": f"{one}{f' when {one.when}' * bool(one.when)}" for key, one in sweep.space.items()
        },
        **{f"metrics.{metric}": way for metric, way in sweep.metrics.items()},
        **{f"{part}.{key}": value for part in OPTIONS for key, value in vars(getattr(sweep, part)).items()},
        "seed": sweep.seed,
    }
    try:
        run_id = run_life.start_run(
            uri,
            f"sweep-{sweep.name}",
            folder.name,
            folder / "tracking",
            settings,
            configuration.to_yaml(first),
            tags={
                "mmdiff.sweep": sweep.name,
                DESCRIPTION_TAG: sweep_description(sweep, address),
                "mmdiff.run_folder": address,
                "mmdiff.command": command,
                "mmdiff.machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
            },
            texts={"sweep.yaml": text},
        )
        write_text(folder, text)
        write_json(
            folder / FACTS, {"tracking_uri": without_passwords(uri), "run_id": run_id, "begun": time.time()}
        )
        _upload(folder, FACTS)
    except BaseException:
        runs.release(address)
        raise
    return folder


def run_sweep(sweep: Sweep, folder: Path, say: Say) -> str:
    """Run the remaining trials of a sweep; return "finished" or "stopped" (Ctrl-C, SIGTERM).

    Every trial's MLflow run is ended, however the trial or the sweep ends.
    """
    facts = read_facts(folder)
    with sweep_cluster(sweep), stop_requests() as stopped:
        where = runs.address(folder)
        if warning := split_records(facts["tracking_uri"], where):
            say(warning)
        state = _tune(sweep, where, facts, say, stopped)
    return state


def _tune(sweep: Sweep, where: str, facts: Mapping[str, Any], say: Say, stopped: Callable[[], bool]) -> str:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # our handler reports interrupted trials
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that diverges ends without a score
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    from ray import tune

    known = list(read_trials(where))
    deadline = None if sweep.budget.hours is None else facts["begun"] + 3600 * sweep.budget.hours
    make = make_configs(sweep)
    searcher = SpaceSearcher(sweep, make, known, deadline)
    watch = ProgressCallback(sweep, where, searcher, say, stopped)
    if not searcher.has_more:
        return "finished"
    first = sweep.config({})
    asks, at_once = resources_of(sweep, first)
    cache = start_cache()
    function = partial(
        run_trial,
        sweep=sweep,
        where=where,
        parent=facts["run_id"],
        store=with_credentials(facts["tracking_uri"]),
        working_folder=os.getcwd(),
        tables=SharedTables(cache),
    )
    pbt = sweep.scheduler.name == "pbt"
    if pbt:
        random.seed(sweep.seed + len(known))  # Ray's PBT draws from Python's global generator
    fs, root = filesystem(where)
    chosen: dict[str, Any] = {"num_samples": -1, "search_alg": searcher, "max_concurrent_trials": at_once}
    tuner = tune.Tuner(
        tune.with_resources(function, asks),
        param_space=_population(searcher) if pbt else None,
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            scheduler=make_scheduler(sweep, make, known),
            reuse_actors=not pbt,  # a member that copies another must start a new process
            **({} if pbt else chosen),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=f"{root}/ray",
            storage_filesystem=fs if is_uri(where) else None,
            stop=Deadline(deadline, stopped),
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=sweep.budget.retries),
            verbose=0,
        ),
    )
    try:
        with _quiet():
            tuner.fit()
    finally:
        watch.close()
        if is_uri(where):  # Tune's own state: sweeps resume from journals
            with suppress(OSError):
                fs.delete_dir(f"{root}/ray")
    say("data: " + describe(cache))
    return "stopped" if stopped() else "finished"


def _population(searcher: SpaceSearcher) -> dict[str, Any]:
    """Return the trials of a population as a Tune search space: Ray's PBT supports no searcher."""
    from ray import tune

    points: dict[int, dict[str, Any]] = {}
    while isinstance(point := searcher.suggest(f"member {len(points)}"), dict):
        points[point["number"]] = point["values"]
    return {
        "number": tune.grid_search(list(points)),
        "values": tune.sample_from(lambda spec: dict(points[spec.config.number])),  # type: ignore[attr-defined]
    }


def resources_of(sweep: Sweep, config: Config) -> tuple[dict[str, float], int]:
    """Return the resources of a trial in Ray Tune, and how many trials may run at once.

    A trial of one worker trains in the trial's own process. A trial of several workers reserves `DRIVER_CPUS`
    and starts a Ray Train run; no more such trials may start than fit at once, or they would deadlock. If not
    even one fits, waits for an autoscaler to start nodes. Raises ConfigError if one still does not fit, or if
    a population does not fit.
    """
    workers = config.workers
    nested = workers.count > 1
    count = max(1, workers.count)
    needs = {name: count * each for name, each in workers.per_worker.items()}
    needs["CPU"] = count * (workers.cpus + workers.data_workers * nested) + DRIVER_CPUS * nested
    check_resources(workers if nested else dataclasses.replace(workers, count=1, data_workers=0))
    room = _room(needs) if nested else places(workers.per_worker)
    if room < 1:
        amounts = ", ".join(amount_of(name, need) for name, need in needs.items())
        raise ConfigError(f"workers: a trial needs {amounts}; the cluster has less")
    if nested and sweep.scheduler.name == "pbt" and room < sweep.budget.trials:
        raise ConfigError(
            f"budget.trials ({sweep.budget.trials}): a population of trials with several workers must run at "
            f"once, and the cluster fits {room}; set budget.trials={room}"
        )
    asks = {"cpu": DRIVER_CPUS} if nested else {"cpu": workers.cpus, "gpu": workers.gpus, **workers.resources}
    wanted = sweep.budget.concurrent or room
    return asks, wanted if autoscales() and not nested else min(room, wanted)


def _room(needs: Mapping[str, float]) -> int:
    """Return how many trials with these needs fit on the live nodes."""
    import ray

    total = ray.cluster_resources()
    return min(int(total.get(name, 0) / need) for name, need in needs.items() if need)


def sweep_cluster(sweep: Sweep) -> AbstractContextManager[None]:
    """Provide a Ray cluster, as `cluster`; a local one fits at least one trial."""
    workers = sweep.config({}).workers
    count = max(1, workers.count)
    return cluster(max(2, int(count * (workers.cpus + workers.data_workers * (count > 1))) + 1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loggers and warnings of Ray Tune in the block."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
