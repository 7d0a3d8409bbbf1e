"""Run chunks of work through steps in order: as a Ray Data program, or one after another in this process."""

import logging
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mmdiff_ray.config import ConfigError
from mmdiff_ray.distributed.cluster import cluster

Step = Callable[[Any], Any]
"""A function from a chunk to a chunk; what travels must be picklable."""

MOST_BLOCKS = 1000


def run(
    first: Step, stages: Sequence[Step], chunks: Sequence[Any], workers: int
) -> Generator[Any, None, None]:
    """Yield what each chunk becomes, in order.

    first: a cheap step, many tasks at a time. stages: steps that hold a model; each gets `workers` Ray actors
    of its own. workers = 0 runs everything in this process, without Ray.
    """
    if workers > 0 and chunks:
        with caught_noise(), cluster(), ordered_and_silent(), plain_errors():
            yield from _run_on_ray(first, stages, chunks, workers)
        return
    for chunk in chunks:
        made = first(chunk)
        for stage in stages:
            made = stage(made)
        yield made


class StageActor:
    """A Ray actor that holds one stage, and so one model."""

    def __init__(self, stage: Step) -> None:
        self.stage = stage

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"chunk": [_apply(self.stage, chunk) for chunk in batch["chunk"]]}


def _run_on_ray(first: Step, stages: Sequence[Step], chunks: Sequence[Any], workers: int) -> Iterator[Any]:
    """Yield the chunks of a Ray Data program. A chunk travels as one pickled value, whatever it holds."""
    import ray

    packed = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    dataset: Any = ray.data.from_items(packed, override_num_blocks=min(len(packed), MOST_BLOCKS))
    dataset = dataset.map(lambda row: {"chunk": _apply(first, row["chunk"])}, num_cpus=1)
    share = actor_share(ray.cluster_resources(), workers * len(stages))
    for stage in stages:
        dataset = dataset.map_batches(
            StageActor, fn_constructor_args=(stage,), batch_size=1, concurrency=workers, **share
        )
    for row in dataset.iter_rows():
        yield pickle.loads(row["chunk"])


def _apply(step: Step, packed: bytes) -> bytes:
    return pickle.dumps(step(pickle.loads(packed)))


def actor_share(resources: Mapping[str, float], actors: int) -> dict[str, Any]:
    """Return what each of so many actors asks a cluster for: a share of its GPUs, or of its CPUs without any.

    One CPU stays free for the tasks that feed the actors.
    """
    gpus = resources.get("GPU", 0)
    if gpus:
        return {"num_cpus": 0.1, "num_gpus": _share(gpus, actors)}
    return {"num_cpus": _share(resources.get("CPU", 1) - 1, actors)}


def _share(total: float, actors: int) -> float:
    return max(0.01, min(1.0, int(100 * total / max(1, actors)) / 100))


@contextmanager
def ordered_and_silent() -> Iterator[None]:
    """Make Ray Data keep the order of its rows, and draw no progress bars of its own, for the block."""
    from ray.data import DataContext

    logger, context = logging.getLogger("ray.data"), DataContext.get_current()
    kept = logger.level, context.enable_progress_bars, context.execution_options.preserve_order
    logger.setLevel(logging.ERROR)
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    try:
        yield
    finally:
        logger.setLevel(kept[0])
        context.enable_progress_bars, context.execution_options.preserve_order = kept[1:]


@contextmanager
def caught_noise() -> Iterator[None]:
    """Keep what is written to standard error, also by C++ code, off the terminal unless the block fails.

    Ray writes lines there that tell a user nothing. An error of the user's own making needs none of them.
    """
    with open(os.dup(2), "wb", buffering=0) as terminal, tempfile.TemporaryFile() as noise:
        sys.stderr.flush()
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except Exception as error:
            if not isinstance(error, ConfigError):
                noise.seek(0)
                terminal.write(noise.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal.fileno(), 2)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise a ConfigError of a task or actor as itself, without Ray's wrapping."""
    try:
        yield
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None and type(inner) is not ConfigError:
            inner = getattr(inner, "cause", None) or inner.__cause__
        if inner is None or inner is error:
            raise
        raise inner from None
