"""Run training from the driver: start the MLflow run and the workers, show progress, end the run."""

import dataclasses
import os
import queue
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError, OutageError, RunError, without_passwords
from mmdiff_ray.distributed.board import Board
from mmdiff_ray.distributed.cluster import log_folder, resources, split_records, this_node
from mmdiff_ray.distributed.display import Display
from mmdiff_ray.distributed.worker import local_stream, ray_train_loop, train_worker
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs import records
from mmdiff_ray.runs.describe import description
from mmdiff_ray.runs.job import Job
from mmdiff_ray.storage.filesystem import is_uri, join
from mmdiff_ray.tracking import run_life
from mmdiff_ray.tracking.recorder import DESCRIPTION_TAG, DatasetFacts
from mmdiff_ray.tracking.store import tracking_uri

POLL_S = 0.3
BOARD_RESTARTS = 3
"""Restarts of the board actor. A restart loses only unread events and stop requests."""
ENDING_S = 60.0
"""Time for the workers to end after the board actor is gone."""
GROW_S = 30.0
"""How often a run with `workers.least` tries to add workers."""

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""How a run ended -> MLflow's status."""


def train(job: Job, display: Display) -> Path:
    """Train a new run and return its folder. Raises ConfigError before anything starts."""
    with resources(job.config.workers):
        job = begin(job, job.config.tracking.required)
        if run_life.is_local(job.run_id):
            store = without_passwords(job.tracking_uri)
            display.say(f"MLflow at {store} does not answer; records are kept in {job.spool}")
        if job.config.workers.count and (warning := split_records(job.tracking_uri, job.config.runs)):
            display.say(warning)
        with runs.lock_run(job.folder, display.say):
            return run(job, display)


def resume(job: Job, display: Display, new_mlflow_run: bool = False) -> Path:
    """Resume a run from its last checkpoint, in the same MLflow run or in a new one.

    Raises ConfigError if another process trains it or its MLflow run was deleted.
    """
    with runs.lock_run(job.folder, display.say), resources(job.config.workers):
        if not new_mlflow_run:  # after taking the lock: its owner may write to the store
            otherwise = "record it in a new MLflow run: --new-mlflow-run"
            run_life.check_run(job.tracking_uri, job.run_id, otherwise)
        records.fetch_unsent(job.folder, job.mirror)
        if new_mlflow_run:
            lineage = job.lineage or (job.run_id if job.uri else "")  # its checkpoints carry the old id
            run_id = _start_run(job, job.tracking_uri, required=False)
            job = dataclasses.replace(job, run_id=run_id, lineage=lineage)
        else:
            run_life.resume_run(job.tracking_uri, job.run_id, job.spool)
        jobs.write_run(job, state="running")
        return run(job, display)


def check_tracking(job: Job) -> None:
    """Raise ConfigError if a new run requires MLflow and MLflow does not answer."""
    if job.config.tracking.required:
        run_life.check_store(tracking_uri(job.config.tracking.uri, job.config.runs))


def begin(job: Job, required: bool, tags: Mapping[str, Any] | None = None) -> Job:
    """Create the folder and the MLflow run of a job. If the MLflow run fails, the folder is removed.

    required: raise ConfigError if MLflow does not answer; else record locally until it does.
    """
    uri = tracking_uri(job.config.tracking.uri, job.config.runs)
    job = _with_folder(job)
    try:
        run_id = _start_run(job, uri, required, tags)
    except BaseException:
        runs.release(job.uri or str(job.folder))
        raise
    job = dataclasses.replace(job, tracking_uri=uri, run_id=run_id)
    jobs.write_run(job, state="running")
    return job


def _start_run(job: Job, uri: str, required: bool, tags: Mapping[str, Any] | None = None) -> str:
    """Start the MLflow run of a job and return its id. required: as in `begin`."""
    address = job.uri or str(job.folder)
    known = {"mmdiff.run_folder": address, DESCRIPTION_TAG: description(job.config, address)}
    return run_life.start_run(
        uri,
        job.config.tracking.experiment,
        job.folder.name,
        job.spool,
        configuration.flatten(job.config),
        configuration.to_yaml(job.config),
        datasets=_dataset_facts(job),
        tags={**known, **jobs.init_tags(job), **(tags or {})},
        required=required,
    )


def _with_folder(job: Job) -> Job:
    """Create the folder of a job. If `runs` is object storage, reserve its name there."""
    if is_uri(job.config.runs):
        uri = join(job.config.runs, job.folder.name)
        runs.claim(uri)
        return dataclasses.replace(job, uri=uri).here()
    try:
        job.folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"runs: cannot create {job.folder}: {error.strerror}") from None
    return job


def run(job: Job, display: Display) -> Path:
    """Run a prepared job, in this process or on Ray, and always end its MLflow run."""
    state = "failed"
    try:
        with display:
            state = work(job, display)
        return job.folder
    except OutageError as error:
        raise RunError(f"{error}; {_resume_hint(job)}") from None
    except (KeyboardInterrupt, SystemExit):  # SystemExit: SIGTERM while Ray's handler is active
        state = "stopped"
        raise
    finally:
        jobs.write_run(job, state=state)
        records.fetch_unsent(job.folder, job.mirror)
        left = run_life.end_run(job.tracking_uri, job.run_id, STATUS[state], job.spool, say=display.say)
        if left:
            records.store_unsent(job.folder, job.mirror)
            display.say(records.advice(job.folder, left))
        unsent = job.mirror.flush() if job.mirror is not None else []
        if unsent and state != "finished":  # after a finished run the caller uploads again and warns
            display.say(runs.not_sent(job.uri, job.folder, unsent))


