"""How a sweep's configurations are chosen: Optuna's samplers over our spaces, told what became of them."""

import random
import time
from typing import Any

import optuna
from ray.tune.search import Searcher

from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.space import Dimension, Make, check_point, combinations, sizes_network
from mmdiff_ray.sweeps.spec import Sweep
from mmdiff_ray.sweeps.study import as_frozen, hashable, make_study

TRIES = 200
"""Points drawn in search of one that is not refused."""


class SpaceSearcher(Searcher):
    """Suggests trials: first those that were cut short by the end of an earlier driver, then new ones.

    make: values -> the configuration. known: the trials of earlier drivers. deadline: seconds since the
    epoch, after which none is begun.
    """

    def __init__(self, sweep: Sweep, make: Make, known: list[Trial], deadline: float | None = None) -> None:
        super().__init__(metric="score", mode="max")
        self.sweep, self.make, self.deadline = sweep, make, deadline
        self.waiting = [trial for trial in known if trial.outcome is None]
        self.next = 1 + max((trial.number for trial in known), default=-1)
        self.asked: dict[int, Any] = {}
        self.study = make_study(sweep, self.next)
        for trial in known:
            if trial.outcome is not None and not sweep.is_baseline(trial.number):
                self.study.add_trial(as_frozen(sweep, trial))
        self.points = combinations(sweep.space) if sweep.searcher.name == "grid" else None
        begun = {trial.number for trial in known}
        lost = [number for number in range(self.next) if number not in begun]  # died before their journals
        self.waiting += [Trial(n, self._fixed(n)) for n in lost if self.points or sweep.is_baseline(n)]

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy that nothing is ever restored from: the journals are

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
        """Return the point of a trial that is not drawn: the baseline's, or one of a grid."""
        if self.sweep.is_baseline(number):
            return {}
        assert self.points is not None
        return self.points[number - self.sweep.baseline]

    def _draw(self) -> dict[str, Any]:
        """Return a point that is not refused."""
        why = ""
        for _ in range(TRIES):
            asked = self.study.ask()
            values: dict[str, Any] = {}
            for key, dimension in self.sweep.space.items():
                if dimension.applies(values):
                    values[key] = _suggested(asked, dimension)
            try:
                check_point(self.make(values), sizes_network(self.sweep.space))
            except ConfigError as error:
                self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
                why = str(error)
                continue
            self.asked[self.next] = asked
            return values
        raise RunError(f"space: {TRIES} points in a row were refused; narrow the space; the last: {why}")

    def note(self, trial: Trial) -> None:
        """Take what became of a trial into account; the baseline is no point of the space."""
        if self.sweep.is_baseline(trial.number):
            return
        asked = self.asked.pop(trial.number, None)
        frozen = as_frozen(self.sweep, trial)
        if asked is None:
            self.study.add_trial(frozen)
            return
        for step, value in frozen.intermediate_values.items():
            if len(self.sweep.metrics) == 1:
                asked.report(value, step)
        self.study.tell(asked, frozen.values, state=frozen.state)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Do nothing: the journal says what became of a trial, and `note` is told."""

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the journals hold all that there is to know."""

    def restore(self, checkpoint_path: str) -> None:
        """Keep nothing: the journals hold all that there is to know."""


def _suggested(asked: optuna.Trial, dimension: Dimension) -> Any:
    if dimension.values:
        names = [hashable(value) for value in dimension.values]
        return dimension.values[names.index(asked.suggest_categorical(dimension.key, names))]
    if dimension.kind == "randint":
        return asked.suggest_int(dimension.key, int(dimension.low), int(dimension.high))
    return asked.suggest_float(
        dimension.key, dimension.low, dimension.high, log=dimension.kind == "loguniform"
    )


def explored(sweep: Sweep, make: Make, config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Return what population based training made of values, moved back into the space."""
    rng = random.Random(f"{seed} {config}")
    values = {}
    for key, value in config["values"].items():
        dimension = sweep.space[key]
        values[key] = value if dimension.values else dimension.clip(value)
    try:
        check_point(make(values))
    except ConfigError:  # a profile that leaves the prior: another point of the space in its place
        for _ in range(TRIES):
            values = {key: dimension.draw(rng) for key, dimension in sweep.space.items()}
            try:
                check_point(make(values))
                break
            except ConfigError:
                continue
    return {**config, "values": values}
