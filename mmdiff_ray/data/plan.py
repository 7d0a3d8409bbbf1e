"""Plan which row is read when: the one order of all rows, the same at any number of workers.

Rows are dealt to *lanes*, endless streams. A rank owns some lanes, and part of a lane where their number is
no multiple of the number of workers. The plan is a pure function of the
data sets' row groups, the seed and a few numbers, so any point of it can be computed, and the cursor of a
run is one integer, the number of finished global batches.

For one data set of R rows and L lanes, row q of lane l belongs to visit (q L + l) // R. So a visit gives
every lane R / L rows, rounded up or down, the lanes never drift apart, and data sets with fewer rows than
lanes work too (a lane then has no row in some visits). In a visit the row groups are permuted and their
rows, one after the other, cut into one contiguous part per lane; a part is cut into windows of a few row
groups, and rows are permuted inside each window.

Where rows are weighed (`Frequencies`), a visit still has R rows, of which some are the same and some are left
out. The copies of a row are drawn as of different visits: their random choices differ.
"""

import bisect
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import RowGroup, Split
from mmdiff_ray.data.weights import Frequencies

ORDERS_KEPT = 3
COPY = 2**32
"""What a further copy of a row in one visit adds to the number of the visit."""
OFFSET = 2**31
"""What keys the offset of a visit's counts: no number of a lane."""


class Place(NamedTuple):
    """Where a row lies, and the visit that it counts as."""

    row_group: RowGroup
    row: int
    visit: int


class Piece(NamedTuple):
    """Rows start to stop of one row group. counts: how often each row of the group comes, one after the
    other; None: once."""

    row_group: RowGroup
    start: int
    stop: int
    counts: tuple[int, ...] | None = None

    def places(self, visit: int) -> list[Place]:
        """Return where the rows lie."""
        if self.counts is None:
            return [Place(self.row_group, row, visit) for row in range(self.start, self.stop)]
        copies = ((row, copy) for row, count in enumerate(self.counts) for copy in range(count))
        return [
            Place(self.row_group, row, visit + copy * COPY)
            for row, copy in itertools.islice(copies, self.start, self.stop)
        ]


