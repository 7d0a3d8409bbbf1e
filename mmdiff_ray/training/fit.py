"""The life of a training run on one worker: go on from the last checkpoint, report, evaluate, save, end."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config
from mmdiff_ray.training.checkpoint import CheckpointStore, restore
from mmdiff_ray.training.parallel import same_everywhere, world
from mmdiff_ray.training.trainer import Progress, Trainer


class Hooks(Protocol):
    """What a run tells the outside. All are called on every worker."""

    def resumed(self, progress: Progress) -> None:
        """Be told where the run goes on from."""

    def report(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Take the metrics of the samples since the last report."""

    def evaluate(self, trainer: Trainer) -> None:
        """Look at the model in between (samples for people)."""

    def should_stop(self) -> bool:
        """Return whether somebody asked for the run to end early; the first worker's answer counts."""


def fit(
    trainer: Trainer,
    store: CheckpointStore,
    batches: Callable[[int], Iterator[Batch]],
    validation: Callable[[], Iterable[Batch]],
    hooks: Hooks,
    facts: dict[str, Any],
) -> str:
    """Train to the end, or until asked to stop, and return "finished" or "stopped".

    batches: finished global batches -> this worker's rows of the following ones; validation: this worker's share of
    held-out rows. A checkpoint is complete when this returns.
    """
    config, progress = trainer.config, trainer.progress
    latest = store.latest()
    if latest is not None:
        restore(trainer, latest)
        progress = trainer.progress
    hooks.resumed(progress)
    stream = batches(progress.steps)
    while not progress.done:
        before = progress.samples_seen
        metrics = trainer.advance(stream, _next(before, config))
        store.poll()
        stop = bool(same_everywhere(float(hooks.should_stop())))
        save = (
            progress.done or stop or crossed(before, progress.samples_seen, config.checkpoint.every_samples)
        )
        loss = None
        if save:
            validated = trainer.validate(validation())
            metrics.update(validated)
            loss = validated.get("val/loss/total")
        hooks.report(progress, metrics)
        if crossed(before, progress.samples_seen, config.evaluate.every_samples) and not progress.done:
            hooks.evaluate(trainer)
        if save:
            store.save(trainer, facts, loss)
        if stop and not progress.done:
            store.wait()
            return "stopped"
    store.wait()
    return "finished"


def crossed(before: int, now: int, every: int) -> bool:
    """Return whether a multiple of `every` lies in (before, now]; 0 never does."""
    return every > 0 and before // every != now // every


def _next(samples_seen: int, config: Config) -> int:
    """Return the next samples_seen at which something is due."""
    periods = [config.train.log_every_samples, config.checkpoint.every_samples, config.evaluate.every_samples]
    return min((samples_seen // period + 1) * period for period in periods if period > 0)


def calibrate(trainer_modalities: Any, batches: Iterable[Batch]) -> None:
    """Fix the scale of every modality's code from real rows, so that it has unit RMS per channel."""
    parts = list(batches)
    for name, modality in trainer_modalities.items():
        rows = [part.data[name][part.present[name] & part.real] for part in parts]
        data = torch.cat(rows)
        if len(data):
            modality.calibrate(data)


def first_worker() -> bool:
    """Return whether this is the worker that speaks for all."""
    return world()[0] == 0
