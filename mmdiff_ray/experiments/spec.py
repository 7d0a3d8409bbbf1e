"""An experiment: methods, measures and presets, and the cells to train."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError, named
from mmdiff_ray.config.checks import one_of, unknown
from mmdiff_ray.experiments.parts import Best, Cell, DataSet, Goal, Measure, Method, Panel, Pictures, Preset


@dataclass(frozen=True)
class Experiment:
    """A table of methods by measures.

    base: the configuration that presets and methods override.
    main: the method that the others are compared with.
    data: the data sets of the cells.
    judge: the method whose model of the first seed judges all samples (`evaluate.judge`); it is trained
    first.
    curves: plots of one `figure` over measures, with `points`: measure -> x.
    matrices: tables of figures by measure, with `rows`: measure -> title and `columns`: figure -> title.
    watch: method -> tasks whose losses and gradients are recorded during training.
    task_words: watched task -> title.
    overview: panels of the main figure.
    goals: claims to test.
    best: rows with the best of several methods.
    pictures: the picture grid of the page.
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
        """Return the folder of the experiment with this preset, or of one of its cells."""
        folder = runs.absolute() / f"{self.name}-{self.preset.name}"
        return folder if cell is None else folder / cell.key

    def cells(self) -> list[Cell]:
        """Return the cells to train, ordered by seed: the first seed of every method comes first."""
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
        """Return the cells whose models this cell needs, as `init` or `teacher`."""
        names = [name for name in (cell.method.init, cell.method.teacher) if name]
        return [Cell(self.methods[name], cell.seed) for name in names]

    def own_data(self, cell: Cell, runs: Path) -> DataSet | None:
        """Return the data set that a cell's teacher generates, placeholders filled in; None without one."""
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
        """Return the cells to train first: the judge, and every cell whose model another cell needs."""
        needed = [self.judge_cell(), *(one for cell in self.cells() for one in self.cells_before(cell))]
        return [cell for cell in self.cells() if cell in needed]

    def select(self, patterns: Sequence[str]) -> list[Cell]:
        """Return the cells whose keys match any of the patterns, and the cells that these need.

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
        """Return the methods that use a trained method's models for evaluation, including itself."""
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
        """Return the training configuration of a cell. ConfigError names the method.

        With `Method.init`, `train.init` is the key of the cell that provides the initial weights.
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
        """Return the configuration of a measure. config: of the model; judge: path of the judge's export."""
        overrides = [*(method.overrides if method.model else ()), *measure.overrides]
        plain = configuration.to_plain(config)
        plain["evaluate"] |= {
            "evaluators": list(measure.evaluators),
            "judge": judge,
            "floors": method.name == self.main,  # floors are equal for all methods: compute them once
        }
        with named(f"{self.name}, method {method.name}, measure {measure.name}"):
            return self._with_sources(self.load(overrides, plain))

    def load(self, overrides: Sequence[str], plain: Mapping[str, Any]) -> Config:
        """Return a checked configuration. Cached: tables request each one many times."""
        key = repr((overrides, plain))
        if key not in self._loaded:
            self._loaded[key] = configuration.load((), overrides, plain)
        return self._loaded[key]

    def data_sets(self) -> list[DataSet]:
        """Return the distinct data sets of all seeds, with placeholders filled in."""
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
        """Fill in `{seed}`, `{fold}` and `{preset}` in every string of plain values."""
        if isinstance(value, Mapping):
            return {key: self._fill(inner, seed) for key, inner in value.items()}
        if not isinstance(value, str):
            return value
        folds = next((one.folds for one in self.data if one.folds), None)
        value = value.replace("{seed}", str(seed)).replace("{preset}", self.preset.name)
        return value.replace("{fold}", str(seed % folds)) if folds else value
