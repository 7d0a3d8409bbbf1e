"""Put rows together as batches: a rank's share of the global batches, or rows of a split for evaluation."""

import contextlib
import itertools
import math
import threading
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from mmdiff_ray.batch import Batch
from mmdiff_ray.data.bad_rows import BadRows
from mmdiff_ray.data.manifest import Split
from mmdiff_ray.data.plan import GroupTable, Plan, Window
from mmdiff_ray.data.reader import DATA, PRESENT, Arrays, RowReader

Stream = tuple[int, int]
"""(lane, source): rows of one data set on their way through one lane."""


def rank_batches(
    plan: Plan,
    windows: Iterable[tuple[int, Window, Arrays]],
    rank: int,
    world: int,
    start_batch: int = 0,
    stop_batch: int | None = None,
    bad_rows: BadRows | None = None,
) -> Iterator[Batch]:
    """Yield a rank's share of the global batches start to stop (None: for ever).

    windows: (lane, window, its rows), in the order of `plan.rank_windows` with the same numbers. A batch has
    global_batch / world rows, rounded up: the same number on all ranks. Those that could not be read are
    padding, and so is the last one of a rank that has a row less than others. Raises BadRowsError where
    `bad_rows` has too many (by default any), and RuntimeError if the windows end too early: no row is ever
    dropped silently.
    """
    stock = _Stock(windows, bad_rows or BadRows(0))
    share, rows = plan.rows_of(rank, world), -(-plan.global_batch // world)
    for batch in itertools.count(start_batch) if stop_batch is None else range(start_batch, stop_batch):
        slots: dict[Stream, list[int]] = defaultdict(list)
        slot = 0
        for lane, own in share.items():
            first = batch * plan.rows_per_lane
            for source in plan.mixture(lane, first + own.start, first + own.stop):
                slots[lane, source].append(slot)
                slot += 1
        parts = {stream: stock.take(stream, len(wanted)) for stream, wanted in slots.items()}
        yield _to_batch(_scatter(parts, slots, rows))


def local_batches(
    plan: Plan,
    reader: RowReader,
    rank: int = 0,
    world: int = 1,
    start_batch: int = 0,
    stop_batch: int | None = None,
    threads: int = 1,
    bad_rows: BadRows | None = None,
) -> Iterator[Batch]:
    """Yield a rank's share of the global batches, read in this process by background threads."""
    items = plan.rank_windows(rank, world, start_batch, stop_batch)
    ahead = len(plan.rows_of(rank, world))
    with contextlib.closing(_read_ahead(reader, items, ahead, threads)) as windows:
        bad_rows = bad_rows or BadRows(reader.bad_row_limit)
        yield from rank_batches(plan, windows, rank, world, start_batch, stop_batch, bad_rows)


def split_batches(
    reader: RowReader,
    splits: Sequence[Split],
    rows: int,
    batch: int,
    visits: int = 1,
    bad_rows: BadRows | None = None,
) -> Iterator[Batch]:
    """Yield the first `rows` rows of a split, `batch` at a time, once for each visit; a visit's last batch is
    padded.

    splits: the split of every data set, in the reader's order; their rows take turns. The order is always the
    same and spreads over the whole split from the first rows on, however its rows were sorted when written.
    Raises BadRowsError once more than `data.bad_row_limit` rows could not be read.
    """
    groups = [GroupTable(split) for split in splits]
    bad_rows = bad_rows or BadRows(reader.bad_row_limit)
    for visit in range(visits):
        turns = itertools.islice(_take_turns(splits), rows)
        while chosen := list(itertools.islice(turns, batch)):
            slots: dict[int, list[int]] = defaultdict(list)
            for slot, (source, _) in enumerate(chosen):
                slots[source].append(slot)
            parts = {}
            for source, wanted in slots.items():
                pieces = tuple(groups[source].row(chosen[slot][1]) for slot in wanted)
                arrays = reader.read(Window(source, visit, pieces))
                bad_rows.add(arrays)
                parts[source] = [arrays]
            yield _to_batch(_scatter(parts, slots, batch))


class _Stock:
    """Rows that were read and not yet put into a batch, a queue for each lane and source."""

    def __init__(self, windows: Iterable[tuple[int, Window, Arrays]], bad_rows: BadRows) -> None:
        self._windows = iter(windows)
        self._queues: dict[Stream, deque[Arrays]] = defaultdict(deque)
        self._bad = bad_rows

    def take(self, stream: Stream, rows: int) -> list[Arrays]:
        """Return the next rows of a stream, in one or more parts, once their windows have come."""
        parts = []
        while rows:
            while not self._queues[stream]:
                self._receive()
            head = self._queues[stream].popleft()
            if len(head["ids"]) > rows:
                self._queues[stream].appendleft({name: values[rows:] for name, values in head.items()})
                head = {name: values[:rows] for name, values in head.items()}
            rows -= len(head["ids"])
            parts.append(head)
        return parts

    def _receive(self) -> None:
        for lane, window, arrays in self._windows:
            assert len(arrays["ids"]) == len(window), f"{window} came with {len(arrays['ids'])} rows"
            self._bad.add(arrays)
            self._queues[lane, window.source].append(arrays)
            return
        raise RuntimeError("the stream of rows ended before the run did")


def _read_ahead(
    reader: RowReader, items: Iterable[tuple[int, Window]], ahead: int, threads: int
) -> Generator[tuple[int, Window, Arrays], None, None]:
    """Yield (lane, window, its rows) in order, reading `ahead` windows before they are asked for."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    waiting: deque[tuple[int, Window, Future[Arrays]]] = deque()
    ended = threading.Event()
    try:
        for lane, window in items:
            waiting.append((lane, window, pool.submit(reader.read, window, ended)))
            if len(waiting) > ahead:
                lane, window, future = waiting.popleft()
                yield lane, window, future.result()
        for lane, window, future in waiting:
            yield lane, window, future.result()
    finally:
        ended.set()
        pool.shutdown(cancel_futures=True)


def _scatter(parts: Mapping, slots: Mapping, rows: int) -> Arrays:
    """Return arrays of `rows` rows: the parts of each stream, one after the other, in the stream's slots."""
    whole: Arrays = {}
    for stream, wanted in slots.items():
        filled = 0
        for part in parts[stream]:
            spots = wanted[filled : filled + len(part["ids"])]
            filled += len(spots)
            for name, values in part.items():
                if name not in whole:
                    whole[name] = np.zeros((rows, *values.shape[1:]), values.dtype)
                whole[name][spots] = values
    return whole


def _to_batch(arrays: Arrays) -> Batch:
    tensors = {
        name: torch.from_numpy(values) for name, values in arrays.items() if name not in ("error", "place")
    }
    return Batch(
        ids=tensors["ids"],
        visits=tensors["visits"],
        real=tensors["real"],
        data={name.removeprefix(DATA): value for name, value in tensors.items() if name.startswith(DATA)},
        present={n.removeprefix(PRESENT): value for n, value in tensors.items() if n.startswith(PRESENT)},
    )


def _take_turns(splits: Sequence[Split]) -> Iterator[tuple[int, int]]:
    """Yield (source, row) until no row is left; turn i of a split is i steps of its stride from row 0."""
    strides = [_stride(split.rows) for split in splits]
    for number in range(max(split.rows for split in splits)):
        for source, split in enumerate(splits):
            if number < split.rows:
                yield source, number * strides[source] % split.rows


def _stride(rows: int) -> int:
    """Return a step that visits all rows of a ring and spreads the first ones: about its golden section."""
    stride = max(1, round(rows * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, rows) > 1:
        stride += 1
    return stride
