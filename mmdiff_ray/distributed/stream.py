"""Stream a rank's rows in the plan's order; Ray Data reads, decodes and augments them on data workers."""

import itertools
import logging
import pickle
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import OutageError
from mmdiff_ray.data.bad_rows import BadRows
from mmdiff_ray.data.batches import rank_batches
from mmdiff_ray.data.plan import Plan, Window
from mmdiff_ray.data.reader import Arrays, RowReader
from mmdiff_ray.distributed.cluster import this_node

SEGMENT_WINDOWS = 1024
"""Windows per Ray Data dataset. Bounds the memory of the process that drives the stream."""

PAUSE_S = 0.02
"""Seconds between steps of Ray Data's scheduling loop."""


class Pause(ExecutionCallback):
    """Sleep between steps of Ray Data's scheduling loop.

    The loop runs in a thread of the training process. Once enough rows are prefetched it has nothing to wait
    for, and it would spin while holding the GIL, which slows the training step.
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(PAUSE_S)


class WindowReader:
    """Read windows in a data worker. Each actor keeps one reader."""

    def __init__(self, reader: RowReader) -> None:
        import torch

        torch.set_num_threads(1)
        self.reader = reader

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        arrays = np.empty(1, dtype=object)
        arrays[0] = pickle.dumps(self._read(batch["window"][0]), protocol=5)
        return {"number": batch["number"], "arrays": arrays}

    def _read(self, window: Window) -> Arrays | OutageError:
        """Read a window. An OutageError is returned, not raised: Ray would wrap its message."""
        try:
            return self.reader.read(window)
        except OutageError as error:
            return error


def stream_batches(
    plan: Plan,
    reader: RowReader,
    rank: int,
    world: int,
    start_batch: int,
    stop_batch: int,
    data_workers: int,
    beside: bool = False,
    labels: Mapping[str, str] | None = None,
    bad_rows: BadRows | None = None,
) -> Iterator[Batch]:
    """Yield a rank's rows of global batches start_batch to stop_batch, decoded by `data_workers` Ray actors.

    Every rank runs its own stream over its own windows, so its batches depend on the plan only.
    beside: run the actors on this node, with the CPUs that the worker reserved; else on any node.
    labels: run the actors on nodes with these labels.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.label_selector = dict(labels) if labels else None
    windows = plan.rank_windows(rank, world, start_batch, stop_batch)
    share = plan.rows_of(rank, world)
    rows = 2 * sum(map(len, share.values()))
    decoded = _decoded(windows, reader, data_workers, len(share), rows, beside)
    bad_rows = bad_rows or BadRows(reader.bad_row_limit)
    return rank_batches(plan, decoded, rank, world, start_batch, stop_batch, bad_rows)


def _decoded(
    windows: Iterator[tuple[int, Window]],
    reader: RowReader,
    data_workers: int,
    lanes: int,
    rows: int,
    beside: bool,
) -> Iterator[tuple[int, Window, Arrays]]:
    """Yield (lane, window, its rows) for every (lane, window), in order.

    Prefetch about `rows` rows, and at least one window per lane. Without a limit, Ray Data would fill its
    object store, on cores that training needs.
    """
    resources: dict[str, Any] = {"num_cpus": 0, "label_selector": this_node()} if beside else {"num_cpus": 1}
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [Pause]
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    while segment := list(itertools.islice(windows, SEGMENT_WINDOWS)):
        largest = max(len(window) for _, window in segment)
        ahead = max(rows, lanes * largest) + 2 * data_workers * largest
        # Ray Data lets an operator fill half of the limit with output that is not consumed yet.
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
            object_store_memory=2 * ahead * reader.row_bytes
        )
        items = [{"number": number, "window": window} for number, (_, window) in enumerate(segment)]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            WindowReader,
            fn_constructor_args=(reader,),
            batch_size=1,
            batch_format="numpy",
            concurrency=data_workers,
            **resources,
        )
        for row in dataset.iter_rows():
            arrays = pickle.loads(row["arrays"])
            if isinstance(arrays, OutageError):
                raise arrays
            yield *segment[row["number"]], arrays
