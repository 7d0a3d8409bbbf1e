"""What an experiment is: a YAML file of methods, measures and presets, and the cells that they make."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError, named, shipped
from mmdiff_ray.config.checks import check_name, one_of, unknown

KEYS = {
    "name",
    "title",
    "question",
    "data",
    "base",
    "presets",
    "methods",
    "measures",
    "main",
    "judge",
    "curves",
    "matrices",
    "watch",
    "overview",
    "task_words",
    "goals",
}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    title: its name for a reader. overrides: `key=value`, on top of the preset's. model: another method whose
    trained models it asks in its own way, in place of training. share: of the preset's training samples
    (equal compute: a half for one of two tasks). seeds: how many of the preset's, all where None. refused:
    it is there to be refused, as a profile that breaks the prior is; the words of the refusal are its result.
    """

    name: str
    title: str
    overrides: list[str] = field(default_factory=list)
    model: str | None = None
    share: float = 1.0
    seeds: int | None = None
    refused: bool = False


@dataclass(frozen=True)
class Measure:
    """What is measured of every method: evaluators, under overrides of `evaluate.*`, `data.*` and
    `modalities.*`."""

    name: str
    evaluators: list[str]
    overrides: list[str] = field(default_factory=list)
    methods: list[str] | None = None


@dataclass(frozen=True)
class Preset:
    """How large: overrides, seeds, what a cell asks for (cpus, gpus), which of the measures are taken (all
    where None), and another data set than the experiment's.

    methods: method -> its values at this size, in place of its own; its overrides come after its own.
    """

    name: str
    overrides: list[str]
    seeds: list[int]
    cpus: float = 1.0
    gpus: float = 0.0
    measures: list[str] | None = None
    data: dict[str, Any] | None = None
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """A panel of the main figure, named by the words for it: a figure of a measure. log: its axis is
    logarithmic."""

    name: str
    measure: str
    figure: str
    log: bool = False


