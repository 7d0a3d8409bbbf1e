"""How often each row is read in an epoch, where a configuration weighs classes or rows."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mmdiff_ray.config import ConfigError, DataConfig
from mmdiff_ray.config.checks import unknown
from mmdiff_ray.data.manifest import Manifest, Shard
from mmdiff_ray.data.parquet import read_shard
from mmdiff_ray.storage.retry import retry

NO_CLASS = -1
READ_AT_ONCE = 16


class Frequencies(NamedTuple):
    """How often the R rows of a split are read. expected: float64 (R,), the mean number of times in an epoch,
    R in all; order: int32 (R,), the rows class by class."""

    expected: np.ndarray
    order: np.ndarray

    def counts(self, offset: float) -> np.ndarray:
        """Return how often each row is read in one epoch, int64 (R,), R in all: its expected number rounded
        up or down, and so for each class.

        This is systematic sampling: a row is read once for every whole number that the running sum of the
        expected numbers, class by class, passes. offset: where the sum begins, uniform in [0, 1).
        """
        rows = len(self.expected)
        sums = np.cumsum(self.expected[self.order])
        sums[sums == sums[-1]] = rows  # up to rounding; also of rows of weight 0 at the end
        passed = np.minimum(np.floor(sums + offset), rows).astype(np.int64)
        counts = np.empty(rows, np.int64)
        counts[self.order] = np.diff(passed, prepend=0)
        return counts


def row_frequencies(data: DataConfig, manifests: Sequence[Manifest]) -> list[Frequencies | None]:
    """Return how often the training rows of each data set are read; None: each row once.

    A class or row weighs against those of its own data set. Raises ConfigError for columns that no data set
    has or that are of another kind, for weights that are none, and for a data set that cannot be read.
    """
    wanted = {"data.balance": (data.balance, "label"), "data.weight": (data.weight, "vector")}
    for key, (column, kind) in wanted.items():
        if column is not None:
            _check_column(key, column, kind, manifests)
    return [
        _frequencies(source.uri, manifest, data)
        if {data.balance, data.weight} & {*manifest.columns}
        else None
        for source, manifest in zip(data.sources, manifests, strict=True)
    ]


def _check_column(key: str, column: str, kind: str, manifests: Sequence[Manifest]) -> None:
    entries = [manifest.columns[column] for manifest in manifests if column in manifest.columns]
    if not entries:
        known = dict.fromkeys(name for manifest in manifests for name in manifest.columns)
        raise ConfigError(unknown(key, column, list(known), "column"))
    for entry in entries:
        if entry["kind"] != kind or entry.get("dim", 1) != 1:
            what = "labels" if kind == "label" else "one number per row (kind vector)"
            held = f"{entry['kind']} of {entry['dim']} numbers" if "dim" in entry else entry["kind"]
            raise ConfigError(f"{key}: the column {column!r} is {held}; want {what}")


def _frequencies(uri: str, manifest: Manifest, data: DataConfig) -> Frequencies:
    """Return the frequencies of a data set. Rows without a class keep their share, and those without a weight
    weigh 1."""
    balance, weight = (name if name in manifest.columns else None for name in (data.balance, data.weight))
    columns = [name for name in (balance, weight) if name is not None]

    def read(shard: Shard) -> dict[str, list[Any]]:
        return retry(lambda: read_shard(uri, shard, columns), f"read {uri}")

    try:
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            parts = list(pool.map(read, manifest.splits["train"].shards))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.sources: cannot read {', '.join(columns)} of {uri}: {error}") from None
    weights = np.ones(manifest.splits["train"].rows)
    classes = np.full(len(weights), NO_CLASS)
    if weight is not None:
        weights[:] = [1.0 if value is None else value[0] for part in parts for value in part[weight]]
    if balance is not None:
        classes[:] = [NO_CLASS if value is None else value for part in parts for value in part[balance]]
    return expected_counts(weights, classes, uri)


def expected_counts(weights: np.ndarray, classes: np.ndarray, where: str) -> Frequencies:
    """Return frequencies in proportion to weights (R,), with which all classes come equally often.

    classes: int (R,), NO_CLASS for none. Raises ConfigError, naming `where`, for weights that are not 0 or
    more, or all 0.
    """
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise ConfigError(
            f"data.weight: a row of {where} has the weight {weights[wrong[0]]:g}, want 0 or more"
        )
    expected = weights.astype(np.float64)
    if not expected.sum() > 0:
        raise ConfigError(f"data.weight: all rows of {where} have the weight 0; want one above 0")
    if (known := classes != NO_CLASS).any():
        totals = np.bincount(classes[known], expected[known])
        share = totals.sum() / max(1, (totals > 0).sum())
        expected[known] *= np.divide(share, totals, out=np.zeros_like(totals), where=totals > 0)[
            classes[known]
        ]
    expected *= len(expected) / expected.sum()
    return Frequencies(expected, np.argsort(classes, kind="stable").astype(np.int32))
