"""How sure a figure is: figures as sums over rows, and paired bootstrap intervals over rows and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Tally:
    """A figure in parts that add up over rows: the mean over classes of sum(numerator) / sum(denominator).

    numerator, denominator: float64 (n,) or, for a mean over K classes, (n, K). A plain mean has a denominator
    of 1, a mean over the pixels of holes their count, mean IoU intersections and unions. Classes that no row
    holds (denominator 0) do not count.
    """

    numerator: np.ndarray
    denominator: np.ndarray

    def __post_init__(self) -> None:
        if self.numerator.shape != self.denominator.shape:
            raise ValueError(
                f"numerator {self.numerator.shape} and denominator {self.denominator.shape} differ"
            )

    def __len__(self) -> int:
        return len(self.numerator)

    @property
    def value(self) -> float:
        """Return the figure; NaN without anything to measure."""
        return float(self.weighted(np.ones((1, len(self))))[0])

    def weighted(self, weights: np.ndarray) -> np.ndarray:
        """Return the figure where rows count as often as the weights say. weights: (m, n); returns (m,)."""
        above, below = (
            weights @ part.reshape(len(self), -1).astype(np.float64)
            for part in (self.numerator, self.denominator)
        )
        ratio = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
        known = ~np.isnan(ratio)
        total = np.where(known, ratio, 0).sum(1)
        return np.divide(total, known.sum(1), out=np.full(len(ratio), np.nan), where=known.any(1))


def mean_of(values: np.ndarray) -> Tally:
    """Return the tally of a plain mean over rows. values: (n,)."""
    values = np.asarray(values, dtype=np.float64)
    return Tally(values, np.ones_like(values))


class Interval(NamedTuple):
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Return whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def interval(seeds: Sequence[Tally], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Return the mean over seeds and its percentile bootstrap interval, over seeds and rows."""
    return _interval([tally.weighted for tally in seeds], len(seeds[0]), draws, seed)


def difference(ours: Sequence[Tally], others: Sequence[Tally], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Return the mean of ours - others and its paired bootstrap interval, over seeds and rows.

    Both hold the same rows in the same order, one tally per seed; where they have different numbers of seeds,
    these are drawn independently (a rule without a model has one), otherwise together. Raises ValueError for
    tallies of different rows.
    """
    rows = {len(tally) for tally in (*ours, *others)}
    if len(rows) != 1:
        raise ValueError(f"only figures of the same rows can be compared; got {sorted(rows)} rows")
    if len(ours) == len(others):
        pairs = [
            lambda weights, a=a, b=b: a.weighted(weights) - b.weighted(weights)
            for a, b in zip(ours, others, strict=True)
        ]
    else:
        pairs = [
            lambda weights, a=a, b=b: a.weighted(weights) - b.weighted(weights) for a in ours for b in others
        ]
    return _interval(pairs, rows.pop(), draws, seed)


def _interval(figures: Sequence, rows: int, draws: int, seed: int) -> Interval:  # type: ignore[type-arg]
    """Return the interval of a mean of figures, each a function of the rows' weights."""
    generator = np.random.default_rng(seed)
    whole = np.ones((1, rows))
    value = float(np.mean([figure(whole)[0] for figure in figures]))
    weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=draws).astype(np.float64)
    drawn = np.stack([figure(weights) for figure in figures])  # (seeds, draws)
    chosen = generator.integers(len(figures), size=(len(figures), draws))
    means = np.take_along_axis(drawn, chosen, axis=0).mean(0)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return Interval(value, float(low), float(high))
