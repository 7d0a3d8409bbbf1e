"""The training loop of one worker: resume, train, report, evaluate, save, end."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config, next_change
from mmdiff_ray.training.checkpoint import CheckpointStore, restore
from mmdiff_ray.training.parallel import same_everywhere, world
from mmdiff_ray.training.progress import Progress
from mmdiff_ray.training.trainer import Trainer, TrainingError

Curves = Mapping[str, tuple[float, str]]
"""Metric -> its value, and which values are better: "higher" or "lower"."""
HELD_OUT_LOSS = "loss/total"


class Hooks(Protocol):
    """Callbacks of `fit`. All are called on every worker."""

    def resumed(self, progress: Progress) -> None:
        """Receive the progress at which training starts or resumes."""

    def report(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Receive the metrics since the last report."""

    def evaluate(self, trainer: Trainer, pictures: bool) -> Curves:
        """Evaluate the averaged model; return its figures, on the first worker alone. pictures: draw samples
        for people, too."""

    def should_stop(self, progress: Progress) -> bool:
        """Return whether to stop early. Only the first worker's result counts."""


def fit(
    trainer: Trainer,
    store: CheckpointStore,
    batches: Callable[[int], Iterator[Batch]],
    validation: Callable[[], Iterable[Batch]],
    hooks: Hooks,
    facts: dict[str, Any],
) -> str:
    """Train to the end or until a hook stops the run; return "finished" or "stopped".

    batches: finished global batches -> this worker's rows of the following ones; validation: this worker's
    share of held-out rows. A checkpoint is complete when this returns. Raises TrainingError on all workers.
    """
    latest = store.latest()
    if latest is not None:
        restore(trainer, latest)
    hooks.resumed(trainer.progress)
    # After the final checkpoint nothing is left to train, even if a worker was lost since.
    stopped = latest is not None and _should_stop(hooks, trainer.progress)
    stream = batches(trainer.progress.steps)
    try:
        while not (trainer.progress.done or stopped):
            stopped = _advance(trainer, store, stream, validation, hooks, facts)
    except Exception as error:
        # All workers raise a TrainingError; after an error of one worker, a collective close would hang.
        if isinstance(error, TrainingError) or world()[1] == 1:
            store.close()
        raise
    store.close()
    return "stopped" if stopped else "finished"


def _advance(
    trainer: Trainer,
    store: CheckpointStore,
    stream: Iterator[Batch],
    validation: Callable[[], Iterable[Batch]],
    hooks: Hooks,
    facts: dict[str, Any],
) -> bool:
    """Train to the next due report, evaluation or checkpoint, and do it. Return whether to stop early."""
    config, progress, before = trainer.config, trainer.progress, trainer.progress.samples_seen
    best = config.evaluate.best or HELD_OUT_LOSS
    metrics = trainer.advance(stream, _next(before, trainer.whole))
    store.poll()
    stop = _should_stop(hooks, progress)
    save = progress.done or stop or crossed(before, progress.samples_seen, config.checkpoint.every_samples)
    look = crossed(before, progress.samples_seen, config.evaluate.every_samples) and not progress.done
    if save or look:
        metrics.update(trainer.validate(validation()))
    curves: dict[str, tuple[float, str]] = {name: (value, "lower") for name, value in metrics.items()}
    chooses = save and config.evaluate.best is not None and f"val/{best}" not in curves
    found = hooks.evaluate(trainer, look) if look or chooses else {}
    curves.update(found)
    hooks.report(progress, {name: value for name, (value, _) in curves.items()})
    if save:
        score = _score(curves, best, config.evaluate.best is not None)
        store.save(trainer, facts, score)
        known = ", ".join(sorted(name.removeprefix("val/") for name in curves if name.startswith("val/")))
        lacks = config.evaluate.best is not None and score is None
        if lacks and same_everywhere(float(bool(found) or not known)):  # else the evaluation failed
            raise TrainingError(
                f"evaluate.best: unknown curve {best!r}; known: {known or 'none, no held-out rows'}"
            )
    return stop


def _score(curves: Curves, best: str, needed: bool) -> float | None:
    """Return the value by which the best checkpoint is chosen, the lower the better; None if there is none.

    needed: whether it is `evaluate.best`, whose value is the first worker's.
    """
    value, better = curves.get(f"val/{best}", (None, ""))
    if not needed:
        return value
    if not same_everywhere(float(value is not None)):
        return None
    return same_everywhere((-value if better == "higher" else value) if value is not None else 0.0)


def _should_stop(hooks: Hooks, progress: Progress) -> bool:
    return bool(same_everywhere(float(hooks.should_stop(progress)))) and not progress.done


def crossed(before: int, now: int, every: int) -> bool:
    """Return whether a multiple of `every` is in (before, now]; always False for every = 0."""
    return every > 0 and before // every != now // every


def _next(samples_seen: int, config: Config) -> int:
    """Return the next samples_seen at which a report, evaluation, checkpoint or change is due."""
    periods = [config.train.log_every_samples, config.checkpoint.every_samples, config.evaluate.every_samples]
    change = next_change(config, samples_seen)
    due = [(samples_seen // period + 1) * period for period in periods if period > 0]
    return min(due if change is None else [*due, change])


def calibrate(trainer_modalities: Any, batches: Iterable[Batch]) -> None:
    """Set the scale of every modality's code from training rows, so that it has unit RMS per channel."""
    parts = list(batches)
    for name, modality in trainer_modalities.items():
        rows = [part.data[name][part.present[name] & part.real] for part in parts]
        data = torch.cat(rows)
        if len(data):
            modality.calibrate(data)
