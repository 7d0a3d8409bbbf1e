"""One training worker, in this process or under Ray Train: build the model, stream rows, fit, record."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mmdiff_ray import __version__
from mmdiff_ray import config as configuration
from mmdiff_ray.batch import Batch, share
from mmdiff_ray.config import ConfigError, OutageError, RunError
from mmdiff_ray.data.bad_rows import BadRows, Rows
from mmdiff_ray.data.batches import local_batches, split_batches
from mmdiff_ray.distributed.cluster import log_folder
from mmdiff_ray.evaluation.run import evaluate, periodic, sample_pictures
from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.runs.folder import not_sent
from mmdiff_ray.runs.job import Job
from mmdiff_ray.runs.records import store_unsent
from mmdiff_ray.sampling.export import save_export
from mmdiff_ray.sampling.generator import Generator
from mmdiff_ray.tracking.recorder import SystemMonitor
from mmdiff_ray.tracking.tracker import Tracker
from mmdiff_ray.training.checkpoint import CheckpointStore
from mmdiff_ray.training.fit import Curves, fit
from mmdiff_ray.training.parallel import choose_device, world
from mmdiff_ray.training.progress import Progress
from mmdiff_ray.training.remote_checkpoints import RemoteCheckpoints
from mmdiff_ray.training.trainer import Trainer, TrainingError

_log = logging.getLogger(__name__)

HAND_OVER_S = 10.0
"""How long a worker retries an MLflow that does not answer before it leaves its records to the driver."""

Emit = Callable[[dict[str, Any]], None]
"""Send an event to the driver; must not block."""


class WorkerHooks:
    """Report to the tracker and to the driver's display, from rank 0 only."""

    def __init__(self, job: Job, validation: list[Batch], emit: Emit, stopped: Callable[[], bool]) -> None:
        self.job = job
        self.validation = validation
        self.emit = emit
        self.stopped = stopped
        self.first = world()[0] == 0
        self.samples_seen = 0
        self.tracker: Tracker | None = None
        self.monitor: SystemMonitor | None = None
        if self.first and job.run_id:
            self.tracker = Tracker(job.tracking_uri, job.run_id, job.spool)
            if job.config.tracking.system_metrics:
                self.monitor = SystemMonitor(self.tracker, lambda: self.samples_seen)

    def resumed(self, progress: Progress) -> None:
        self.samples_seen = progress.samples_seen
        self._emit("started", progress, {})

    def report(self, progress: Progress, metrics: dict[str, float]) -> None:
        self.samples_seen = progress.samples_seen
        self._emit("progress", progress, metrics)
        if self.tracker is not None:
            self.tracker.metrics(metrics, progress.samples_seen)

    def evaluate(self, trainer: Trainer, pictures: bool) -> Curves:
        model = trainer.averaged() if self.validation else None
        if model is None:
            return {}
        generator, seen = Generator(trainer.config, model), trainer.progress.samples_seen
        try:
            if pictures:
                self._draw(generator, seen)
            found = evaluate(generator, self.validation, self.job.columns, only=periodic(trainer.config))
        except Exception:  # a failed evaluation must not end the run
            _log.exception("no pictures and figures at %d samples", seen)
            return {}
        return {f"val/{figure.key}": (figure.value, figure.better) for figure in found.figures}

    def _draw(self, model: Generator, seen: int) -> None:
        for name, picture in sample_pictures(model, self.validation).items():
            png = to_png(picture)
            path = self.job.folder / "pictures" / f"{name}-{seen:09d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
            if self.job.mirror is not None:
                self.job.mirror.send(f"pictures/{path.name}")
            if self.tracker is not None:
                self.tracker.image(f"samples/{name}", png, seen)

    def should_stop(self, progress: Progress) -> bool:
        pause = self.job.pause_at
        return self.first and (self.stopped() or (pause is not None and progress.samples_seen >= pause))

    def close(self, bad_rows: int = 0) -> None:
        if self.monitor is not None:
            self.monitor.stop()
        if self.tracker is not None:
            if bad_rows:
                self.tracker.tags({"mmdiff.bad_rows": bad_rows})
            self._close_tracker(self.tracker)

    def _close_tracker(self, tracker: Tracker) -> None:
        """Send the remaining records. What MLflow does not accept goes to the driver, which retries longer:
        through the run's folder or, if the driver may not see it, through object storage."""
        if not self.job.uri:
            tracker.close(timeout_s=5)
        elif tracker.finish(HAND_OVER_S, self._note) and (
            unsent := store_unsent(self.job.folder, self.job.mirror)
        ):
            self._note(not_sent(self.job.uri, self.job.folder, unsent))

    def _note(self, text: str) -> None:
        self.emit({"kind": "note", "text": text})

    def _emit(self, kind: str, progress: Progress, metrics: dict[str, float]) -> None:
        if self.first:
            now = vars(progress).copy()
            self.emit({"kind": kind, "progress": now, "metrics": metrics, "workers": world()[1]})


Stream = Callable[[Job, Any, int, int, int, BadRows], Iterator[Batch]]
"""(job, reader, rank, world size, finished global batches, unreadable rows) -> this rank's batches."""


