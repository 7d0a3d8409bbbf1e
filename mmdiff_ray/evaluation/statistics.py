"""Confidence intervals of figures that are sums over rows: bootstrap over rows, t distribution over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

DRAWS = 2000
FEWEST_SEEDS = 3
"""Fewest seeds for an interval from their spread only."""
METHOD = (
    "bootstrapped over rows; with several seeds they also cover the spread over seeds, by the t "
    "distribution. Figures that are not sums over rows, such as Frechet distances, have intervals over seeds "
    f"only, with {FEWEST_SEEDS} or more seeds"
)
"""How intervals are computed, for readers of results."""
Weighted = Callable[[np.ndarray], np.ndarray]
"""A figure as a function of the weights of its rows: (m, n) -> (m,)."""


@dataclass(frozen=True)
class Tally:
    """A figure as sums over rows: the mean over classes of sum(numerator) / sum(denominator).

    numerator, denominator: float64 (n,) or, for a mean over K classes, (n, K). For example, the denominator
    of a plain mean is 1, that of a mean over hole pixels is their count, and mean IoU has intersections and
    unions. Classes with a denominator of 0 are ignored. ids: int64 (n,), the row of each entry; entries of
    the same row are resampled together. Without ids, every entry is a separate row.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.numerator.shape != self.denominator.shape:
            raise ValueError(
                f"numerator {self.numerator.shape} and denominator {self.denominator.shape} differ"
            )

    def __len__(self) -> int:
        return len(self.numerator)

    @property
    def value(self) -> float:
        """The figure; NaN if all denominators are 0."""
        return float(self.weighted(np.ones((1, len(self))))[0])

    def weighted(self, weights: np.ndarray) -> np.ndarray:
        """Return the figure under m weightings of the rows, (m,). weights: (m, n)."""
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


def by_row(tallies: Sequence[Tally]) -> list[Tally]:
    """Align tallies: one entry per row, the same rows in the same order.

    Sums entries of the same row; a row that is missing in a tally (another fold) becomes 0 / 0, which changes
    no figure. Returns the tallies unchanged if any has no ids.
    """
    known = [tally.ids for tally in tallies if tally.ids is not None]
    if len(known) < len(tallies):
        return list(tallies)
    place = {row: number for number, row in enumerate(dict.fromkeys(np.concatenate(known).tolist()))}
    found = []
    for tally, ids in zip(tallies, known, strict=True):
        entries = [place[row] for row in ids.tolist()]
        above, below = (np.zeros((len(place), *tally.numerator.shape[1:])) for _ in range(2))
        np.add.at(above, entries, tally.numerator)
        np.add.at(below, entries, tally.denominator)
        found.append(Tally(above, below, np.array(list(place))))
    return found


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Estimate:
    """A value and the parts of its intervals.

    rows: (draws,) bootstrap values over rows; empty for an interval over seeds alone. common: the fraction of
    their variance that is common to all seeds. seeds: variance of the mean over seeds, 0 for one seed;
    freedom: its degrees of freedom.
    """

    value: float
    rows: np.ndarray
    common: float = 1.0
    seeds: float = 0.0
    freedom: float = 1.0

    def interval(self, level: float = 0.95) -> Interval:
        """Return the two-sided interval at a level."""
        from scipy.special import stdtrit  # imported here, because every worker imports this module

        tail = (1 - level) / 2
        low = high = self.value
        if len(self.rows):
            low, high = np.nanpercentile(self.rows, [100 * tail, 100 * (1 - tail)])
        seeds = self.seeds and stdtrit(self.freedom, 1 - tail) ** 2 * self.seeds
        below, above = (
            float(max(side, np.sqrt(self.common * side**2 + seeds))) if seeds else float(side)
            for side in (self.value - low, high - self.value)
        )
        return Interval(self.value, self.value - below, self.value + above)

    def p_below(self, bound: float = 0.0) -> float:
        """Return the one-sided p-value for the claim that the value is below a bound.

        It is the smallest tail whose interval is below the bound, at least 1 / draws.
        """
        if self.value > bound:
            return 1 - replace(self, value=-self.value, rows=-self.rows).p_below(-bound)
        low, high = 1 / len(self.rows) if len(self.rows) else 1e-12, 0.5
        for _ in range(40):
            middle = float(np.sqrt(low * high))
            excluded = self.interval(1 - 2 * middle).high < bound
            low, high = (low, middle) if excluded else (middle, high)
        return high


