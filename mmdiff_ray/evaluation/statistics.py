"""How sure a figure is: figures as sums over rows, and intervals over rows (bootstrap) and seeds (t)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

DRAWS = 2000
FEWEST_SEEDS = 3
"""From how many seeds on an interval is made of their spread alone."""
METHOD = (
    "bootstrapped over rows; those of several seeds have their spread besides, by the t distribution. "
    "Figures that are not sums over rows, such as Frechet distances, have them over seeds alone, from "
    f"{FEWEST_SEEDS} on"
)
"""How intervals are made, for a reader of results."""
Weighted = Callable[[np.ndarray], np.ndarray]
"""A figure where rows count as often as the weights say: (m, n) -> (m,)."""


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
    """Return the mean over seeds and its interval, over seeds and rows (see `_interval`)."""
    return _interval([[tally.weighted for tally in seeds]], len(seeds[0]), draws, seed)


def difference(ours: Sequence[Tally], others: Sequence[Tally], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Return the mean of ours - others and its interval, over seeds and rows (see `_interval`).

    Both hold the same rows in the same order, one tally per seed; as many seeds on both sides are paired in
    their order, others are not. A single tally has no spread over seeds (a rule without a model). Raises
    ValueError for tallies of different rows.
    """
    rows = {len(tally) for tally in (*ours, *others)}
    if len(rows) != 1:
        raise ValueError(f"only figures of the same rows can be compared; got {sorted(rows)} rows")
    if len(ours) == len(others):
        groups = [[_minus(a, b) for a, b in zip(ours, others, strict=True)]]
    else:
        nothing = Tally(np.zeros(len(ours[0])), np.ones(len(ours[0])))
        groups = [[tally.weighted for tally in ours], [_minus(nothing, tally) for tally in others]]
    return _interval(groups, rows.pop(), draws, seed)


def over_seeds(values: Sequence[float]) -> Interval:
    """Return the mean of one value per seed and its 95 % interval by the t distribution, over seeds alone."""
    mean = float(np.mean(values))
    half = float(np.sqrt(_seeds_part([np.asarray(values, dtype=np.float64)])))
    return Interval(mean, mean - half, mean + half)


def _minus(first: Tally, second: Tally) -> Weighted:
    return lambda weights: first.weighted(weights) - second.weighted(weights)


def _interval(groups: Sequence[Sequence[Weighted]], rows: int, draws: int, seed: int) -> Interval:
    """Return the interval of a sum over groups of the mean over their figures, one figure per seed.

    Of a seed each: the percentile bootstrap over rows, which all figures share. Of S seeds: the spread s of
    the seeds' figures besides, as t(S - 1) s / sqrt(S) (of two groups by Welch), since resampling so few
    understates their spread. It holds what every seed adds of its own on these rows, too, so of the rows'
    part only the share that all seeds have in common is added, in quadrature, on each side; never less than
    the rows alone.

    Source: Banerjee (1960), sum of t^2 times variance, which keeps the level at any ratio of the variances;
    Zou and Donner (2008) for sides of different lengths.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=draws)
    weights = np.concatenate([np.ones((1, rows)), drawn])  # every row once, then as drawn
    found = [np.stack([figure(weights) for figure in group]) for group in groups]  # (seeds, 1 + draws) each
    means = np.sum([values.mean(0) for values in found], 0)
    value, (low, high) = float(means[0]), np.nanpercentile(means[1:], [2.5, 97.5])
    several = [values for values in found if len(values) > 1]
    if not several:
        return Interval(value, float(low), float(high))
    own = sum(np.nanmean((values[:, 1:] - values[:, :1]).var(0, ddof=1)) / len(values) for values in several)
    over_rows = np.nanvar(means[1:])
    common = max(0.0, 1 - own / over_rows) if over_rows > 0 else 0.0
    seeds_part = _seeds_part([values[:, 0] for values in several])
    below, above = (
        float(max(side, np.sqrt(common * side**2 + seeds_part))) for side in (value - low, high - value)
    )
    return Interval(value, value - below, value + above)


def _seeds_part(groups: Sequence[np.ndarray]) -> float:
    """Return the square of half the 95 % interval of a sum of means over seeds: t by Welch (1947)."""
    variances = np.array([values.var(ddof=1) / len(values) for values in groups])
    if not variances.any():
        return 0.0
    shares = variances / variances.sum()
    freedom = 1 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, groups, strict=True))
    return float(stats.t.ppf(0.975, freedom) ** 2 * variances.sum())