def train_worker(
    job: Job,
    stream: Stream,
    emit: Emit,
    stopped: Callable[[], bool],
    share_bad_rows: Callable[[Rows], Rows] | None = None,
) -> str:
    """Train as one of `world()` workers and return "finished" or "stopped". Rank 0 writes the export.

    share_bad_rows: adds this worker's unreadable rows to those of the run and returns all of them. The
    default writes them to the run's folder and supports one worker only.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is intended
    rank, count = world()
    config = job.config
    if config.workers.threads or count > 1:
        torch.set_num_threads(config.workers.threads or max(1, int(config.workers.cpus)))
    device = choose_device(config.train)
    denoiser, store = job.denoiser(), _store(job, emit)
    if store.latest() is None:
        job.initialize(denoiser)
    reader = job.reader(job.denoiser())  # a second, CPU copy: data workers have no GPU
    trainer = Trainer(config, denoiser, device)
    bad_rows = BadRows(config.data.bad_row_limit, share_bad_rows or job.add_bad_rows)
    validation = _validation(job, reader, bad_rows)
    hooks = WorkerHooks(job, validation, emit, stopped)
    facts = {"config": configuration.to_plain(config), "version": __version__, "torch": torch.__version__}
    try:
        ended = fit(
            trainer,
            store,
            lambda start: stream(job, reader, rank, count, start, bad_rows),
            lambda: share(validation, rank, count),
            hooks,
            facts,
        )
        model = trainer.averaged()
        if model is not None:
            known = {"progress": vars(trainer.progress), "version": __version__, "state": ended}
            known |= {"lineage": job.lineage} if job.lineage else {}
            save_export(job.export, trainer.config, model, known)
            _upload_export(job, store.unsent, emit)
        bad_rows.ask()
        return ended
    finally:
        hooks.close(len(bad_rows.of_run))


def _store(job: Job, emit: Emit) -> CheckpointStore:
    """Open the run's checkpoints. Emits an event for each complete one and, on rank 0, upload warnings."""

    def completed() -> None:
        emit({"kind": "saved"})

    if job.mirror is None:
        return CheckpointStore(job.checkpoints, job.config.checkpoint, run=job.lineage, completed=completed)
    if world()[0] == 0:
        job.mirror.uploads.warn = lambda text: emit({"kind": "note", "text": text})
    keep = job.config.checkpoint.keep_last
    run = job.lineage or job.run_id
    remote = RemoteCheckpoints(job.mirror, run, keep, completed=completed, stored_only=job.stored_only)
    return CheckpointStore(job.checkpoints, job.config.checkpoint, remote=remote)


def _upload_export(job: Job, unsent: list[str], emit: Emit) -> None:
    """Upload the export to object storage; emit a note for each file that is not there."""
    if job.mirror is not None:
        if unsent:
            emit({"kind": "note", "text": not_sent(job.uri, job.folder, unsent, "resuming the run")})
        job.mirror.send(job.export.name)
        if left := job.mirror.flush():
            emit({"kind": "note", "text": not_sent(job.uri, job.folder, left)})


def _validation(job: Job, reader: Any, bad_rows: BadRows) -> list[Batch]:
    """Load the held-out rows for validation losses and pictures; few enough to keep in memory."""
    splits = [manifest.splits[job.config.evaluate.split] for manifest in job.manifests]
    if not any(split.rows for split in splits):
        return []
    rows = job.config.evaluate.rows
    return list(split_batches(reader, splits, rows, min(32, rows), bad_rows=bad_rows))


def local_stream(
    job: Job, reader: Any, rank: int, world: int, start: int, bad_rows: BadRows
) -> Iterator[Batch]:
    """Stream rows that threads of this process read."""
    threads = max(1, job.config.workers.data_workers)
    return local_batches(job.plan(), reader, rank, world, start, threads=threads, bad_rows=bad_rows)


def ray_stream(
    job: Job, reader: Any, rank: int, world: int, start: int, bad_rows: BadRows
) -> Iterator[Batch]:
    """Stream rows that Ray Data's workers read."""
    from mmdiff_ray.distributed.stream import stream_batches

    stop = -(-job.config.train.samples // job.config.train.global_batch)
    workers = job.config.workers
    return stream_batches(
        job.plan(),
        reader,
        rank,
        world,
        start,
        stop,
        workers.data_workers,
        workers.least is not None,
        workers.data_labels,
        bad_rows,
    )


def enter_folder(folder: str) -> None:
    """Change to the driver's working folder, if this machine has it, so that relative paths mean the same."""
    with contextlib.suppress(FileNotFoundError):
        os.chdir(folder)


def ray_train_loop(settings: dict[str, Any]) -> None:
    """Run one worker of Ray Train. settings: job, board actor, working folder of the driver."""
    import ray

    job, board = settings["job"].here(), settings["board"]
    if ray.get(board.failure.remote()) is not None:
        return  # a worker failed for a reason that restarting cannot fix
    logging.basicConfig(level=logging.WARNING)
    enter_folder(settings["working_folder"])
    pending: list[Any] = []

    def stopped() -> bool:
        """Return the reply to the previous request and send the next, so that a step need not wait."""
        answer = bool(ray.get(pending.pop())) if pending else False
        pending.append(board.stop_requested.remote())
        return answer

    board.post.remote({"kind": "worker", "rank": world()[0], "pid": os.getpid(), "logs": log_folder()})

    def share_bad_rows(rows: Rows) -> Rows:
        return ray.get(board.bad_rows.remote(rows))

    try:
        ended = train_worker(job, ray_stream, lambda event: board.post.remote(event), stopped, share_bad_rows)
    except OutageError as error:  # storage may be back after a restart
        ray.get(board.post.remote({"kind": "note", "text": str(error)}))
        raise
    except (ConfigError, RunError) as error:
        ray.get(board.fail.remote(error))
        if isinstance(error, TrainingError):
            return  # all workers raise it and end; for any other error Ray must end the others
        raise
    if world()[0] == 0:
        ray.get(board.post.remote({"kind": "ended", "state": ended}))
