"""The searcher of a sweep: Optuna's samplers over the sweep's space."""

import contextlib
import random
import time
from typing import Any

import optuna
from ray.tune.search import Searcher

from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.space import Dimension, Make, check_point, combinations, drawn, sizes_network
from mmdiff_ray.sweeps.spec import Sweep
from mmdiff_ray.sweeps.study import as_frozen, hashable, make_study

TRIES = 200
"""Attempts to draw a valid point."""


class SpaceSearcher(Searcher):
    """Suggest trials: first unfinished ones of earlier drivers, then new ones.

    make: values -> configuration. known: trials of earlier drivers. deadline: Unix time after which no trial
    starts.
    """

    def __init__(self, sweep: Sweep, make: Make, known: list[Trial], deadline: float | None = None) -> None:
        super().__init__(metric="score", mode="max")
        self.sweep, self.make, self.deadline = sweep, make, deadline
        self.waiting = [trial for trial in known if trial.outcome is None]
        self.next = 1 + max((trial.number for trial in known), default=-1)
        self.running: dict[int, Any] = {}
        self.study = make_study(sweep, self.next)
        for trial in known:
            if trial.outcome is not None and not sweep.is_baseline(trial.number):
                self.study.add_trial(as_frozen(sweep, trial))
        self.points = combinations(sweep.space) if sweep.searcher.name == "grid" else None
        started = {trial.number for trial in known}
        lost = [number for number in range(self.next) if number not in started]  # died before their journals
        self.waiting += [Trial(n, self._fixed(n)) for n in lost if self.points or sweep.is_baseline(n)]

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves a copy, but a sweep resumes from its journals

    @property
    def has_more(self) -> bool:
        """Return whether there is a trial left to train."""
        late = self.deadline is not None and time.time() > self.deadline
        return not late and (bool(self.waiting) or self.next < self.sweep.trials)

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's `number` and `values`, or FINISHED."""
        if not self.has_more:
            return self.FINISHED
        if self.waiting:
            trial = self.waiting.pop(0)
            values = trial.now if trial.copying is None else trial.copying["values"]
            return {"number": trial.number, "values": values}
        number = self.next
        fixed = self.points is not None or self.sweep.is_baseline(number)
        values = self._fixed(number) if fixed else self._draw()
        self.next += 1
        return {"number": number, "values": values}

    def _fixed(self, number: int) -> dict[str, Any]:
        """Return the point of a trial that is not sampled: the baseline's or a grid's."""
        if self.sweep.is_baseline(number):
            return {}
        assert self.points is not None
        return self.points[number - self.sweep.baseline]

    def _draw(self) -> dict[str, Any]:
        """Sample a valid point. Raises RunError after TRIES invalid ones."""
        reason = ""
        for _ in range(TRIES):
            optuna_trial = self.study.ask()
            values: dict[str, Any] = {}
            for key, dimension in self.sweep.space.items():
                if dimension.applies(values):
                    values[key] = _suggested(optuna_trial, dimension)
            try:
                check_point(self.make(values), sizes_network(self.sweep.space))
            except ConfigError as error:
                self.study.tell(optuna_trial, state=optuna.trial.TrialState.FAIL)
                reason = str(error)
                continue
            self.running[self.next] = optuna_trial
            return values
        raise RunError(f"space: {TRIES} points in a row are invalid; narrow the space; last error: {reason}")

    def note(self, trial: Trial) -> None:
        """Add an ended trial to the study, unless it is the baseline, which is no point of the space."""
        if self.sweep.is_baseline(trial.number):
            return
        optuna_trial = self.running.pop(trial.number, None)
        frozen = as_frozen(self.sweep, trial)
        if optuna_trial is None:
            self.study.add_trial(frozen)
            return
        for step, value in frozen.intermediate_values.items():
            if len(self.sweep.metrics) == 1:
                optuna_trial.report(value, step)
        self.study.tell(optuna_trial, frozen.values, state=frozen.state)

    def _ignored(self, *_: Any, **__: Any) -> None:
        """Do nothing: a sweep resumes from its journals, and `note` adds ended trials."""

    on_trial_complete = save = restore = _ignored


def _suggested(optuna_trial: optuna.Trial, dimension: Dimension) -> Any:
    if dimension.values:
        names = [hashable(value) for value in dimension.values]
        return dimension.values[names.index(optuna_trial.suggest_categorical(dimension.key, names))]
    if dimension.kind == "randint":
        return optuna_trial.suggest_int(dimension.key, int(dimension.low), int(dimension.high))
    return optuna_trial.suggest_float(
        dimension.key, dimension.low, dimension.high, log=dimension.kind == "loguniform"
    )


def explored(sweep: Sweep, make: Make, config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Clip the values of population-based training to the space; sample a new point if they are invalid."""
    rng = random.Random(f"{seed} {config}")
    values = {}
    for key, value in config["values"].items():
        dimension = sweep.space[key]
        values[key] = value if dimension.values else dimension.clip(value)
    try:
        check_point(make(values))
    except ConfigError:  # e.g. a profile that breaks the prior
        for _ in range(TRIES):
            values = drawn(sweep.space, rng)
            with contextlib.suppress(ConfigError):
                check_point(make(values))
                break
    return {**config, "values": values}