def interval(seeds: Sequence[Tally], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Return the mean over seeds and its interval, over seeds and rows (see `_estimate`)."""
    seeds = by_row(seeds)
    return _estimate([[tally.weighted for tally in seeds]], len(seeds[0]), draws, seed).interval()


def difference(ours: Sequence[Tally], others: Sequence[Tally], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Return the mean of ours - others and its interval (see `compare`)."""
    return compare(ours, others, draws=draws, seed=seed).interval()


def compare(
    ours: Sequence[Tally], others: Sequence[Tally], factor: float = 1.0, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Return the mean of ours - factor * others, over seeds and rows (see `_estimate`).

    One tally per seed. With equally many seeds on both sides, seeds are paired in order and must have the
    same rows. Tallies without ids must have the same rows in the same order. A single
    tally (a rule without a model) has no spread over seeds. Raises ValueError for tallies of different rows.
    """
    if len(ours) == len(others):
        for one, other in zip(ours, others, strict=True):
            if one.ids is not None and other.ids is not None and set(one.ids) != set(other.ids):
                raise ValueError("figures must have the same rows; the ids differ")
    aligned = by_row([*ours, *others])
    ours, others = aligned[: len(ours)], aligned[len(ours) :]
    rows = {len(tally) for tally in (*ours, *others)}
    if len(rows) != 1:
        raise ValueError(f"figures must have the same rows; got {sorted(rows)} rows")
    others = [Tally(factor * tally.numerator, tally.denominator) for tally in others]
    if len(ours) == len(others):
        groups = [[_minus(a, b) for a, b in zip(ours, others, strict=True)]]
    else:
        nothing = Tally(np.zeros(len(ours[0])), np.ones(len(ours[0])))
        groups = [[tally.weighted for tally in ours], [_minus(nothing, tally) for tally in others]]
    return _estimate(groups, rows.pop(), draws, seed)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean of one value per seed, with the t distribution over seeds only."""
    variance, freedom = _seeds_part([np.asarray(values, dtype=np.float64)])
    return Estimate(float(np.mean(values)), np.empty(0), 0.0, variance, freedom)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests, controlling the family-wise error rate.

    Source: Holm (1979), a simple sequentially rejective multiple test procedure.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = largest
    return corrected


def _minus(first: Tally, second: Tally) -> Weighted:
    return lambda weights: first.weighted(weights) - second.weighted(weights)


def _estimate(groups: Sequence[Sequence[Weighted]], rows: int, draws: int, seed: int) -> Estimate:
    """Return the sum over groups of the mean over their figures, one figure per seed.

    With one seed per group, the interval is the percentile bootstrap over rows, which all figures share. With
    S seeds, it also covers their standard deviation s, as t(S - 1) s / sqrt(S) (Welch for two groups),
    because a bootstrap over so few seeds understates their spread. s already includes the variance that
    differs between seeds on these rows, so only the row variance common to all seeds is added, in quadrature,
    on each side. The interval is never narrower than that over rows only.

    Source: Banerjee (1960), sum of t^2 times variance, which keeps the level at any ratio of the variances;
    Zou and Donner (2008) for sides of different lengths.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=draws)
    weights = np.concatenate([np.ones((1, rows)), drawn])  # first draw: every row once
    found = [np.stack([figure(weights) for figure in group]) for group in groups]  # (seeds, 1 + draws) each
    means = np.sum([values.mean(0) for values in found], 0)
    several = [values for values in found if len(values) > 1]
    if not several:
        return Estimate(float(means[0]), means[1:])
    own = sum(np.nanmean((values[:, 1:] - values[:, :1]).var(0, ddof=1)) / len(values) for values in several)
    over_rows = np.nanvar(means[1:])
    common = max(0.0, 1 - own / over_rows) if over_rows > 0 else 0.0
    variance, freedom = _seeds_part([values[:, 0] for values in several])
    return Estimate(float(means[0]), means[1:], float(common), variance, freedom)


def _seeds_part(groups: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the variance of a sum of means over seeds, and its degrees of freedom by Welch (1947)."""
    variances = np.array([values.var(ddof=1) / len(values) for values in groups])
    if not variances.any():
        return 0.0, 1.0
    shares = variances / variances.sum()
    freedom = 1 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, groups, strict=True))
    return float(variances.sum()), float(freedom)