@dataclass(frozen=True)
class Window:
    """A work item: rows of one data set that are read together.

    source: index of the data set. visit: how often the data set was gone through before. pieces: the rows.
    key: seeds the order of the rows; None leaves them in the order of the pieces. skip: leading rows of that
    order that are not wanted (they were consumed before a restart). only: which of the rest are wanted; None:
    all (another rank gets the others).
    """

    source: int
    visit: int
    pieces: tuple[Piece, ...]
    key: tuple[int, ...] | None = None
    skip: int = 0
    only: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Return the number of wanted rows."""
        if self.only is not None:
            return len(self.only)
        return sum(piece.stop - piece.start for piece in self.pieces) - self.skip

    def places(self) -> list[Place]:
        """Return where the wanted rows lie, in their final order."""
        places = [place for piece in self.pieces for place in piece.places(self.visit)]
        if self.key is not None:
            places = [places[index] for index in np.random.default_rng(self.key).permutation(len(places))]
        places = places[self.skip :]
        return places if self.only is None else [places[index] for index in self.only]


class Plan:
    """The order in which the rows of several data sets are read.

    sources: (training split, weight) of each data set. frequencies: how often the rows of each are read;
    None: every row once in a visit. lanes: number of streams. window: row groups that are shuffled together.
    global_batch: rows of a batch over all workers, a multiple of lanes. With k = global_batch / lanes, slots
    [l k, (l + 1) k) of global batch b hold rows [b k, (b + 1) k) of lane l. Memory: the sizes of all row
    groups and a few permutations of them.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Split, float]],
        lanes: int,
        window: int,
        global_batch: int,
        seed: int,
        frequencies: Sequence[Frequencies | None] | None = None,
    ) -> None:
        assert global_batch % lanes == 0, f"global_batch {global_batch} must be a multiple of lanes {lanes}"
        self.lanes = lanes
        self.global_batch = global_batch
        self.rows_per_lane = global_batch // lanes
        self._mix = _Mix([weight for _, weight in sources], lanes)
        self._sources = [
            _Source(index, split, lanes, window, seed, weighed)
            for index, ((split, _), weighed) in enumerate(
                zip(sources, frequencies or [None] * len(sources), strict=True)
            )
        ]

    def rows_of(self, rank: int, world: int) -> dict[int, range]:
        """Return lane -> which of its rows in every global batch a rank of `world` workers gets.

        A rank gets the slots rank * B // world to (rank + 1) * B // world of a global batch of B rows. Raises
        ConfigError where some would get none.
        """
        if world > self.global_batch:
            raise ConfigError(
                f"train.global_batch ({self.global_batch}) must have a row for each of {world} workers"
            )
        start, stop = (edge * self.global_batch // world for edge in (rank, rank + 1))
        size = self.rows_per_lane
        return {
            lane: range(max(0, start - lane * size), min(size, stop - lane * size))
            for lane in range(start // size, -(-stop // size))
        }

    def mixture(self, lane: int, start: int, stop: int) -> list[int]:
        """Return the source of each of the rows start to stop of a lane."""
        return self._mix.sources(lane, start, stop)

    def windows(self, lane: int, start_row: int = 0) -> Iterator[Window]:
        """Yield the windows of a lane from one of its rows on, in the order of first need, for ever."""
        return (window for _, window in self._needed(lane, start_row, range(self.rows_per_lane)))

    def rank_windows(
        self, rank: int, world: int, start_batch: int = 0, stop_batch: int | None = None
    ) -> Iterator[tuple[int, Window]]:
        """Yield (lane, window) in the order in which a rank first needs them.

        start_batch: global batches already finished. stop_batch: where the run ends; for ever if None.
        """
        size = self.rows_per_lane
        streams = [
            self._keyed(lane, start_batch * size, own) for lane, own in self.rows_of(rank, world).items()
        ]
        for (batch, lane, _), window in heapq.merge(*streams, key=lambda item: item[0]):
            if stop_batch is not None and batch >= stop_batch:
                return
            if len(window):  # of a lane that two ranks share, some windows are all the other's
                yield lane, window

    def _keyed(self, lane: int, start_row: int, own: range) -> Iterator[tuple[tuple[int, int, int], Window]]:
        for row, window in self._needed(lane, start_row, own):
            yield (row // self.rows_per_lane, lane, row), window

    def _needed(self, lane: int, start_row: int, own: range) -> Iterator[tuple[int, Window]]:
        """Yield (row of the lane at which it is first needed, window). own: a rank's rows of every batch."""
        counts = self._mix.counts(lane, start_row)
        streams = [
            self._needed_of(source, lane, count, own)
            for source, count in zip(self._sources, counts, strict=True)
        ]
        return heapq.merge(*streams, key=lambda item: item[0])

    def _needed_of(
        self, source: "_Source", lane: int, start_row: int, own: range
    ) -> Iterator[tuple[int, Window]]:
        row, size = start_row, self.rows_per_lane
        for window in source.windows(lane, start_row):
            if len(own) == size:
                yield self._mix.position(lane, source.index, row), window
            else:
                rows = [self._mix.position(lane, source.index, row + i) for i in range(len(window))]
                only = tuple(index for index, position in enumerate(rows) if position % size in own)
                yield rows[only[0] if only else 0], replace(window, only=only)
            row += len(window)


class GroupTable:
    """The row groups of a split, numbered through all of its shards. rows: (G,) int32, the rows of each."""

    def __init__(self, split: Split) -> None:
        self._shards = split.shards
        sizes = [len(shard.row_groups) for shard in split.shards]
        self._first = np.cumsum([0, *sizes])  # shard -> number of its first row group
        self.rows = np.array([rows for shard in split.shards for rows in shard.row_groups], np.int32)
        self.ends = np.cumsum(self.rows, dtype=np.int64)

    def piece(self, number: int, start: int, stop: int) -> Piece:
        """Return rows start to stop of a row group."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return Piece(self._shards[shard].row_group(number - int(self._first[shard])), start, stop)

    def row(self, row: int) -> Piece:
        """Return one row of the split, counted in the order in which it was written."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        start = row - int(self.ends[number]) + int(self.rows[number])
        return self.piece(number, start, start + 1)


class _Order(NamedTuple):
    """The row groups of a visit. groups: their numbers; ends: the row at which each of them ends; counts: how
    often each row of the data set comes, None: once."""

    groups: np.ndarray
    ends: np.ndarray
    counts: np.ndarray | None


class _Source:
    """The row groups of one data set and their order in each visit."""

    def __init__(
        self, index: int, split: Split, lanes: int, window: int, seed: int, weighed: Frequencies | None
    ) -> None:
        if not split.rows:
            raise ConfigError(f"data.sources[{index}] has no rows to train on")
        self.index = index
        self._lanes, self._window, self._seed = lanes, window, seed
        self._rows = split.rows
        self._groups = GroupTable(split)
        self._weighed = weighed
        self._orders: dict[int, _Order] = {}

    def windows(self, lane: int, start_row: int) -> Iterator[Window]:
        """Yield a lane's windows of this data set from its row `start_row` on; the first may skip rows."""
        first_visit = (start_row * self._lanes + lane) // self._rows
        skip = start_row - self._dealt(lane, first_visit)
        for visit in itertools.count(first_visit):
            for number, pieces in enumerate(self._cut(lane, visit)):
                rows = sum(piece.stop - piece.start for piece in pieces)
                if skip < rows:
                    key = (self._seed, self.index, visit, 1 + lane, number)
                    yield Window(self.index, visit, pieces, key, skip)
                skip = max(0, skip - rows)

    def _dealt(self, lane: int, visits: int) -> int:
        """Return the rows that a lane gets in the first `visits` visits."""
        return (visits * self._rows + self._lanes - 1 - lane) // self._lanes

    def _cut(self, lane: int, visit: int) -> Iterator[tuple[Piece, ...]]:
        """Yield the windows of a lane's part of a visit.

        The first window's length differs by lane, so that a rank's lanes do not all need new windows at once.
        """
        pieces = self._part(lane, visit)
        size = 1 + lane % self._window
        while batch := tuple(itertools.islice(pieces, size)):
            yield batch
            size = self._window

    def _part(self, lane: int, visit: int) -> Iterator[Piece]:
        """Yield the pieces of a lane's contiguous part of a visit."""
        shares = [self._dealt(other, visit + 1) - self._dealt(other, visit) for other in range(lane + 1)]
        start, stop = sum(shares[:-1]), sum(shares)
        groups, ends, counts = self._order(visit)
        first = int(np.searchsorted(ends, start, side="right"))
        begin = int(ends[first - 1]) if first else 0
        for index, end in zip(groups[first:], map(int, ends[first:]), strict=True):
            low, high = max(start, begin), min(stop, end)
            if begin >= stop:
                return
            if low < high:
                piece = self._groups.piece(int(index), low - begin, high - begin)
                if counts is not None:
                    last = int(self._groups.ends[index])
                    own = counts[last - piece.row_group.rows : last]
                    piece = piece._replace(counts=tuple(own.tolist()))
                yield piece
            begin = end

    def _order(self, visit: int) -> _Order:
        """Return the permuted row groups of a visit."""
        if visit not in self._orders:
            while len(self._orders) >= ORDERS_KEPT:
                self._orders.pop(next(iter(self._orders)))
            rng = np.random.default_rng((self._seed, self.index, visit))
            order = rng.permutation(len(self._groups.rows)).astype(np.int32)
            counts, sizes = None, self._groups.rows
            if self._weighed is not None:
                offset = np.random.default_rng((self._seed, self.index, visit, OFFSET)).random()
                counts = self._weighed.counts(offset)
                sizes = np.diff(np.cumsum(counts)[self._groups.ends - 1], prepend=0)
            self._orders[visit] = _Order(order, np.cumsum(sizes[order], dtype=np.int64), counts)
        return self._orders[visit]


class _Mix:
    """Which data set each row of a lane comes from, by weight.

    Of the first m rows of a lane, source 0 has floor(m p + phase), p being its share; the rest are dealt to
    the other sources in the same way. So counts are exact at any row without walking there, and stay within
    one or two of m times the weight. The phases spread over the lanes, so that every batch has nearly the
    exact mixture.
    """

    def __init__(self, weights: Sequence[float], lanes: int) -> None:
        if not weights or min(weights) <= 0 or not math.isfinite(sum(weights)):
            raise ConfigError(f"data.sources: weights must be above 0, got {list(weights)}")
        exact = [Fraction(str(weight)).limit_denominator(10**6) or Fraction(1, 10**6) for weight in weights]
        self._total = [weight / sum(exact) for weight in exact]
        self._shares = [exact[index] / sum(exact[index:]) for index in range(len(exact) - 1)]
        self._lanes = lanes

    def counts(self, lane: int, row: int) -> list[int]:
        """Return how many of a lane's first `row` rows come from each source."""
        counts = []
        for level, share in enumerate(self._shares):
            phase = (lane * (2 * level + 1) % self._lanes) * share.denominator
            count = (row * share.numerator * self._lanes + phase) // (share.denominator * self._lanes)
            counts.append(count)
            row -= count
        return [*counts, row]

    def sources(self, lane: int, start: int, stop: int) -> list[int]:
        """Return the source of each of the rows start to stop of a lane."""
        if not self._shares:
            return [0] * (stop - start)
        walk = [self.counts(lane, row) for row in range(start, stop + 1)]
        return [
            next(source for source, (before, after) in enumerate(zip(a, b, strict=True)) if after > before)
            for a, b in itertools.pairwise(walk)
        ]

    def position(self, lane: int, source: int, number: int) -> int:
        """Return the row of a lane that is the `number`-th (from 0) of a source."""
        if not self._shares:
            return number
        most = math.ceil((number + len(self._total) + 1) / self._total[source])
        rows = range(number, most + 1)
        return rows[bisect.bisect_left(rows, number + 1, key=lambda row: self.counts(lane, row + 1)[source])]
