"""What a sweep is: a YAML file of a base configuration, space, metrics, searcher, scheduler and budget."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError, named
from mmdiff_ray.config.checks import check_name, one_of, unknown
from mmdiff_ray.sweeps.space import combinations, corners, make_space

SEARCHERS = ("random", "grid", "tpe", "nsga2")
SCHEDULERS = ("fifo", "asha", "median", "pbt")
MOST_POINTS = 100_000
"""Of a grid."""
SCALES_LOSS = ("loss.", "modalities.")
"""Beginnings of keys that a training or held-out loss is scaled by, or whose meaning they change."""
SET_HERE = (
    *("train.samples", "train.max_minutes", "train.log_every_samples", "checkpoint."),
    *("evaluate.every_samples", "tracking.", "runs", "name"),
)
"""Beginnings of keys that every trial has from the sweep."""
JUDGES = tuple(f"evaluate.{name}" for name in ("evaluators", "rows", "visits", "repeats", "split"))
"""Beginnings of keys that say how figures are measured."""


@dataclass(frozen=True)
class SearcherOptions:
    """How configurations are chosen.

    name: random, grid (every combination), tpe (Optuna's, one metric or several), nsga2 (Optuna's, for
    several). startup: random trials before tpe learns.
    """

    name: str = "tpe"
    startup: int = 10


@dataclass(frozen=True)
class SchedulerOptions:
    """Which trials go on.

    name: fifo (all), asha, median, pbt. grace: the share of a trial's samples that none is stopped before.
    reduction: asha keeps one of so many at each rung. quantile: pbt's lowest share of the population, which
    copies the highest. resample: how often a copied value is drawn anew, in place of being moved.
    """

    name: str = "asha"
    grace: float = 0.2
    reduction: int = 3
    quantile: float = 0.25
    resample: float = 0.25


@dataclass(frozen=True)
class Budget:
    """What a sweep may cost.

    trials: how many. samples: that each trains with. reports: how often each is judged, evenly. hours: wall
    clock, after which no trial begins and those that train end at their next report. concurrent: trials at
    once, as many as the cluster holds where None. retries: how often a trial whose process died is tried
    again.
    """

    trials: int = 20
    samples: int = 20_000
    reports: int = 4
    hours: float | None = None
    concurrent: int | None = None
    retries: int = 2


OPTIONS = {"searcher": SearcherOptions, "scheduler": SchedulerOptions, "budget": Budget}


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    base: plain values; a file may name a config file in their place, which is read once, with it. space:
    swept key -> its `Dimension`. metrics: figure of an evaluator -> min or max; the first one leads where a
    scheduler needs a single one. overrides: on top of the base, `key=value`. data: a data set that is built
    where it is missing: pipeline, uri, options.
    baseline: whether the first trial is the base configuration itself, with nothing of the space, which no
    scheduler stops.
    """

    name: str
    title: str
    base: dict[str, Any]
    space: dict[str, Any]
    metrics: dict[str, str]
    overrides: list[str] = field(default_factory=list)
    searcher: SearcherOptions = field(default_factory=SearcherOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    baseline: bool = False

    @property
    def main(self) -> str:
        """Return the metric that leads."""
        return next(iter(self.metrics))

    @property
    def sign(self) -> int:
        """Return the factor of the leading metric that makes a larger value better."""
        return 1 if self.metrics[self.main] == "max" else -1

    @property
    def trials(self) -> int:
        """Return how many trials there are at most: a grid has its points, and the baseline if asked for."""
        grid = self.searcher.name == "grid"
        return len(combinations(self.space)) + self.baseline if grid else self.budget.trials

    def is_baseline(self, number: int) -> bool:
        """Return whether a trial is the base configuration itself."""
        return self.baseline and number == 0

    @property
    def period(self) -> int:
        """Return the samples between two reports of a trial."""
        return -(-self.budget.samples // self.budget.reports)

    def config(self, values: Mapping[str, Any]) -> Config:
        """Return the configuration of a trial. values: swept key -> value. Raises ConfigError."""
        swept = [configuration.override(key, value) for key, value in values.items()]
        budget = [f"train.samples={self.budget.samples}", "train.max_minutes=null"]
        config = configuration.load((), [*self.overrides, *budget, *swept], self.base)
        # Reports fall on log lines: a segment of training ends where the trainer looks up anyway.
        period = self.period
        log = period // max(1, -(-period // config.train.log_every_samples))
        return dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, log_every_samples=max(1, log)),
            checkpoint=dataclasses.replace(config.checkpoint, every_samples=period),
            evaluate=dataclasses.replace(config.evaluate, every_samples=0),
        )


