"""The spec of a sweep: base configuration, space, metrics, searcher, scheduler and budget."""

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
"""Largest number of points of a grid."""
SCALES_LOSS = ("loss.", "modalities.")
"""Prefixes of keys that scale a training or held-out loss, or change its meaning."""
SET_HERE = (
    *("train.samples", "train.max_minutes", "train.log_every_samples", "checkpoint."),
    *("evaluate.every_samples", "tracking.", "runs", "name"),
)
"""Prefixes of keys that the sweep sets for every trial."""
JUDGES = tuple(f"evaluate.{name}" for name in ("evaluators", "rows", "visits", "repeats", "split"))
"""Prefixes of keys that change how figures are measured."""


@dataclass(frozen=True)
class SearcherOptions:
    """How to choose configurations.

    name: `random`, `grid` (every combination), `tpe` (Optuna, one or more metrics) or `nsga2` (Optuna, two or
    more metrics). startup: random trials before tpe uses earlier results.
    """

    name: str = "tpe"
    startup: int = 10


@dataclass(frozen=True)
class SchedulerOptions:
    """Which trials to continue.

    name: `fifo` (all), `asha`, `median` or `pbt`. grace: fraction of a trial's samples before it may be
    stopped.
    reduction: asha keeps 1 in this many trials at each rung. quantile: in pbt, this lowest fraction of the
    population copies the highest. resample: probability that pbt resamples a copied value instead of
    perturbing it.
    """

    name: str = "asha"
    grace: float = 0.2
    reduction: int = 3
    quantile: float = 0.25
    resample: float = 0.25


@dataclass(frozen=True)
class Budget:
    """Limits of a sweep.

    trials: number of trials. samples: training samples per trial. reports: evaluations per trial, evenly
    spaced.
    hours: wall-clock limit; then no trial starts, and running ones stop at their next report. concurrent:
    trials at a time; None: as many as fit into the cluster. retries: how often to retry a trial whose process
    died.
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

    base: plain values, or in the YAML file the path of a config file.
    space: swept key -> `Dimension`.
    metrics: figure of an evaluator -> `min` or `max`. Schedulers use the first one, the main metric.
    overrides: `key=value`, applied to the base.
    data: a data set to build if it is missing: pipeline, uri, options.
    baseline: run the unchanged base configuration as the first trial; schedulers never stop it.
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
        """Return the first metric, which ranks trials if a single one is needed."""
        return next(iter(self.metrics))

    @property
    def sign(self) -> int:
        """Return -1 if the main metric is minimized, else 1: sign x metric is better if larger."""
        return 1 if self.metrics[self.main] == "max" else -1

    @property
    def trials(self) -> int:
        """Return the largest number of trials; for a grid, its points plus the baseline, if any."""
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
        # A report coincides with a log line, because the trainer returns only there.
        period = self.period
        log = period // max(1, -(-period // config.train.log_every_samples))
        return dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, log_every_samples=max(1, log)),
            checkpoint=dataclasses.replace(config.checkpoint, every_samples=period),
            evaluate=dataclasses.replace(config.evaluate, every_samples=0),
        )


def load_sweep(file: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Load a sweep from a YAML file. Raises ConfigError that names the file and the key.

    overrides: `key=value` of the sweep's own sections, like `budget.trials=4`, or of the base configuration.
    """
    plain = configuration.read_yaml(file)
    own = [word for word in overrides if re.match(r"(budget|searcher|scheduler)\.|seed=|name=", word)]
    with named(str(file)):
        return _build(_override(plain, own), Path(file), [word for word in overrides if word not in own])


def first_valid_config(sweep: Sweep) -> Config:
    """Return the configuration of the first valid corner of the space, without reading data.

    Raises ConfigError if no corner is valid.
    """
    error = ConfigError("space: no corners")
    for values in corners(sweep.space):
        try:
            return sweep.config(values)
        except ConfigError as refused:
            error = refused
    raise error


