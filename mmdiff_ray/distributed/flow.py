"""Run chunks of work through steps in order: as a Ray Data program, or one after another in this process."""

import logging
import math
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mmdiff_ray.config import ConfigError
from mmdiff_ray.distributed.cluster import amount_of, check_labels, cluster
from mmdiff_ray.distributed.nodes import fitting, start_nodes

Step = Callable[[Any], Any]
"""A function from a chunk to a chunk; what travels must be picklable."""

MOST_BLOCKS = 1000


def run(
    first: Step | None,
    stages: Sequence[Step],
    chunks: Sequence[Any],
    workers: int,
    labels: Mapping[str, str] | None = None,
) -> Generator[Any, None, None]:
    """Yield what each chunk becomes, in order.

    first: a cheap step, many tasks at a time, if any. stages: steps that hold a model; each gets `workers`
    Ray actors of its own. workers = 0 runs everything in this process, without Ray. labels: of the nodes that
    all of it runs on. Raises ConfigError where there are none.
    """
    if workers > 0 and chunks:
        with caught_noise(), cluster(), ordered_and_silent(labels):
            check_labels(labels or {})
            yield from _run_on_ray(first, stages, chunks, workers, labels or {})
        return
    for chunk in chunks:
        made = chunk if first is None else first(chunk)
        for stage in stages:
            made = stage(made)
        yield made


class StageActor:
    """A Ray actor that holds one stage, and so one model."""

    def __init__(self, stage: Step) -> None:
        self.stage = stage

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"chunk": [_apply(self.stage, chunk) for chunk in batch["chunk"]]}


def _run_on_ray(
    first: Step | None,
    stages: Sequence[Step],
    chunks: Sequence[Any],
    workers: int,
    labels: Mapping[str, str],
) -> Iterator[Any]:
    """Yield the chunks of a Ray Data program. A chunk travels as one pickled value, whatever it holds."""
    import ray

    packed = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    dataset: Any = ray.data.from_items(packed, override_num_blocks=min(len(packed), MOST_BLOCKS))
    task, actor = _shares(workers * len(stages), labels)
    if first is not None:
        dataset = dataset.map(lambda row: {"chunk": _apply(first, row["chunk"])}, **task)
    for stage in stages:
        dataset = dataset.map_batches(
            StageActor, fn_constructor_args=(stage,), batch_size=1, concurrency=workers, **actor
        )
    for row in dataset.iter_rows():
        chunk = pickle.loads(row["chunk"])
        if isinstance(chunk, ConfigError):
            raise chunk
        yield chunk


def _apply(step: Step, packed: bytes) -> bytes:
    """Return the packed chunk after a step. A ConfigError travels on in its place: Ray would garble it."""
    chunk = pickle.loads(packed)
    if isinstance(chunk, ConfigError):
        return packed
    try:
        return pickle.dumps(step(chunk))
    except ConfigError as error:
        return pickle.dumps(error)


def shares(cpus: float, gpus: float, nodes: int, actors: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a task and what an actor asks for, in a cluster of so many CPUs, GPUs and nodes.

    All actors together take half of the CPUs at most. So, however they are spread over the nodes, some node
    has room for a task: what feeds the actors never waits for them. Where there is no CPU yet, each asks for
    a whole one: what asks for none would run on the head, and no node would be started for it.
    """
    if not cpus:
        return {"num_cpus": 1.0}, {"num_cpus": 1.0}
    task = {"num_cpus": min(1.0, cpus / 2 / max(1, nodes))}
    actor: dict[str, Any] = {"num_cpus": min(1.0, cpus / 2 / max(1, actors))}
    if gpus:
        actor["num_gpus"] = 1 / math.ceil(max(1, actors) / gpus)
    return task, actor


def _shares(actors: int, labels: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a task and an actor asks for of the nodes with these labels, of which one is waited for."""
    nodes = _with_cpus(labels)
    if not nodes:
        for count in dict.fromkeys((actors + 1, 1)):
            why = f"the work asks for {amount_of('CPU', count)}, the cluster has 0"
            if start_nodes([{"CPU": 1.0}] * count, [labels] * count, why):
                break
        else:
            print(f"{why}; it begins when a node with CPUs comes", flush=True)
        nodes = _with_cpus(labels)
    cpus, gpus = (sum(resources.get(kind, 0) for resources in nodes) for kind in ("CPU", "GPU"))
    return shares(cpus, gpus, len(nodes), actors)


def _with_cpus(labels: Mapping[str, str]) -> list[dict[str, float]]:
    """Return the resources of the nodes with these labels that have CPUs."""
    nodes = [node["Resources"] for node in fitting(labels)]
    return [resources for resources in nodes if resources.get("CPU")]


@contextmanager
def ordered_and_silent(labels: Mapping[str, str] | None) -> Iterator[None]:
    """Make Ray Data keep the order of its rows, run on nodes with these labels, and draw no progress bars of
    its own, for the block."""
    from ray.data import DataContext

    logger, context = logging.getLogger("ray.data"), DataContext.get_current()
    options = context.execution_options
    kept = logger.level, context.enable_progress_bars, options.preserve_order, options.label_selector
    logger.setLevel(logging.ERROR)
    context.enable_progress_bars, options.preserve_order = False, True
    options.label_selector = dict(labels) if labels else None
    try:
        yield
    finally:
        logger.setLevel(kept[0])
        context.enable_progress_bars, options.preserve_order, options.label_selector = kept[1:]


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
