"""Schedulers of a sweep: Ray Tune's, with the reports of earlier drivers replayed."""

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from ray.tune import Stopper

from mmdiff_ray.distributed.tune.searcher import explored
from mmdiff_ray.distributed.tune.trial import SCORE, score
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.space import Make
from mmdiff_ray.sweeps.spec import Sweep


def make_scheduler(sweep: Sweep, make: Make, known: list[Trial]) -> Any:
    """Return Ray Tune's scheduler of a sweep. known: earlier trials, whose reports are replayed."""
    from ray.tune import schedulers

    options, period, total = sweep.scheduler, sweep.period, sweep.budget.samples
    grace = max(period, -(-int(options.grace * total) // period) * period)
    if options.name == "fifo":
        return schedulers.FIFOScheduler()
    if options.name == "pbt":
        return schedulers.PopulationBasedTraining(
            time_attr="samples_seen",
            perturbation_interval=period,
            burn_in_period=grace - period,
            hyperparam_mutations={"values": {key: _mutation(d) for key, d in sweep.space.items()}},
            quantile_fraction=options.quantile,
            resample_probability=options.resample,
            custom_explore_fn=partial(explored, sweep, make, seed=sweep.seed),
            log_config=False,
        )
    if options.name == "asha":
        made: Any = schedulers.ASHAScheduler(
            time_attr="samples_seen",
            max_t=10 * total,  # never reached: trials end on their own
            grace_period=grace,
            reduction_factor=options.reduction,
        )
    else:
        made = schedulers.MedianStoppingRule(
            time_attr="samples_seen", grace_period=grace, min_samples_required=3
        )
    made.set_search_properties(SCORE, "max")
    replay(made, sweep, known)
    made.set_search_properties = lambda metric, mode, **spec: True  # Tune would set them again, which fails
    return _keep_baseline(made, sweep)


def _keep_baseline(scheduler: Any, sweep: Sweep) -> Any:
    """Let a scheduler compare the baseline with other trials without ever stopping it."""
    decide = scheduler.on_trial_result

    def on_trial_result(controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = decide(controller, trial, result)
        if not sweep.is_baseline(result["number"]):
            return decision
        getattr(scheduler, "_stopped_trials", set()).discard(trial)  # else the median rule would exclude it
        return scheduler.CONTINUE

    scheduler.on_trial_result = on_trial_result
    return scheduler


def replay(scheduler: Any, sweep: Sweep, known: list[Trial]) -> None:
    """Replay the reports of ended trials, so that a scheduler's rungs survive a restart of the driver."""
    for trial in known:
        if trial.outcome in (None, "failed", "diverged"):
            continue
        stand_in = SimpleNamespace(trial_id=f"before-{trial.number}")
        scheduler.on_trial_add(None, stand_in)
        for report in trial.reports:
            result = {SCORE: score(sweep, report["figures"]), "samples_seen": report["samples"]}
            scheduler.on_trial_result(_NoController, stand_in, result)


class _NoController:
    """The controller of a replay, which has no live trials."""

    @staticmethod
    def get_live_trials() -> list[Any]:
        return []


def _mutation(dimension: Any) -> Any:
    from ray import tune

    if dimension.values:
        return list(dimension.values)
    if dimension.kind == "randint":
        return tune.randint(int(dimension.low), int(dimension.high) + 1)
    draw = tune.loguniform if dimension.kind == "loguniform" else tune.uniform
    return draw(dimension.low, dimension.high)


class Deadline(Stopper):
    """Stop trials at their next report after the deadline or a stop request."""

    def __init__(self, deadline: float | None, stopped: Callable[[], bool]) -> None:
        self.deadline, self.stopped = deadline, stopped

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves a copy, but a sweep resumes from its journals

    def __call__(self, trial_id: str, result: Any) -> bool:
        """Return whether a trial ends at this report."""
        return self.stopped() or (self.deadline is not None and time.time() > self.deadline)

    def stop_all(self) -> bool:
        """Return whether all trials end now."""
        return self.stopped()
