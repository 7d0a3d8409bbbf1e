"""Pass chunks of work through a pipeline of steps, on Ray Data or in this process, in order."""

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
"""A picklable function from chunk to chunk."""

MOST_BLOCKS = 1000


def run(
    first: Step | None,
    stages: Sequence[Step],
    chunks: Sequence[Any],
    workers: int,
    labels: Mapping[str, str] | None = None,
) -> Generator[Any, None, None]:
    """Pass every chunk through `first` and `stages`; yield the results in order.

    first: optional cheap step, run as Ray tasks.
    stages: steps that hold a model; each gets its own `workers` Ray actors.
    workers: 0 runs everything in this process, without Ray.
    labels: run on nodes with these labels only. Raises ConfigError if there are none.
    """
    if workers > 0 and chunks:
        with quiet_stderr(), cluster(), ordered_quiet_data(labels):
            check_labels(labels or {})
            yield from _run_on_ray(first, stages, chunks, workers, labels or {})
        return
    for chunk in chunks:
        made = chunk if first is None else first(chunk)
        for stage in stages:
            made = stage(made)
        yield made


class StageActor:
    """A Ray actor that holds one stage with its model."""

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
    """Run the steps on Ray Data. Each chunk is one pickled value, so any picklable type works."""
    import ray

    packed = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    dataset: Any = ray.data.from_items(packed, override_num_blocks=min(len(packed), MOST_BLOCKS))
    task, actor = _resources_per_call(workers * len(stages), labels)
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
    """Apply a step to a pickled chunk. A ConfigError is passed on as a chunk: Ray would wrap its message."""
    chunk = pickle.loads(packed)
    if isinstance(chunk, ConfigError):
        return packed
    try:
        return pickle.dumps(step(chunk))
    except ConfigError as error:
        return pickle.dumps(error)


def resources_per_call(
    cpus: float, gpus: float, nodes: int, actors: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the resources of one task and of one actor, given the cluster's CPUs, GPUs and nodes.

    All actors together take at most half of the CPUs. Some node then always has room for a task, so the
    tasks that feed the actors cannot deadlock with them. A cluster without CPUs yet gets requests of one
    whole CPU: a request of zero would run on the head and start no node.
    """
    if not cpus:
        return {"num_cpus": 1.0}, {"num_cpus": 1.0}
    task = {"num_cpus": min(1.0, cpus / 2 / max(1, nodes))}
    actor: dict[str, Any] = {"num_cpus": min(1.0, cpus / 2 / max(1, actors))}
    if gpus:
        actor["num_gpus"] = 1 / math.ceil(max(1, actors) / gpus)
    return task, actor


def _resources_per_call(actors: int, labels: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the resources of one task and one actor, after waiting for a first node with CPUs."""
    nodes = _with_cpus(labels)
    if not nodes:
        for count in dict.fromkeys((actors + 1, 1)):
            why = f"the work needs {amount_of('CPU', count)}, the cluster has 0"
            if start_nodes([{"CPU": 1.0}] * count, [labels] * count, why):
                break
        else:
            print(f"{why}; it starts when a node with CPUs joins", flush=True)
        nodes = _with_cpus(labels)
    cpus, gpus = (sum(resources.get(kind, 0) for resources in nodes) for kind in ("CPU", "GPU"))
    return resources_per_call(cpus, gpus, len(nodes), actors)


def _with_cpus(labels: Mapping[str, str]) -> list[dict[str, float]]:
    """Return the resources of the nodes with these labels that have CPUs."""
    nodes = [node["Resources"] for node in fitting(labels)]
    return [resources for resources in nodes if resources.get("CPU")]


@contextmanager
def ordered_quiet_data(labels: Mapping[str, str] | None) -> Iterator[None]:
    """Configure Ray Data for the block: ordered rows, nodes with these labels only, no progress bars."""
    from ray.data import DataContext

    logger, context = logging.getLogger("ray.data"), DataContext.get_current()
    options = context.execution_options
    before = logger.level, context.enable_progress_bars, options.preserve_order, options.label_selector
    logger.setLevel(logging.ERROR)
    context.enable_progress_bars, options.preserve_order = False, True
    options.label_selector = dict(labels) if labels else None
    try:
        yield
    finally:
        logger.setLevel(before[0])
        context.enable_progress_bars, options.preserve_order, options.label_selector = before[1:]


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Capture standard error, including that of C++ code, and print it only if the block fails.

    Ray prints warnings there that do not concern the user. A ConfigError prints none of them either.
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