def load_sweep(file: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Return the sweep of a YAML file. overrides: `key=value` of the sweep's own sections (`budget.trials=4`)
    or of the base configuration. Raises ConfigError, naming the file and the key, for what is wrong in it."""
    plain = configuration.read_yaml(file)
    own = [word for word in overrides if re.match(r"(budget|searcher|scheduler)\.|seed=|name=", word)]
    with named(str(file)):
        return _made(_overridden(plain, own), Path(file), [word for word in overrides if word not in own])


def any_config(sweep: Sweep) -> Config:
    """Return the configuration of a corner of the space; needs no data. Raises ConfigError where none is
    one."""
    error = ConfigError("space: it has no corner")
    for values in corners(sweep.space):
        try:
            return sweep.config(values)
        except ConfigError as refused:
            error = refused
    raise error


def whole_text(file: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return a sweep's YAML that needs no other file: with its name, its base and the overrides in it."""
    plain, sweep = configuration.read_yaml(file), load_sweep(file, overrides)
    if not overrides and "name" in plain and not isinstance(plain["base"], str):
        return Path(file).read_text(encoding="utf8")
    plain |= {name: vars(getattr(sweep, name)) for name in OPTIONS if overrides or name in plain}
    plain |= {"name": sweep.name, "seed": sweep.seed, "base": sweep.base, "overrides": sweep.overrides}
    return configuration.plain_yaml(plain)


def _overridden(plain: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    values = dict(plain)
    for word in words:
        key, _, text = word.partition("=")
        section, _, name = key.partition(".")
        value = configuration.parse_name(text) if key == "name" else configuration.parse_value(text)
        if name and not isinstance(values.get(section) or {}, Mapping):
            raise ConfigError(f"{section}: got {values[section]!r}, want a section of names and values")
        values[section] = {**(values.get(section) or {}), name: value} if name else value
    return values


def _made(plain: Mapping[str, Any], file: Path, overrides: Sequence[str]) -> Sweep:
    known = [part.name for part in dataclasses.fields(Sweep)]
    for key in plain:
        if key not in known:
            raise ConfigError(unknown("sweep", key, known, "key"))
    for key in ("base", "space", "metrics"):
        if not plain.get(key):
            raise ConfigError(f"{key} is missing")
    values = {"name": file.stem, "title": file.stem, **plain}
    if isinstance(values["base"], str):
        values["base"] = configuration.read_yaml(values["base"])
    for name in (*OPTIONS, "overrides", "data"):
        if values.get(name, 0) is None:
            del values[name]
    sweep = configuration.options(Sweep, values, "")
    sweep = dataclasses.replace(
        sweep, overrides=[*sweep.overrides, *overrides], space=make_space(sweep.space)
    )
    _check(sweep)
    return sweep


def _check(sweep: Sweep) -> None:
    check_name("name", sweep.name)
    one_of("searcher.name", sweep.searcher.name, SEARCHERS)
    one_of("scheduler.name", sweep.scheduler.name, SCHEDULERS)
    for name, value, least in (
        ("budget.trials", sweep.budget.trials, 1),
        ("budget.samples", sweep.budget.samples, 1),
        ("budget.reports", sweep.budget.reports, 1),
        ("budget.retries", sweep.budget.retries, 0),
        ("scheduler.reduction", sweep.scheduler.reduction, 2),
    ):
        if value < least:
            raise ConfigError(f"{name} ({value}) must be at least {least}")
    if not 0 < sweep.scheduler.grace <= 1:
        raise ConfigError(f"scheduler.grace ({sweep.scheduler.grace:g}) must lie above 0 and at most at 1")
    _check_keys(sweep)
    for metric, direction in sweep.metrics.items():
        one_of(f"metrics.{metric}", direction, ("min", "max"))
        _check_metric(sweep, metric)
    if sweep.searcher.name == "nsga2" and len(sweep.metrics) < 2:
        raise ConfigError("searcher.name: nsga2 is for two metrics and more; take tpe")
    if sweep.searcher.name == "grid":
        endless = [key for key, dimension in sweep.space.items() if not dimension.values]
        if endless:
            raise ConfigError(
                f"space.{endless[0]}: the grid searcher needs a list of values (grid or choice)"
            )
        points = math.prod(len(dimension.values) for dimension in sweep.space.values())
        if points > MOST_POINTS:
            raise ConfigError(f"space: a grid of {points:,} points is more than {MOST_POINTS:,}; take tpe")
        if sweep.trials > sweep.budget.trials:
            raise ConfigError(
                f"budget.trials ({sweep.budget.trials}) must be {sweep.trials}, all points of the grid"
                f"{' and the baseline' * sweep.baseline}"
            )
    if sweep.scheduler.name == "pbt":
        _check_pbt(sweep)


def _check_keys(sweep: Sweep) -> None:
    """Raise ConfigError for a swept key that is nobody's, that is set elsewhere, or that moves the goal."""
    given = [word.partition("=")[0] for word in sweep.overrides]
    for key in sweep.space:
        section, name, *rest = [*key.split("."), ""]
        if section in ("modalities", "tasks") and any(rest):
            known = set(sweep.base.get(section) or {})
            known |= {parts[1] for parts in (word.split(".") for word in given) if parts[0] == section}
            one_of(f"space.{key}", name, sorted(known))
        if key in given:
            raise ConfigError(f"space.{key}: an override sets what is swept; leave one of the two out")
        if key.startswith(SET_HERE):
            raise ConfigError(f"space.{key}: a sweep sets it itself, for every trial alike")
        if key.startswith(JUDGES):
            raise ConfigError(
                f"space.{key}: it changes what trials are judged by; a figure means the same only where it "
                "is measured in the same way"
            )


def _check_metric(sweep: Sweep, metric: str) -> None:
    """Raise ConfigError for a metric that the space scales: a sweep would find what makes it small."""
    scaling = [key for key in sweep.space if key.startswith(SCALES_LOSS)]
    if re.match(r"((val|train)/)?loss(/|$)", metric) and scaling:
        raise ConfigError(
            f"metrics.{metric}: {scaling[0]} is in the space and changes what this loss means: the sweep "
            "would find what makes the number small, not the model good. Judge by what it does not scale: a "
            "term of the exact bound (pixels/l1_nats), LPIPS, mIoU, label accuracy, a Frechet distance"
        )


def _check_pbt(sweep: Sweep) -> None:
    if sweep.baseline:
        raise ConfigError(
            "baseline: a population moves the values of all of its trials; train the base configuration apart"
        )
    for key, dimension in sweep.space.items():
        if not configuration.is_live(key):
            raise ConfigError(
                f"space.{key}: population based training changes values while a model trains, which goes for "
                "the loss' coefficients, modalities' weights and train.learning_rate alone"
            )
        if dimension.when:
            raise ConfigError(f"space.{key}.when: a condition does not go with population based training")