@dataclass(frozen=True)
class Goal:
    """A claim that is written down before the results: method a against b by one figure of a measure.

    kind: `better`, `not worse` or `within N %`, worse by less than N % of b's figure. name: in words.
    """

    name: str
    measure: str
    figure: str
    a: str
    b: str
    kind: str = "better"

    def __post_init__(self) -> None:
        if self.kind not in ("better", "not worse") and not re.fullmatch(r"within [\d.]+ ?%", self.kind):
            raise ConfigError(f"kind: got {self.kind!r}, want better, not worse or within N %")

    @property
    def margin(self) -> float:
        """The share of b's figure by which a may be worse."""
        return float(self.kind.removeprefix("within").strip(" %")) / 100 if "%" in self.kind else 0.0


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
    """A table. base: the configuration below all. main: the method that the others are compared with.

    data: a data set that is built where it is missing: pipeline, uri, options; with `folds: n`, one for each
    fold, of which the text {fold} in uri, options and the cells' data.sources is the number: the seed modulo
    n. curves: figures to draw, each
    with `figure`, `y`: its words, and `points`: measure -> the value on the x axis. judge: the method whose
    model of the first seed judges the others' pairs (`evaluate.judge`); it is trained before them. matrices:
    tables of figures by measure, each with `name`, `title`, `rows`: measure -> its words, and `columns`:
    figure -> its words. watch: method -> tasks whose losses and gradients are looked at while it trains.
    task_words: watched task -> its words. overview: what matters most, the panels of the main figure. goals:
    claims to test.
    """

    name: str
    title: str
    question: str
    base: dict[str, Any]
    preset: Preset
    methods: dict[str, Method]
    measures: dict[str, Measure]
    main: str
    data: dict[str, Any] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    judge: str | None = None
    matrices: list[dict[str, Any]] = field(default_factory=list)
    watch: dict[str, list[str]] = field(default_factory=dict)
    task_words: dict[str, str] = field(default_factory=dict)
    overview: list[Panel] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    _loaded: dict[str, Config] = field(default_factory=dict, init=False, repr=False, compare=False)

    def is_judge(self, cell: Cell) -> bool:
        """Return whether a cell trains the judge."""
        return cell.method.name == self.judge and cell.seed == self.preset.seeds[0]

    def cells(self) -> list[Cell]:
        """Return what has to be trained, the first seed of every method first."""
        found = []
        for index, seed in enumerate(self.preset.seeds):
            for method in self.methods.values():
                if (
                    method.model is None
                    and not method.refused
                    and (method.seeds is None or index < method.seeds)
                ):
                    found.append(Cell(method, seed))
        return found

    def matching(self, patterns: Sequence[str]) -> list[Cell]:
        """Return the cells whose keys match any of the patterns, and the judge that they need.

        Raises ConfigError for a pattern that matches none.
        """
        cells = self.cells()
        for pattern in patterns:
            if not any(fnmatch(cell.key, pattern) for cell in cells):
                raise ConfigError(unknown("cells", pattern, [cell.key for cell in cells]))
        return [
            cell
            for cell in cells
            if self.is_judge(cell) or any(fnmatch(cell.key, pattern) for pattern in patterns)
        ]

    def askers(self, trained: Method) -> list[Method]:
        """Return the methods that a trained method's models answer for: itself, and those that ask it."""
        return [
            m for m in self.methods.values() if trained.name in (m.name if m.model is None else "", m.model)
        ]

    def config(self, cell: Cell, runs: Path) -> Config:
        """Return the training configuration of a cell. Raises ConfigError naming the method."""
        method = cell.method
        overrides = [*self.preset.overrides, *method.overrides]
        with named(f"{self.name}, method {method.name}"):
            config = self.load(overrides, self.base)
            for task in self.watch.get(method.name, []):
                one_of("watch", task, list(config.tasks))
        train = dataclasses.replace(config.train, samples=max(1, round(config.train.samples * method.share)))
        tracking = dataclasses.replace(config.tracking, experiment=f"experiment-{self.name}")
        config = dataclasses.replace(
            config, name=cell.key, seed=cell.seed, runs=str(runs), train=train, tracking=tracking
        )
        return self._of_fold(config)

    def data_sets(self) -> list[dict[str, Any]]:
        """Return the data sets that the cells read: `data` itself, or one for each fold."""
        if not self.data:
            return []
        plain = {key: value for key, value in self.data.items() if key != "folds"}
        folds = dict.fromkeys(seed % self.folds for seed in self.preset.seeds)
        return [_filled(plain, fold) for fold in folds] if "folds" in self.data else [plain]

    @property
    def folds(self) -> int:
        """Return how many folds the data have, 1 where there are none."""
        return self.data.get("folds", 1)

    def _of_fold(self, config: Config) -> Config:
        """Return a configuration that reads the data of its seed's fold."""
        if "folds" not in self.data:
            return config
        fold = config.seed % self.folds
        sources = [dataclasses.replace(s, uri=_filled(s.uri, fold)) for s in config.data.sources]
        return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))

    def load(self, overrides: Sequence[str], plain: Mapping[str, Any]) -> Config:
        """Return a checked configuration. One is asked for many times, and made once."""
        key = repr((overrides, plain))
        if key not in self._loaded:
            self._loaded[key] = configuration.load((), overrides, plain)
        return self._loaded[key]

    def asked(self, config: Config, method: Method, measure: Measure, judge: str | None = None) -> Config:
        """Return the configuration that a method's model is measured under. judge: the judge's export."""
        overrides = [*(method.overrides if method.model else ()), *measure.overrides]
        plain = configuration.to_plain(config)
        plain["evaluate"] |= {
            "evaluators": list(measure.evaluators),
            "judge": judge,
            "floors": method.name == self.main,  # they are the same for all
        }
        with named(f"{self.name}, method {method.name}, measure {measure.name}"):
            return self._of_fold(self.load(overrides, plain))

    def measures_of(self, method: Method) -> list[Measure]:
        """Return what is measured of a method under this preset."""
        wanted = self.preset.measures
        return [
            measure
            for measure in self.measures.values()
            if (wanted is None or measure.name in wanted)
            and (measure.methods is None or method.name in measure.methods)
        ]


def load_experiment(name: str, preset: str) -> Experiment:
    """Return an experiment by its name or file. Raises ConfigError for what is wrong in it, naming it."""
    file = shipped.find(name, shipped.EXPERIMENTS)
    if not file.is_file():
        raise ConfigError(unknown("experiment", name, shipped.names(shipped.EXPERIMENTS)))
    plain = configuration.read_yaml(file)
    with named(str(file)):
        for key in plain:
            if key not in KEYS:
                raise ConfigError(unknown("experiment", key, sorted(KEYS), "key"))
        for key in ("name", "base", "presets", "methods", "measures"):
            if not plain.get(key):
                raise ConfigError(f"{key} is missing")
        check_name("name", plain["name"])
        for key in ("presets", "methods", "measures"):
            for one in plain[key]:
                check_name(key, one)
        for curve in plain.get("curves", []):
            check_name("curves", curve.get("name"))
        return _experiment(plain, preset)


