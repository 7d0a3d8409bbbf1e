"""Columns of maps and sets of labels: what comes back, what is counted, what is refused."""

import io

import numpy as np
import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.shards import ShardWriter
from tests.datasets.reading import read_rows

LATENT = {"kind": "latent", "codec_folder": "codec", "codec_digest": "ab"}
MAP = {"kind": "map", "range": [0, 5]}
LABELS = {"kind": "labels", "names": ["a", "b", "c"]}


def written(uri: str, facts: dict, values: list):
    """Write values as the rows of one column `it`, and return its manifest's entry and them as read."""
    writer = ShardWriter(uri, "toy", {"it": facts}, rows_per_group=2)
    for index, value in enumerate(values):
        writer.add({"key": f"{index:03d}", "it": value})
    entry = writer.close().columns["it"]
    return entry, [row["it"] for _, row in sorted(read_rows(uri).items())]


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_maps_come_back_in_their_own_type(tmp_path, kind):
    values = np.random.default_rng(0).uniform(0, 5, (5, 2, 3, 4)).astype(kind)
    values[1, :, 0] = np.nan
    entry, read = written(str(tmp_path / "set"), MAP, [*values, None])
    assert (entry["channels"], entry["size"], entry["present"]) == (2, [3, 4], 5)
    assert entry["known_share"] == pytest.approx(1 - 8 / 120, abs=1e-6)
    assert read[5] is None
    for stored, value in zip(read, values, strict=False):
        loaded = np.load(io.BytesIO(stored))
        assert loaded.dtype == kind and np.array_equal(loaded, value, equal_nan=True)


def test_sets_of_labels_come_back_in_order_and_are_counted(tmp_path):
    values = [["c", "a"], [], None, [1, 1, 2], ("b",)]
    entry, read = written(str(tmp_path / "set"), LABELS, values)
    assert read == [[0, 2], [], None, [1, 2], [1]]
    assert entry["counts"] == [1, 2, 2] and entry["present"] == 4


@pytest.mark.parametrize(
    ("facts", "value", "message"),
    [
        ({"kind": "map"}, None, r"needs range, \[lowest, highest\]; got None"),
        ({"kind": "map", "range": [2, 1]}, None, r"got \[2, 1\]"),
        (MAP, np.zeros((1, 2, 2)), "float16 or float32 .* got float64"),
        (MAP, np.zeros((2, 2), np.float32), r"got float32 of shape \(2, 2\)"),
        (MAP, np.full((1, 2, 2), 6, np.float32), "spans 6 to 6, outside its range 0 to 5"),
        (MAP, np.full((1, 2, 2), np.inf, np.float32), "spans inf to inf"),
        ({"kind": "vector", "names": ["x", "y"]}, [1, 2, 3], "dim is 3, want 2"),
        ({"kind": "vector"}, [1, float("nan")], "a value of kind vector must be finite"),
        (LATENT, np.zeros((2, 4, 3, 3)), "float16 .* got float64"),
        (LATENT, np.zeros((1, 4, 3, 3), np.float16), r"got float16 of shape \(1, 4, 3, 3\)"),
        (LATENT, np.full((2, 4, 3, 3), np.inf, np.float16), "latents must be finite"),
        ({"kind": "labels"}, None, "needs `names`"),
        (LABELS, "ab", "must be a list of names or indices, got 'ab'"),
        (LABELS, 1, "must be a list"),
        (LABELS, ["a", "d"], "unknown label 'd'"),
        (LABELS, [3], "unknown label 3"),
        ({**MAP, "channels": 3}, np.zeros((1, 2, 2), np.float32), "channels is 1, want 3"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, facts, value, message):
    with pytest.raises(ConfigError, match=message):
        written(str(tmp_path / "set"), facts, [value])
