"""What a sweep found: trials in order of merit, the best configurations, which dimensions matter."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ChangeConfig, Config
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.record import Record
from mmdiff_ray.sweeps.spec import Sweep
from mmdiff_ray.sweeps.study import as_frozen, plain_study

RESAMPLED = 24
"""Times that the trials are resampled for the interval of an importance."""
FEWEST = 6
"""Trials below which no importance is told."""
AT_END = ", at the end"
"""Said of values where a population changed them on the way."""


def figures_of(trial: Trial) -> dict[str, float]:
    """Return a trial's last figures, none where it reported nothing."""
    return dict(trial.reports[-1]["figures"]) if trial.reports else {}


def best_first(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that finished, the best by the leading metric first, then those that were stopped, by
    how far they came."""
    sign = -1 if sweep.metrics[sweep.main] == "max" else 1

    def merit(trial: Trial) -> tuple[bool, int, float]:
        value = figures_of(trial).get(sweep.main, float("inf") * sign)
        ended = trial.outcome == "finished"
        return not ended, 0 if ended else -trial.samples, sign * value

    return sorted(trials, key=merit)


def finished(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that finished and have every metric, the best by the leading one first."""
    return [
        trial
        for trial in best_first(sweep, trials)
        if trial.outcome == "finished" and sweep.metrics.keys() <= figures_of(trial).keys()
    ]


def front(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto front, the best by the leading metric first: the finished trials of which no other
    is as good in every metric and better in one."""
    done = finished(sweep, trials)
    signs = np.array([1 if way == "max" else -1 for way in sweep.metrics.values()])
    points = {trial.number: signs * [figures_of(trial)[m] for m in sweep.metrics] for trial in done}
    return [
        trial
        for trial in done
        if not any(
            (points[other.number] >= points[trial.number]).all()
            and (points[other.number] > points[trial.number]).any()
            for other in done
        )
    ]


def leading(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return the finished trials that a sweep recommends, the first one most of all: the front of several
    metrics, or all by the only one."""
    return front(sweep, trials) if len(sweep.metrics) > 1 else finished(sweep, trials)


def best_of(sweep: Sweep, trials: Sequence[Trial]) -> Trial:
    """Return the one trial that stands out in pictures: the first that leads; where none has finished, that
    which came farthest."""
    return [*leading(sweep, trials), *best_first(sweep, trials)][0]


def trained_config(record: Record, trial: Trial) -> Config | None:
    """Return the configuration that a trial trained with, its changes on the way written out, to train again
    with `mmdiff train`; None where MLflow does not hold it."""
    config = record.configs.get(trial.number)
    if config is None:
        return None
    # A member of a population that copied another began as that one did.
    words = [configuration.override(key, value) for key, value in trial.values.items()]
    config = configuration.load((), words, configuration.to_plain(config))
    changes = [ChangeConfig(change["at"], change["values"]) for change in trial.changes if change["values"]]
    defaults = Config()
    return dataclasses.replace(
        config,
        name=f"{record.sweep.name}-{trial.number}",
        runs=defaults.runs,
        train=dataclasses.replace(config.train, changes=changes),
        tracking=defaults.tracking,
        checkpoint=dataclasses.replace(config.checkpoint, keep_last=defaults.checkpoint.keep_last),
    )


@dataclass(frozen=True)
class Importance:
    """How much of the variance of a metric a dimension explains.

    share: in [0, 1]; low, high: the middle 90 % over resampled trials.
    """

    key: str
    share: float
    low: float
    high: float


def importances(sweep: Sweep, trials: Sequence[Trial], metric: str, seed: int = 0) -> list[Importance]:
    """Return the importance of every dimension for a metric, the largest first; none for too few trials.

    By fANOVA (Hutter et al., ICML 2014, as Optuna computes it), with all trials judged after the same number
    of samples: the largest that half of them came to. The interval is over bootstrap resamples of the trials.
    None for a population: what its members came to is also the work of the values that they had before.
    """
    if sweep.scheduler.name == "pbt":
        return []
    drawn = [trial for trial in trials if not sweep.is_baseline(trial.number)]
    judged = at_same_samples([trial for trial in drawn if metric in figures_of(trial)])
    if len(judged) < FEWEST or len(sweep.space) < 2:
        return []
    whole = _shares(sweep, judged, metric, seed)
    rng = np.random.default_rng(seed)
    resampled: dict[str, list[float]] = {key: [] for key in whole}
    for turn in range(RESAMPLED):
        picked = [judged[index] for index in rng.integers(len(judged), size=len(judged))]
        for key, share in _shares(sweep, picked, metric, seed + 1 + turn).items():
            resampled.setdefault(key, []).append(share)
    found = []
    for key, share in whole.items():
        low, high = np.quantile(resampled[key], [0.05, 0.95]) if resampled[key] else (0.0, 1.0)
        found.append(Importance(key, share, float(low), float(high)))
    return sorted(found, key=lambda importance: -importance.share)


def at_same_samples(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that came to the largest number of samples that half of them came to, as they were
    there."""
    counts: dict[int, int] = {}
    for trial in trials:
        for report in trial.reports:
            counts[report["samples"]] = counts.get(report["samples"], 0) + 1
    common = max((samples for samples, count in counts.items() if 2 * count >= len(trials)), default=None)
    found = []
    for trial in trials:
        reports = [report for report in trial.reports if common is not None and report["samples"] <= common]
        if reports and reports[-1]["samples"] == common:
            found.append(dataclasses.replace(trial, reports=reports))
    return found


def _shares(sweep: Sweep, trials: Sequence[Trial], metric: str, seed: int) -> dict[str, float]:
    """Return dimension -> share, for those that every trial has (Optuna's fANOVA knows no others)."""
    single = dataclasses.replace(sweep, metrics={metric: sweep.metrics[metric]})
    study = plain_study(single.metrics)
    for trial in trials:
        ended = dataclasses.replace(trial, outcome="finished")
        study.add_trial(as_frozen(single, ended))
    if len({round(figures_of(trial)[metric], 12) for trial in trials}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
            return optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # nothing varies in common
            return {}


def top(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return the best quarter of the finished trials that are points of the space, at least three of them."""
    done = [trial for trial in finished(sweep, trials) if not sweep.is_baseline(trial.number)]
    return done[: max(3, len(done) // 4)]


def ranges(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """Return dimension -> the lowest and highest value that some trials ended with, or those of a list."""
    found: dict[str, list[Any]] = {}
    for key, dimension in sweep.space.items():
        values = [trial.now[key] for trial in trials if key in trial.now]
        if values and not dimension.values:
            found[key] = [min(values), max(values)]
        elif values:
            found[key] = list(dict.fromkeys(map(str, values)))
    return found
