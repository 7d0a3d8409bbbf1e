"""Findings of a sweep: ranking, Pareto front, importance of dimensions, and the best configurations."""

import dataclasses
import math
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

RESAMPLES = 24
"""Bootstrap resamples for the interval of an importance."""
FEWEST = 6
"""Fewest trials for which importances are computed."""


def best_first(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return all trials: finished ones by the main metric, best first, then the rest by samples seen."""

    def rank(trial: Trial) -> tuple[bool, int, float]:
        value = trial.figures.get(sweep.main, -sweep.sign * math.inf)
        is_finished = trial.outcome == "finished"
        return not is_finished, 0 if is_finished else -trial.samples, -sweep.sign * value

    return sorted(trials, key=rank)


def finished(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return the finished trials that have every metric, best first by the main metric."""
    return [
        trial
        for trial in best_first(sweep, trials)
        if trial.outcome == "finished" and sweep.metrics.keys() <= trial.figures.keys()
    ]


def front(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto front of the finished trials, best first by the main metric.

    A trial is on the front if no other is at least as good in every metric and better in one.
    """
    done = finished(sweep, trials)
    signs = np.array([1 if way == "max" else -1 for way in sweep.metrics.values()])
    values = [[trial.figures[metric] for metric in sweep.metrics] for trial in done]
    points = signs * np.reshape(values, (-1, len(signs)))
    return [
        trial
        for trial, point in zip(done, points, strict=True)
        if not ((points >= point).all(1) & (points > point).any(1)).any()
    ]


def leading(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return candidates for retraining, best first: the Pareto front, or all finished for one metric."""
    return front(sweep, trials) if len(sweep.metrics) > 1 else finished(sweep, trials)


def groups(sweep: Sweep, trials: Sequence[Trial]) -> dict[int, str]:
    """Return trial number -> group: `best`, `on the front`, `base configuration` or the outcome."""
    found = {trial.number: trial.outcome or "unfinished" for trial in trials}
    found |= {number: "base configuration" for number in found if sweep.is_baseline(number)}
    several = len(sweep.metrics) > 1
    best = leading(sweep, trials)[: None if several else 1]
    return found | {trial.number: "on the front" if several else "best" for trial in best}


def trained_config(record: Record, trial: Trial) -> Config | None:
    """Return the configuration that repeats a trial with `mmdiff train`, or None if MLflow has none.

    Changes by population based training become `train.changes`.
    """
    config = record.configs.get(trial.number)
    if config is None:
        return None
    # A copy replaces a trial's initial values with the donor's, but its recorded configuration stays.
    overrides = [configuration.override(key, value) for key, value in trial.values.items()]
    config = configuration.load((), overrides, configuration.to_plain(config))
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
    """The fraction of a metric's variance that a dimension explains.

    share: in [0, 1]; low, high: 90 % interval over bootstrap resamples of the trials.
    """

    key: str
    share: float
    low: float
    high: float


def importances(sweep: Sweep, trials: Sequence[Trial], metric: str, seed: int = 0) -> list[Importance]:
    """Return the importance of every dimension for a metric, largest first.

    Compares all trials at the same number of samples. Empty if there are too few trials, and for population
    based training, because the final metric also depends on earlier values. Source: fANOVA (Hutter et al.,
    ICML 2014) in Optuna.
    """
    if sweep.scheduler.name == "pbt":
        return []
    drawn = [trial for trial in trials if not sweep.is_baseline(trial.number)]
    judged = at_same_samples([trial for trial in drawn if metric in trial.figures])
    if len(judged) < FEWEST or len(sweep.space) < 2:
        return []
    rng = np.random.default_rng(seed)
    resamples: dict[str, list[float]] = {}
    for turn in range(RESAMPLES):
        picked = [judged[index] for index in rng.integers(len(judged), size=len(judged))]
        for key, share in _shares(sweep, picked, metric, seed + 1 + turn).items():
            resamples.setdefault(key, []).append(share)
    found = []
    for key, share in _shares(sweep, judged, metric, seed).items():
        low, high = np.quantile(resamples.get(key, [0.0, 1.0]), [0.05, 0.95])
        found.append(Importance(key, share, float(low), float(high)))
    return sorted(found, key=lambda importance: -importance.share)


def at_same_samples(trials: Sequence[Trial]) -> list[Trial]:
    """Cut trials at the largest number of samples that at least half of them reached."""
    reached = [{report["samples"] for report in trial.reports} for trial in trials]
    common = max(
        (n for n in set().union(*reached) if 2 * sum(n in r for r in reached) >= len(trials)), default=0
    )
    return [
        dataclasses.replace(trial, reports=[r for r in trial.reports if r["samples"] <= common])
        for trial, samples in zip(trials, reached, strict=True)
        if common in samples
    ]


def _shares(sweep: Sweep, trials: Sequence[Trial], metric: str, seed: int) -> dict[str, float]:
    """Return dimension -> share. Optuna's fANOVA supports only dimensions that every trial has."""
    if len({round(trial.figures[metric], 12) for trial in trials}) < 2:
        return {}
    single = dataclasses.replace(sweep, metrics={metric: sweep.metrics[metric]})
    study = plain_study(single.metrics)
    study.add_trials([as_frozen(single, dataclasses.replace(trial, outcome="finished")) for trial in trials])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
            return optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # no dimension varies in all trials
            return {}


def top(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return the best quarter of the finished trials, at least three, without the base configuration."""
    done = [trial for trial in finished(sweep, trials) if not sweep.is_baseline(trial.number)]
    return done[: max(3, len(done) // 4)]


def ranges(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """Return dimension -> [lowest, highest] final value of the trials, or all values of a choice."""
    found: dict[str, list[Any]] = {}
    for key, dimension in sweep.space.items():
        values = [trial.now[key] for trial in trials if key in trial.now]
        if values and not dimension.values:
            found[key] = [min(values), max(values)]
        elif values:
            found[key] = list(dict.fromkeys(map(str, values)))
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return key -> its shortest unique suffix of two or more parts.

    A suffix must not look like a key of another section: `modalities.alpha`, short for
    `loss.modalities.alpha`, would read as a modality. Keys in `modalities` and `tasks` keep the section name.
    """
    sections = {field.name for field in dataclasses.fields(Config)}
    names = {}
    for key in keys:
        parts = key.split(".")
        fewest = len(parts) - 1 if parts[0] in ("modalities", "tasks") else 2
        ends = [".".join(parts[-n:]) for n in range(fewest, len(parts)) if parts[-n] not in sections]
        unique = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
        names[key] = next(unique, key)
    return names
