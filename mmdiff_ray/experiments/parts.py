"""The parts of an experiment: methods, measures, presets, data sets, goals, cells."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from mmdiff_ray.config import ConfigError


@dataclass(frozen=True)
class Method:
    """A row of the table.

    title: its name in the table. overrides: `key=value`, applied after the preset's.
    model: evaluate the models of this method instead of training.
    init: start from this method's model of the same seed (`train.init`).
    teacher: this method's model of the same seed generates the data set `data` before training; `{teacher}`
    in the options of `data` is replaced by the path of that model.
    share: factor on the preset's training samples and on `train.decay_samples`. For example, 0.5 gives two
    single-task methods together the compute of one.
    seeds: use only the first n seeds of the preset; None: all.
    refused: the configuration must raise ConfigError, like a profile that breaks the prior. The error message
    is the result.
    """

    name: str
    title: str
    overrides: list[str] = field(default_factory=list)
    model: str | None = None
    init: str | None = None
    teacher: str | None = None
    data: Any = None
    share: float = 1.0
    seeds: int | None = None
    refused: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise ConfigError(f"methods.{self.name}.share ({self.share}) must be above 0")
        if (self.teacher is None) != (self.data is None):
            raise ConfigError(f"methods.{self.name}: teacher and data must be set together")


@dataclass(frozen=True)
class Measure:
    """One evaluation of all methods, or of `methods`. overrides: of evaluate, data and modalities."""

    name: str
    evaluators: list[str]
    overrides: list[str] = field(default_factory=list)
    methods: list[str] | None = None


@dataclass(frozen=True)
class Preset:
    """A size of the experiment: overrides, seeds, cpus and gpus per cell, and measures (None: all).

    data: data sets that replace the experiment's. methods: method -> values that replace its own; overrides
    are appended instead. null removes the method.
    """

    name: str
    overrides: list[str]
    seeds: list[int]
    cpus: float = 1.0
    gpus: float = 0.0
    measures: list[str] | None = None
    data: Any = None
    methods: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"presets.{self.name}.seeds ({self.seeds}) must be one or more distinct numbers"
            )


@dataclass(frozen=True)
class Panel:
    """A panel of the overview: one figure of one measure. name: its title; log: use a logarithmic axis."""

    name: str
    measure: str
    figure: str
    log: bool = False


@dataclass(frozen=True)
class Goal:
    """A claim stated before the results: compares method a with method b in one figure of a measure.

    kind: `better`, `not worse` or `within N %` (worse by less than N % of b's figure).
    """

    name: str
    measure: str
    figure: str
    a: str
    b: str
    kind: str = "better"

    def __post_init__(self) -> None:
        if self.kind not in ("better", "not worse") and not re.fullmatch(r"within \d+(\.\d+)? ?%", self.kind):
            raise ConfigError(f"kind: got {self.kind!r}, want better, not worse or within N %")

    @property
    def margin(self) -> float:
        """The fraction of b's figure by which a may be worse."""
        return float(self.kind.removeprefix("within").strip(" %")) / 100 if "%" in self.kind else 0.0


@dataclass(frozen=True)
class Best:
    """A row of the table with the best of several methods, selected per seed by one figure.

    of: the methods. Select by a figure on validation rows: selection on test rows would bias the comparison.
    """

    name: str
    title: str
    of: list[str]
    measure: str
    figure: str


@dataclass(frozen=True)
class Pictures:
    """A grid of held-out rows: the modalities that `measure` gives, predictions of methods, and the truth.

    instances: the predicted modalities to draw.
    """

    measure: str
    methods: list[str]
    instances: list[str]


@dataclass(frozen=True)
class DataSet:
    """A data set that is built if it is missing.

    Placeholders in uri, options and the cells' `data.sources`: `{seed}` is the cell's seed, `{fold}` is the
    seed modulo `folds`, and `{preset}` is the preset's name.
    """

    pipeline: str
    uri: str
    options: dict[str, Any] = field(default_factory=dict)
    folds: int | None = None

    def __post_init__(self) -> None:
        if self.folds is not None and (not isinstance(self.folds, int) or self.folds < 1):
            raise ConfigError(f"data.folds ({self.folds}) must be a whole number of at least 1")


@dataclass(frozen=True)
class Cell:
    """One training run: a method with a seed. Its key is the name of its folder."""

    method: Method
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method.name}-{self.seed}"
