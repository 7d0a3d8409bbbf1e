"""An experiment: methods, measures and presets, and the cells that they make."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError, named
from mmdiff_ray.config.checks import one_of, unknown


@dataclass(frozen=True)
class Method:
    """A row of the table.

    title: its name in the table. overrides: `key=value`, after the preset's. model: another method whose
    trained models it is evaluated on, instead of training. init: another method, from whose model of the same
    seed it starts (`train.init`). teacher: another method, whose model of the same seed makes the data set
    `data` before training; `{teacher}` in its options stands for that model. share: of the preset's training
    samples (0.5 of two tasks is equal compute), and of `train.decay_samples`. seeds: the number of the
    preset's seeds it uses; all where None. refused: whether its configuration must raise ConfigError, as a
    profile that breaks the prior does; the message is its result.
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
            raise ConfigError(f"methods.{self.name}: teacher and data need each other")


@dataclass(frozen=True)
class Measure:
    """An evaluation of all methods, or of `methods`, under overrides of evaluate, data and modalities."""

    name: str
    evaluators: list[str]
    overrides: list[str] = field(default_factory=list)
    methods: list[str] | None = None


@dataclass(frozen=True)
class Preset:
    """A size: overrides, seeds, resources of a cell (cpus, gpus), and its measures (all where None).

    data: data sets in place of the experiment's. methods: method -> values in place of its own, but overrides
    are appended; null leaves the method out.
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
            raise ConfigError(f"presets.{self.name}.seeds ({self.seeds}) must be one or more, all different")


@dataclass(frozen=True)
class Panel:
    """A panel of the overview: a figure of a measure, on a logarithmic axis if `log`. name: its title."""

    name: str
    measure: str
    figure: str
    log: bool = False


@dataclass(frozen=True)
class Goal:
    """A claim stated before the results: method a against b by one figure of a measure.

    kind: `better`, `not worse` or `within N %`, worse by less than N % of b's figure.
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
        """The share of b's figure by which a may be worse."""
        return float(self.kind.removeprefix("within").strip(" %")) / 100 if "%" in self.kind else 0.0


@dataclass(frozen=True)
class Best:
    """A row of the table that stands for the best of several methods, chosen per seed by a figure.

    of: the methods. The figure should be measured on validation rows, so that the test rows judge no choice.
    """

    name: str
    title: str
    of: list[str]
    measure: str
    figure: str


@dataclass(frozen=True)
class Pictures:
    """A grid of held-out rows: what a measure gives, the answers of methods, and the truth.

    instances: what is shown of the answers.
    """

    measure: str
    methods: list[str]
    instances: list[str]


