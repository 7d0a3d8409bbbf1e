"""Conversion of a sweep to Optuna: its space, sampler and trials."""

import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.space import Dimension
from mmdiff_ray.sweeps.spec import Sweep

STATES = {
    "finished": optuna.trial.TrialState.COMPLETE,
    "stopped": optuna.trial.TrialState.PRUNED,
    "diverged": optuna.trial.TrialState.FAIL,
    "failed": optuna.trial.TrialState.FAIL,
}


def distribution(dimension: Dimension) -> Any:
    """Return Optuna's distribution of a dimension."""
    if dimension.values:
        return CategoricalDistribution([hashable(value) for value in dimension.values])
    if dimension.kind == "randint":
        return IntDistribution(int(dimension.low), int(dimension.high))
    return FloatDistribution(dimension.low, dimension.high, log=dimension.kind == "loguniform")


def hashable(value: Any) -> Any:
    """Return a value of a choice as Optuna accepts it: lists become text."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def make_study(sweep: Sweep, begun: int = 0) -> optuna.Study:
    """Return an empty study of a sweep's metrics, with its sampler.

    begun: number of trials that earlier drivers started; it changes the sampler's seed, so draws do not
    repeat.
    """
    seed = sweep.seed + 1_000_003 * begun
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    sampler: Any = optuna.samplers.RandomSampler(seed=seed)
    if sweep.searcher.name == "tpe":
        startup = sweep.searcher.startup
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
        )
    if sweep.searcher.name == "nsga2":
        sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=10)
    return plain_study(sweep.metrics, sampler)


def plain_study(metrics: Mapping[str, str], sampler: Any = None) -> optuna.Study:
    """Return an empty study without log output. metrics: metric -> min or max."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions: Any = ["maximize" if way == "max" else "minimize" for way in metrics.values()]
    return optuna.create_study(directions=directions, sampler=sampler)


def as_frozen(sweep: Sweep, trial: Trial) -> optuna.trial.FrozenTrial:
    """Return an ended trial as Optuna's FrozenTrial, with the matching state.

    Optuna does not support pruned trials with several metrics: such a trial counts as complete with its last
    figures.
    """
    assert trial.outcome is not None
    state, several = STATES[trial.outcome], len(sweep.metrics) > 1
    values = [trial.figures[metric] for metric in sweep.metrics] if trial.reports else None
    if state == optuna.trial.TrialState.PRUNED and several:
        state = optuna.trial.TrialState.COMPLETE
    if values is None or any(value != value for value in values):
        state, values = optuna.trial.TrialState.FAIL, None
    steps = {report["samples"]: report["figures"][sweep.main] for report in trial.reports}
    known = {key: distribution(sweep.space[key]) for key in trial.values if key in sweep.space}
    return optuna.create_trial(
        state=state,
        params={key: hashable(trial.values[key]) for key in known},
        distributions=known,
        values=values if state == optuna.trial.TrialState.COMPLETE else None,
        intermediate_values={} if several else steps,
        user_attrs={"number": trial.number, "outcome": trial.outcome},
    )