def _experiment(plain: Mapping[str, Any], preset: str) -> Experiment:
    if preset not in plain["presets"]:
        raise ConfigError(unknown("preset", preset, list(plain["presets"])))
    chosen = _made("presets", Preset, preset, plain["presets"][preset])
    methods = {
        name: _made("methods", Method, name, _at_size(values or {}, chosen.methods.get(name) or {}))
        for name, values in plain["methods"].items()
    }
    for method in methods.values():
        if method.model is not None and getattr(methods.get(method.model), "model", "") is not None:
            raise ConfigError(
                unknown(
                    f"methods.{method.name}.model",
                    method.model,
                    [n for n, m in methods.items() if not m.model],
                )
            )
    measures = {name: _made("measures", Measure, name, values) for name, values in plain["measures"].items()}
    modalities = plain["base"].get("modalities", {})
    overview = [_made("overview", Panel, name, values) for name, values in plain.get("overview", {}).items()]
    goals = [
        _made("goals", Goal, goal.get("name", index), {k: v for k, v in goal.items() if k != "name"})
        for index, goal in enumerate(plain.get("goals", []))
    ]
    for key, names, known in [
        ("presets." + preset + ".measures", chosen.measures or [], measures),
        ("presets." + preset + ".methods", list(chosen.methods), methods),
        ("main", [plain.get("main", next(iter(methods)))], methods),
        ("judge", [plain["judge"]] if plain.get("judge") else [], methods),
        *[(f"measures.{m.name}.methods", m.methods or [], methods) for m in measures.values()],
        ("watch", list(plain.get("watch", {})), methods),
        ("task_words", list(plain.get("task_words", {})), plain["base"].get("tasks", {})),
        *[(f"overview.{panel.name}.measure", [panel.measure], measures) for panel in overview],
        *[(f"goals.{goal.name}.measure", [goal.measure], measures) for goal in goals],
        *[(f"goals.{goal.name}", [goal.a, goal.b], methods) for goal in goals],
        *[
            (f"overview.{panel.name}.figure", panel.figure.split("/")[0].split("_from_"), modalities)
            for panel in overview
        ],
    ]:
        for name in names:
            if name not in known:
                raise ConfigError(unknown(key, name, list(known)))
    data = plain.get("data", {}) if chosen.data is None else chosen.data
    folds = data.get("folds", 1)
    if not isinstance(folds, int) or folds < 1:
        raise ConfigError(f"data.folds ({folds}) must be a whole number of at least 1")
    return Experiment(
        name=plain["name"],
        title=plain.get("title", plain["name"]),
        question=plain.get("question", ""),
        base=plain["base"],
        preset=chosen,
        methods=methods,
        measures=measures,
        main=plain.get("main", next(iter(methods))),
        data=data,
        curves=plain.get("curves", []),
        judge=plain.get("judge"),
        matrices=plain.get("matrices", []),
        watch=plain.get("watch", {}),
        task_words=plain.get("task_words", {}),
        overview=overview,
        goals=goals,
    )


def _filled(value: Any, fold: int) -> Any:
    """Return plain values with the number of a fold for every {fold} in their texts."""
    if isinstance(value, Mapping):
        return {key: _filled(inner, fold) for key, inner in value.items()}
    return value.replace("{fold}", str(fold)) if isinstance(value, str) else value


def _at_size(method: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written of a method with a preset's values for it in their place."""
    overrides = [*method.get("overrides", []), *values.get("overrides", [])]
    return {**method, **values, "overrides": overrides}


def _made(group: str, kind: type, name: str, values: Mapping[str, Any] | None) -> Any:
    known = [field.name for field in dataclasses.fields(kind) if field.name != "name"]
    for key in values or {}:
        if key not in known:
            raise ConfigError(unknown(f"{group}.{name}", key, known, "key"))
    try:
        return kind(name=name, **(values or {}))
    except TypeError as error:
        raise ConfigError(f"{group}.{name}: {error}") from None


def digest(*values: Any) -> str:
    """Return a short name for settings that changes with any of them.

    Dataclasses count by what differs from their reference defaults, so that a new key with a default changes
    no digest. A key whose default is changed later keeps its first one as reference, in its field's metadata
    (`reference`), and cells trained before keep their digest.
    """
    text = json.dumps([_essential(value) for value in values], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _essential(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _essential(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_essential(inner) for inner in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    found = {}
    for part in dataclasses.fields(value):
        made = part.default_factory
        default = part.default if made is dataclasses.MISSING else made()
        default = part.metadata.get("reference", default)
        mine = getattr(value, part.name)
        if dataclasses.is_dataclass(mine) and type(mine) is type(default):
            if section := _essential(mine):
                found[part.name] = section
        elif mine != default:
            found[part.name] = _essential(mine)
    return found
