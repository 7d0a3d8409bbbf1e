"""The plan: which row comes in which slot of which global batch."""

import itertools
import pickle
import tracemalloc
from collections import Counter, defaultdict

import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import RowGroup
from mmdiff_ray.data.plan import Plan
from tests.data.samples import numbers_of, pairs, plan, planned, split

WORLDS = [1, 2, 3, 5, 7, 16]
"""Numbers of workers; 2 alone divides the 8 lanes that rows are dealt to, and 16 is more than there are."""


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("rows", [96, 101, 8, 3, 1])
def test_every_row_of_every_visit_is_seen_exactly_once(rows: int, world: int) -> None:
    visits = 5 if rows > 8 else 40
    one = plan([rows], lanes=8, global_batch=16)
    batches = -(-rows * visits // one.global_batch)
    seen = Counter(p for rank in range(world) for p in pairs(planned(one, batches, rank, world)))
    assert max(seen.values()) == 1
    assert set(seen) >= {(visit, row) for visit in range(visits) for row in range(rows)}
    assert {visit for visit, _ in seen} <= set(range(visits + -(-one.global_batch // rows)))


def test_a_visit_ends_in_the_batch_where_its_last_row_fits() -> None:
    seen = pairs(planned(plan([101]), batches=64))
    for end in range(8, 512, 8):
        done = Counter(visit for visit, _ in seen[:end])
        assert [done[visit] for visit in range(end // 101)] == [101] * (end // 101)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("sizes", "weights"), [([101], [1.0]), ([101, 30, 5], [3.0, 1.0, 0.5])])
def test_the_row_of_a_slot_is_the_same_at_any_world_size(sizes, weights, world: int) -> None:
    one = plan(sizes, weights, lanes=8, global_batch=16)
    whole = planned(one, 30)
    parts = [planned(one, 30, rank, world) for rank in range(world)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert pairs([batch]) == pairs(shares)
        assert {len(share) for share in shares} == {-(-16 // world)}
        assert {int(share.real.sum()) for share in shares} <= {16 // world, -(-16 // world)}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("weights", [[1.0, 0.1], [3.0, 1.0]])
def test_no_row_is_read_by_two_ranks(weights, world: int) -> None:
    one = plan([101, 30], weights, lanes=8, global_batch=16)
    read = [rank_rows(one, rank, world, 25) for rank in range(world)]
    assert max(Counter(itertools.chain(*read)).values()) == 1
    assert set(pairs(planned(one, 25))) <= set(itertools.chain(*read))


def rank_rows(one: Plan, rank: int, world: int, batches: int) -> list[tuple[int, int]]:
    """Return the (visit, id) of all rows that a rank reads."""
    windows = [window for _, window in one.rank_windows(rank, world, 0, batches)]
    return [(window.visit, int(row)) for window in windows for row in numbers_of(window)["ids"]]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("sizes", "weights"), [([101], [1.0]), ([101, 30, 5], [3.0, 1.0, 0.5])])
def test_a_resumed_stream_equals_the_uninterrupted_one(sizes, weights, world: int) -> None:
    one = plan(sizes, weights, lanes=8, global_batch=16)
    whole = planned(one, 40)
    for start in range(0, 40, 9):
        parts = [planned(one, 40, rank, world, start) for rank in range(world)]
        for batch, *shares in zip(whole[start:], *parts, strict=True):
            assert pairs([batch]) == pairs(shares)


def test_a_far_point_is_reached_without_walking_there() -> None:
    far = 10**9
    one = plan([101, 30], [3.0, 1.0])
    two = planned(one, far + 2, start=far)
    assert pairs(two[1:]) == pairs(planned(one, far + 2, start=far + 1))


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_gets_each_window_in_the_batch_that_first_needs_it(world: int) -> None:
    one, size = plan([101, 30], [3.0, 1.0]), 2
    for rank, batch in itertools.product(range(world), range(40)):
        held: dict[tuple[int, int], list[int]] = defaultdict(list)
        for lane, window in one.rank_windows(rank, world, 0, batch + 1):
            held[lane, window.source].append(len(window))
        for lane, own in one.rows_of(rank, world).items():
            rows = one.mixture(lane, 0, (batch + 1) * size)
            used = Counter(source for row, source in enumerate(rows) if row % size in own)
            for source, count in used.items():
                assert sum(held[lane, source][:-1]) < count <= sum(held[lane, source])


def test_two_sources_mix_by_weight_in_every_batch() -> None:
    batches = planned(plan([97, 31], [3.0, 1.0]), 200)
    for batch in batches:
        assert int((batch.ids >= 10**6).sum()) == 2
    seen = Counter(pairs(batches))
    assert max(seen.values()) == 1
    second = [visit for visit, row in seen if row >= 10**6]
    assert Counter(second)[0] == 31 and Counter(second)[5] == 31


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, 0.1], [1.0, 100.0]])
def test_the_mixture_is_never_more_than_two_rows_off_its_weights(weights: list[float]) -> None:
    one = plan([50] * len(weights), weights)
    for lane in range(one.lanes):
        counts = [0] * len(weights)
        for row, source in enumerate(one.mixture(lane, 0, 300), start=1):
            counts[source] += 1
            for count, weight in zip(counts, weights, strict=True):
                assert abs(count - row * weight / sum(weights)) < 2


def test_seeds_and_visits_read_the_row_groups_in_different_orders() -> None:
    def groups(seed: int, visit: int) -> list[set[RowGroup]]:
        windows = itertools.takewhile(lambda window: window.visit <= visit, plan([96], seed=seed).windows(0))
        return [{place.row_group for place in window.places()} for window in windows if window.visit == visit]

    assert groups(0, 0) == groups(0, 0)
    assert groups(0, 0) != groups(0, 1)
    assert groups(0, 0) != groups(1, 0)


def test_seeds_and_visits_shuffle_the_rows_of_a_row_group_differently() -> None:
    def rows(seed: int, visit: int) -> list[int]:
        only = plan([4], seed=seed, lanes=1).windows(0)
        return [place.row for place in next(window for window in only if window.visit == visit).places()]

    assert rows(0, 0) == rows(0, 0) and sorted(rows(0, 0)) == [0, 1, 2, 3]
    assert len({tuple(rows(0, visit)) for visit in range(5)}) > 1
    assert len({tuple(rows(seed, 0)) for seed in range(5)}) > 1


def test_a_batch_mixes_rows_from_distant_row_groups() -> None:
    groups = [len({row // 4 for _, row in pairs([batch])}) for batch in planned(plan([960]), 100)]
    assert sum(groups) / len(groups) > 4


def test_a_window_holds_few_row_groups_of_one_visit() -> None:
    for lane in range(4):
        for window in itertools.islice(plan([101], window=3).windows(lane), 50):
            assert 1 <= len(window.pieces) <= 3
            assert len({place.row_group for place in window.places()}) == len(window.pieces)
            assert pickle.loads(pickle.dumps(window)) == window


def test_the_plan_of_a_million_rows_is_small() -> None:
    million = split(10**6, rows_per_group=64, rows_per_shard=1024)
    tracemalloc.start()
    one = Plan([(million, 1.0)], lanes=8, window=4, global_batch=64, seed=0)
    for _ in itertools.islice(one.rank_windows(0, 1), 2 * 15625 // 4):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def test_more_workers_than_rows_of_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch \(8\) must have a row for each of 9 workers"):
        list(plan([20]).rank_windows(0, 9, 0, 1))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"data.sources: weights must be above 0"):
        plan([20, 20], [1.0, weight])


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.sources\[1\] has no rows"):
        plan([20, 0])