def standalone_yaml(file: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return self-contained YAML of a sweep, with its name, base configuration and overrides inlined."""
    plain, sweep = configuration.read_yaml(file), load_sweep(file, overrides)
    if not overrides and "name" in plain and not isinstance(plain["base"], str):
        return Path(file).read_text(encoding="utf8")
    plain |= {name: vars(getattr(sweep, name)) for name in OPTIONS if overrides or name in plain}
    plain |= {"name": sweep.name, "seed": sweep.seed, "base": sweep.base, "overrides": sweep.overrides}
    return configuration.plain_yaml(plain)


def _override(plain: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    values = dict(plain)
    for override in overrides:
        key, _, text = override.partition("=")
        section, _, name = key.partition(".")
        value = configuration.parse_name(text) if key == "name" else configuration.parse_value(text)
        if name and not isinstance(values.get(section) or {}, Mapping):
            raise ConfigError(f"{section}: got {values[section]!r}, want a section of names and values")
        values[section] = {**(values.get(section) or {}), name: value} if name else value
    return values


def _build(plain: Mapping[str, Any], file: Path, overrides: Sequence[str]) -> Sweep:
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
        raise ConfigError(f"scheduler.grace ({sweep.scheduler.grace:g}) must be above 0 and at most 1")
    _check_keys(sweep)
    for metric, direction in sweep.metrics.items():
        one_of(f"metrics.{metric}", direction, ("min", "max"))
        _check_metric(sweep, metric)
    if sweep.searcher.name == "nsga2" and len(sweep.metrics) < 2:
        raise ConfigError("searcher.name: nsga2 needs two or more metrics; use tpe")
    if sweep.searcher.name == "grid":
        endless = [key for key, dimension in sweep.space.items() if not dimension.values]
        if endless:
            raise ConfigError(
                f"space.{endless[0]}: the grid searcher needs a list of values (grid or choice)"
            )
        points = math.prod(len(dimension.values) for dimension in sweep.space.values())
        if points > MOST_POINTS:
            raise ConfigError(f"space: a grid of {points:,} points exceeds {MOST_POINTS:,}; use tpe")
        if sweep.trials > sweep.budget.trials:
            raise ConfigError(
                f"budget.trials ({sweep.budget.trials}) must be {sweep.trials}: all points of the grid"
                f"{' plus the baseline' * sweep.baseline}"
            )
    if sweep.scheduler.name == "pbt":
        _check_pbt(sweep)


def _check_keys(sweep: Sweep) -> None:
    """Raise ConfigError if a swept key is unknown, is set elsewhere, or changes how trials are measured."""
    given = [word.partition("=")[0] for word in sweep.overrides]
    for key in sweep.space:
        section, name, *rest = [*key.split("."), ""]
        if section in ("modalities", "tasks") and any(rest):
            known = set(sweep.base.get(section) or {})
            known |= {parts[1] for parts in (word.split(".") for word in given) if parts[0] == section}
            one_of(f"space.{key}", name, sorted(known))
        if key in given:
            raise ConfigError(f"space.{key}: an override also sets this key; remove one of them")
        if key.startswith(SET_HERE):
            raise ConfigError(f"space.{key}: the sweep sets this key for every trial; remove it")
        if key.startswith(JUDGES):
            raise ConfigError(
                f"space.{key}: it changes how trials are measured, so their figures could not be compared; "
                "remove it"
            )


def _check_metric(sweep: Sweep, metric: str) -> None:
    """Raise ConfigError if a swept key scales the metric: the search would only make the number small."""
    scaling = [key for key in sweep.space if key.startswith(SCALES_LOSS)]
    if re.match(r"((val|train)/)?loss(/|$)", metric) and scaling:
        raise ConfigError(
            f"metrics.{metric}: the space has {scaling[0]}, which scales this loss, so a smaller value would "
            "not mean a better model; use a term of the exact bound (pixels/l1_nats), LPIPS, mIoU, label "
            "accuracy or a Fréchet distance"
        )


def _check_pbt(sweep: Sweep) -> None:
    if sweep.baseline:
        raise ConfigError(
            "baseline: pbt changes the values of all trials; remove the key and train the base configuration "
            "separately"
        )
    for key, dimension in sweep.space.items():
        if not configuration.is_live(key):
            raise ConfigError(
                f"space.{key}: pbt changes values during training, which only loss coefficients, modality "
                "weights and train.learning_rate support; remove the key or use another scheduler"
            )
        if dimension.when:
            raise ConfigError(
                f"space.{key}.when: pbt does not support conditions; remove it or use another scheduler"
            )