def work(job: Job, display: Display) -> str:
    """Train a job whose MLflow run has started; return "finished" or "stopped"."""
    return _run_local(job, display) if job.config.workers.count == 0 else _run_on_ray(job, display)


def _run_local(job: Job, display: Display) -> str:
    def emit(event: dict[str, Any]) -> None:
        _show(event, job, display)

    with stop_requests() as stopped:
        return train_worker(job, local_stream, emit, stopped)


def _run_on_ray(job: Job, display: Display) -> str:
    import ray

    display.say(f"Ray's own log files: {log_folder()}")
    lasting: Any = {"max_restarts": BOARD_RESTARTS, "max_task_retries": BOARD_RESTARTS}
    board: Any = ray.remote(num_cpus=0, label_selector=this_node(), **lasting)(Board).remote(job.bad_rows)
    done: queue.Queue = queue.Queue()
    with stop_requests() as stopped:
        thread = threading.Thread(target=_fit, args=(job, board, done), daemon=True)
        thread.start()
        try:
            ended = _listen(job, board, thread, stopped, display)
        except ray.exceptions.RayError as error:  # the board's node ran out of memory or is gone
            thread.join(ENDING_S)  # the workers lose the board too, and end
            what = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise RunError(f"the run lost its cluster: {what}; {_resume_hint(job)}") from None
    raised = done.get()
    failure = ray.get(board.failure.remote()) or raised
    if failure is not None:
        raise failure
    return ended


def _resume_hint(job: Job) -> str:
    return f"resume with: mmdiff train --resume {runs.address(job.folder)}"


def _fit(job: Job, board: Any, done: queue.Queue) -> None:
    """Run Ray Train; called in a thread, so that the driver can show events and request a stop."""
    try:
        make_trainer(job, board).fit()
        done.put(None)
    except BaseException as error:
        done.put(error)


def make_trainer(job: Job, board: Any) -> Any:
    """Build Ray Train's trainer of a job.

    It restarts the workers after failures. With `workers.least`, it runs as many workers as the cluster fits.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from mmdiff_ray.distributed.failures import FailureLimit

    workers = job.config.workers
    asks = workers.per_worker
    size: dict[str, Any] = {"num_workers": workers.count}
    if workers.least is not None:
        # Ray computes how many workers fit from this dict, so it must include the data workers' CPUs.
        asks["CPU"] = workers.cpus + workers.data_workers
        size = {"num_workers": (workers.least, workers.count), "elastic_resize_monitor_interval_s": GROW_S}
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    return TorchTrainer(
        ray_train_loop,
        train_loop_config={"job": job, "board": board, "working_folder": os.getcwd()},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if workers.gpus else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            use_gpu=workers.gpus > 0,
            resources_per_worker=asks,
            label_selector=workers.labels or None,
            **size,
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(job.folder / "ray" if not job.uri else _session_folder(job)),
            failure_config=FailureConfig(max_failures=-1),  # FailureLimit counts instead
            callbacks=[FailureLimit(board, workers.max_failures)],  # type: ignore[list-item]
        ),
    )


def _session_folder(job: Job) -> Path:
    """Return a folder for Ray Train's state, in Ray's session folder: its path is equal on all machines."""
    return Path(log_folder()).parent / "mmdiff" / f"{job.folder.name}-{secrets.token_hex(4)}"


def _listen(
    job: Job, board: Any, thread: threading.Thread, stopped: Callable[[], bool], display: Display
) -> str:
    """Show events until the training thread ends; return how the run ended."""
    import ray

    ended, announced = "finished", False
    while True:
        alive = thread.is_alive()
        for event in ray.get(board.take.remote()):
            if event["kind"] == "ended":
                ended = event["state"]
            _show(event, job, display)
        if stopped():
            board.request_stop.remote()  # repeated: a restarted board has lost the request
            if not announced:
                announced = True
                display.say("stopping: the workers save a checkpoint and end")
        if not alive:
            return ended
        thread.join(POLL_S)


def _show(event: dict[str, Any], job: Job, display: Display) -> None:
    if event["kind"] == "started":
        seen = event["progress"]["samples_seen"]
        count = event["workers"] if job.config.workers.count else 0
        where = f"{count} worker{'s' if count != 1 else ''}" if count else "this process"
        display.say(f"training on {where}" + (f", from the checkpoint at {seen:,} samples" if seen else ""))
    elif event["kind"] == "progress":
        display.show(event)
    elif event["kind"] == "note":
        display.say(event["text"])
    elif event["kind"] == "bad_rows":
        count = len(job.add_bad_rows(event["rows"]))
        display.say(f"{count} rows could not be read (data.bad_row_limit {job.config.data.bad_row_limit})")


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM in the block into a stop request; a second one interrupts."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    def handle(number: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _dataset_facts(job: Job) -> list[DatasetFacts]:
    return [
        DatasetFacts(
            name=manifest.name,
            uri=source.uri,
            digest=manifest.digest,
            rows={split: facts.rows for split, facts in manifest.splits.items()},
        )
        for manifest, source in zip(job.manifests, job.config.data.sources, strict=True)
    ]
