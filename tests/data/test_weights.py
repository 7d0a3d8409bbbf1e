"""Weighted rows: how often each is read, in which order, and what is refused."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from mmdiff_ray.config import ConfigError, DataConfig, SourceConfig
from mmdiff_ray.data.batches import local_batches
from mmdiff_ray.data.plan import COPY, Plan
from mmdiff_ray.data.shards import ShardWriter, row_id
from mmdiff_ray.data.weights import NO_CLASS, Frequencies, expected_counts, row_frequencies
from tests.data.samples import LABELS, pairs, plan, planned, reader, row, write

ROWS = 101


@pytest.fixture(scope="module")
def frequencies() -> Frequencies:
    """Return the frequencies of rows of three unlike classes or none, with weights, some of them 0."""
    rng = np.random.default_rng(0)
    weights, classes = (
        rng.uniform(0, 2, ROWS),
        rng.choice([NO_CLASS, 0, 1, 2], ROWS, p=[0.1, 0.7, 0.15, 0.05]),
    )
    weights[[0, 7, 100]] = 0
    return expected_counts(weights, classes, "here")


def test_counts_are_the_expected_ones_rounded_and_those_of_a_class_too(frequencies):
    expected = frequencies.expected
    assert expected.sum() == pytest.approx(ROWS)
    total = np.zeros(ROWS)
    offsets = [0.0, 1 - 2**-53, *np.linspace(0, 1, 2000, endpoint=False)]
    for offset in offsets:
        counts = frequencies.counts(offset)
        assert counts.sum() == ROWS and (abs(counts - expected) < 1 + 1e-9).all()
        ordered = np.cumsum(counts[frequencies.order]) - np.cumsum(expected[frequencies.order])
        assert (abs(ordered) <= 1 + 1e-9).all()  # so any run of rows in this order, such as a class
        total += counts
    np.testing.assert_allclose(total / len(offsets), expected, atol=2e-3)
    assert not total[[0, 7, 100]].any()


def test_classes_come_equally_often_in_proportion_to_the_weights_within():
    weights = np.array([1.0, 3, 1, 1, 1, 1, 0, 2])
    classes = np.array([0, 0, 1, 1, 1, 1, 2, NO_CLASS])
    expected = expected_counts(weights, classes, "here").expected
    np.testing.assert_allclose(expected, np.array([1, 3, 1, 1, 1, 1, 0, 2]) * 0.8)


def weighed(frequencies, **options) -> Plan:
    return plan([ROWS, 30], [3.0, 1.0], frequencies=[frequencies, None], lanes=8, global_batch=16, **options)


def test_each_visit_reads_a_row_as_often_as_its_count(frequencies):
    one = plan([ROWS], frequencies=[frequencies])
    seen = pairs(planned(one, -(-ROWS * 6 // 8)))
    assert len(set(seen)) == len(seen)  # the copies of a row count as different visits
    visits = defaultdict(Counter)
    for visit, number in seen:
        visits[visit % COPY][number] += 1
    for visit in range(5):
        counts = np.array([visits[visit][number] for number in range(ROWS)])
        assert counts.sum() == ROWS and (abs(counts - frequencies.expected) < 1).all()
    assert visits[0] != visits[1]
    assert visits != Counter(pairs(planned(plan([ROWS], frequencies=[frequencies], seed=1), 76)))


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_weighted_rows_are_the_same_at_any_world_size_and_after_a_restart(frequencies, world):
    one = weighed(frequencies)
    whole = planned(one, 40)
    for start in (0, 9, 27):
        parts = [planned(weighed(frequencies), 40, rank, world, start) for rank in range(world)]
        for batch, *shares in zip(whole[start:], *parts, strict=True):
            assert pairs([batch]) == pairs(shares)


def test_equal_weights_read_every_row_once(frequencies):
    alike = expected_counts(np.full(ROWS, 0.3), np.full(ROWS, NO_CLASS), "here")
    assert pairs(planned(plan([ROWS], frequencies=[alike]), 40)) == pairs(planned(plan([ROWS]), 40))


# --- from data sets -----------------------------------------------------------------------------------------


def weights_of(uri: str, *manifests, **keys):
    sources = [SourceConfig(uri=uri)] * len(manifests)
    return row_frequencies(DataConfig(sources=sources, **keys), manifests)


def test_batches_of_a_balanced_column_hold_its_classes_equally_often(tmp_path):
    uri = str(tmp_path / "toy")
    rare = [number for number in range(200) if number % 3 == 0 or number % 10 == 1]
    manifest = write(uri, rare)
    train = manifest.splits["train"]
    found = weights_of(uri, manifest, balance="category")
    one = Plan([(train, 1.0)], lanes=4, window=2, global_batch=8, seed=0, frequencies=found)
    known = {row_id(f"row {number}"): row(number)["category"] for number in rare}
    counts: Counter = Counter()
    images = defaultdict(set)
    for batch in local_batches(one, reader([uri]), stop_batch=10 * train.rows // 8):
        for number, pixels in zip(batch.ids.tolist(), batch.data["pixels"], strict=True):
            counts[known[number]] += 1
            images[number].add(pixels.numpy().tobytes())
    unlabelled = counts.pop(None)
    assert set(counts) == set(LABELS) and max(counts.values()) - min(counts.values()) <= 20
    assert unlabelled == pytest.approx(10 * sum(v is None for v in known.values()) * 0.8, rel=0.35)
    assert max(map(len, images.values())) > 10  # copies in one visit are drawn over other backgrounds


def weighted_set(uri: str, weights, dim: int = 1):
    writer = ShardWriter(uri, "toy", {"weight": {"kind": "vector"}}, val_share=0, rows_per_group=2)
    for number, weight in enumerate(weights):
        writer.add({"key": str(number), "weight": None if weight is None else [weight] * dim})
    return writer.close()


def test_a_column_of_weights_says_how_often_rows_are_read(tmp_path):
    uri = str(tmp_path / "set")
    (found,) = weights_of(uri, weighted_set(uri, [0, 2, 1, None]), weight="weight")
    np.testing.assert_allclose(found.expected, [0, 2, 1, 1])
    assert weights_of(uri, weighted_set(uri + "2", [1, 1])) == [None]


@pytest.mark.parametrize(
    ("weights", "keys", "message"),
    [
        ([1, -1], {"weight": "weight"}, "data.weight: a row of .*set has the weight -1, want 0 or more"),
        ([0, 0], {"weight": "weight"}, "data.weight: all rows of .*set have the weight 0"),
        ([1], {"weight": "wieght"}, "data.weight: unknown column 'wieght'; known: weight; did you mean"),
        ([1], {"balance": "weight"}, "data.balance: the column 'weight' is vector of 1 numbers; want labels"),
    ],
)
def test_what_weighs_nothing_is_one_line(tmp_path, weights, keys, message):
    uri = str(tmp_path / "set")
    with pytest.raises(ConfigError, match=message):
        weights_of(uri, weighted_set(uri, weights), **keys)


def test_weights_are_single_finite_numbers(tmp_path):
    uri = str(tmp_path / "set")
    with pytest.raises(ConfigError, match="is vector of 2 numbers; want one number per row"):
        weights_of(uri, weighted_set(uri, [1], dim=2), weight="weight")
    with pytest.raises(ConfigError, match="has the weight nan"):
        expected_counts(np.array([1, np.nan]), np.zeros(2, int), "here")


def test_a_data_set_without_the_column_is_read_evenly_beside_one_that_has_it(tmp_path):
    uri = str(tmp_path / "toy")
    has, lacks = write(uri, range(40)), weighted_set(str(tmp_path / "other"), [1, 1])
    found = weights_of(uri, has, lacks, balance="category")
    assert found[0] is not None and found[1] is None
    mixed = Plan([(has.splits["train"], 1.0), (lacks.splits["train"], 1.0)], 4, 2, 8, 0, found)
    assert len(list(itertools.islice(mixed.rank_windows(0, 1), 20))) == 20