@dataclass(frozen=True)
class DataSet:
    """A data set that is built if it is missing.

    In uri and options, and in the cells' `data.sources`, `{seed}` stands for a cell's seed, `{fold}` for the
    seed modulo `folds`, and `{preset}` for the preset's name.
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
    """One training: a method with a seed. Its key names its folder."""

    method: Method
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method.name}-{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A table of methods by measures.

    base: the configuration that presets and methods override. main: the method that others are compared with.
    data: the data sets of the cells. judge: the method whose model of the first seed judges the others'
    samples (`evaluate.judge`); it is trained first. curves: plots of a `figure` over measures, `points`:
    measure -> x. matrices: tables of figures by measure, with `rows`: measure -> title and `columns`: figure
    -> title. watch: method -> tasks whose losses and gradients are recorded while it trains. task_words:
    watched task -> title. overview: panels of the main figure. goals: claims to test. best: rows that stand
    for the best of several methods. pictures: the grid of the page.
    """

    name: str
    title: str
    base: dict[str, Any]
    preset: Preset
    methods: dict[str, Method]
    measures: dict[str, Measure]
    main: str
    question: str = ""
    data: list[DataSet] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    judge: str | None = None
    matrices: list[dict[str, Any]] = field(default_factory=list)
    watch: dict[str, list[str]] = field(default_factory=dict)
    task_words: dict[str, str] = field(default_factory=dict)
    overview: list[Panel] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    best: list[Best] = field(default_factory=list)
    pictures: Pictures | None = None
    _loaded: dict[str, Config] = field(default_factory=dict, init=False, repr=False, compare=False)

    def folder(self, runs: Path, cell: Cell | None = None) -> Path:
        """Return the folder of the experiment at this preset, or of one of its cells."""
        folder = runs.absolute() / f"{self.name}-{self.preset.name}"
        return folder if cell is None else folder / cell.key

    def cells(self) -> list[Cell]:
        """Return the cells to train, the first seed of every method first."""
        return [
            Cell(method, seed)
            for index, seed in enumerate(self.preset.seeds)
            for method in self.methods.values()
            if method.model is None and not method.refused and (method.seeds is None or index < method.seeds)
        ]

    def judge_cell(self) -> Cell | None:
        """Return the cell that trains the judge."""
        return Cell(self.methods[self.judge], self.preset.seeds[0]) if self.judge else None

    def cells_before(self, cell: Cell) -> list[Cell]:
        """Return the cells whose models a cell starts from or learns from."""
        names = [name for name in (cell.method.init, cell.method.teacher) if name]
        return [Cell(self.methods[name], cell.seed) for name in names]

    def own_data(self, cell: Cell, runs: Path) -> DataSet | None:
        """Return the data set that a cell's teacher makes, placeholders filled in."""
        data, teacher = cell.method.data, cell.method.teacher
        if data is None or teacher is None:
            return None
        export = self.folder(runs, Cell(self.methods[teacher], cell.seed)) / "export"
        options = {
            key: str(value).replace("{teacher}", str(export))
            for key, value in self._fill(data.options, cell.seed).items()
        }
        return dataclasses.replace(data, uri=self._fill(data.uri, cell.seed), options=options)

    def needed_first(self) -> list[Cell]:
        """Return the cells that others need: the judge, and those of `cells_before`."""
        needed = [self.judge_cell(), *(one for cell in self.cells() for one in self.cells_before(cell))]
        return [cell for cell in self.cells() if cell in needed]

    def select(self, patterns: Sequence[str]) -> list[Cell]:
        """Return the cells whose keys match any of the patterns, and those that they need.

        Raises ConfigError for a pattern without a match.
        """
        cells = self.cells()
        for pattern in patterns:
            if not any(fnmatch(cell.key, pattern) for cell in cells):
                raise ConfigError(unknown("cells", pattern, [cell.key for cell in cells]))
        chosen = [cell for cell in cells if any(fnmatch(cell.key, pattern) for pattern in patterns)]
        needed = [self.judge_cell(), *(one for cell in chosen for one in self.cells_before(cell))]
        return [cell for cell in cells if cell in chosen or cell in needed]

    def evaluated_on(self, trained: Method) -> list[Method]:
        """Return the methods that are evaluated on a trained method's models, itself first."""
        return [m for m in self.methods.values() if trained.name == (m.model or m.name)]

    def measures_of(self, method: Method) -> list[Measure]:
        """Return the measures of a method under this preset."""
        return [
            measure
            for measure in self.measures.values()
            if (self.preset.measures is None or measure.name in self.preset.measures)
            and (measure.methods is None or method.name in measure.methods)
        ]

    def config(self, cell: Cell, runs: Path) -> Config:
        """Return the training configuration of a cell. Raises ConfigError naming the method.

        With `Method.init`, its `train.init` is the key of the cell that it starts from.
        """
        method = cell.method
        with named(f"{self.name}, method {method.name}"):
            config = self.load([*self.preset.overrides, *method.overrides], self.base)
            for task in self.watch.get(method.name, []):
                one_of("watch", task, list(config.tasks))
        train, decay = config.train, config.train.decay_samples
        train = dataclasses.replace(
            train,
            samples=max(1, round(train.samples * method.share)),
            decay_samples=None if decay is None else max(1, round(decay * method.share)),
            init=f"{method.init}-{cell.seed}" if method.init else train.init,
        )
        tracking = dataclasses.replace(config.tracking, experiment=f"experiment-{self.name}")
        config = dataclasses.replace(
            config, name=cell.key, seed=cell.seed, runs=str(runs), train=train, tracking=tracking
        )
        return self._with_sources(config)

    def evaluation_config(
        self, config: Config, method: Method, measure: Measure, judge: str | None = None
    ) -> Config:
        """Return the configuration of a measure. config: the model's; judge: the judge's export."""
        overrides = [*(method.overrides if method.model else ()), *measure.overrides]
        plain = configuration.to_plain(config)
        plain["evaluate"] |= {
            "evaluators": list(measure.evaluators),
            "judge": judge,
            "floors": method.name == self.main,  # they are the same for all methods
        }
        with named(f"{self.name}, method {method.name}, measure {measure.name}"):
            return self._with_sources(self.load(overrides, plain))

    def load(self, overrides: Sequence[str], plain: Mapping[str, Any]) -> Config:
        """Return a checked configuration; cached, since tables need each many times."""
        key = repr((overrides, plain))
        if key not in self._loaded:
            self._loaded[key] = configuration.load((), overrides, plain)
        return self._loaded[key]

    def data_sets(self) -> list[DataSet]:
        """Return the data sets of all seeds, placeholders filled in."""
        filled = [
            dataclasses.replace(one, uri=self._fill(one.uri, seed), options=self._fill(one.options, seed))
            for one in self.data
            for seed in self.preset.seeds
        ]
        return [one for index, one in enumerate(filled) if one not in filled[:index]]

    def _with_sources(self, config: Config) -> Config:
        """Return a configuration with the data sources of its seed."""
        sources = [dataclasses.replace(s, uri=self._fill(s.uri, config.seed)) for s in config.data.sources]
        return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))

    def _fill(self, value: Any, seed: int) -> Any:
        """Return plain values with `{seed}`, `{fold}` and `{preset}` filled in."""
        if isinstance(value, Mapping):
            return {key: self._fill(inner, seed) for key, inner in value.items()}
        if not isinstance(value, str):
            return value
        folds = next((one.folds for one in self.data if one.folds), None)
        value = value.replace("{seed}", str(seed)).replace("{preset}", self.preset.name)
        return value.replace("{fold}", str(seed % folds)) if folds else value
