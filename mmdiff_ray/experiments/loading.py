"""Load an experiment from its YAML file."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError, named, shipped
from mmdiff_ray.config.checks import check_name, unknown
from mmdiff_ray.experiments.parts import Best, DataSet, Goal, Measure, Method, Panel, Pictures, Preset
from mmdiff_ray.experiments.spec import Experiment


@dataclass(frozen=True)
class _ExperimentFile:
    """The keys of an experiment's YAML file; `Experiment` documents them."""

    name: str
    base: dict[str, Any]
    presets: dict[str, Any]
    methods: dict[str, Any]
    measures: dict[str, Any]
    title: str = ""
    main: str = ""
    question: str = ""
    data: Any = None
    curves: list[dict[str, Any]] = field(default_factory=list)
    judge: str | None = None
    matrices: list[dict[str, Any]] = field(default_factory=list)
    watch: dict[str, list[str]] = field(default_factory=dict)
    task_words: dict[str, str] = field(default_factory=dict)
    overview: dict[str, Any] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Any] | None = None


def load_experiment(name: str, preset: str) -> Experiment:
    """Load a shipped experiment by name, or any by YAML file. ConfigError names the file and the key."""
    file = shipped.find(name, shipped.EXPERIMENTS)
    if not file.is_file():
        raise ConfigError(unknown("experiment", name, shipped.names(shipped.EXPERIMENTS)))
    plain = configuration.read_yaml(file)
    with named(str(file)):
        return _build(plain, preset)


def _build(plain: Mapping[str, Any], preset: str) -> Experiment:
    known = [one.name for one in dataclasses.fields(_ExperimentFile)]
    for key in plain:
        if key not in known:
            raise ConfigError(unknown("experiment", key, sorted(known), "key"))
    for key in ("name", "base", "presets", "methods", "measures"):
        if not plain.get(key):
            raise ConfigError(f"{key} is missing")
    written = _make(_ExperimentFile, "", {key: value for key, value in plain.items() if value is not None})
    check_name("name", written.name)
    for key in ("presets", "methods", "measures", "best"):
        for name in getattr(written, key):
            check_name(key, name)
    for curve in written.curves:
        check_name("curves", curve.get("name"))
    if preset not in written.presets:
        raise ConfigError(unknown("preset", preset, list(written.presets)))
    chosen = _make(Preset, f"presets.{preset}", written.presets[preset], name=preset)
    methods = _methods(written, chosen)
    data = written.data if chosen.data is None else chosen.data
    parts: dict[str, Any] = {
        "title": written.title or written.name,
        "preset": chosen,
        "methods": methods,
        "main": written.main or next(iter(methods)),
        "measures": {
            name: _make(Measure, f"measures.{name}", values, name=name)
            for name, values in written.measures.items()
        },
        "overview": [
            _make(Panel, f"overview.{name}", values, name=name) for name, values in written.overview.items()
        ],
        "goals": [
            _make(Goal, f"goals.{goal.get('name', '')}", {"name": "", **goal}) for goal in written.goals
        ],
        "best": [_make(Best, f"best.{name}", values, name=name) for name, values in written.best.items()],
        "pictures": written.pictures and _make(Pictures, "pictures", written.pictures),
        "data": [
            _make(DataSet, "data", one)
            for one in (data if isinstance(data, list) else [data] if data else [])
        ],
    }
    rest = {key: value for key, value in vars(written).items() if key not in (*parts, "presets")}
    experiment = Experiment(**rest, **parts)
    _check_references(experiment)
    return experiment


def _methods(written: _ExperimentFile, preset: Preset) -> dict[str, Method]:
    """Return the methods of a preset. Raises ConfigError if it has none."""
    methods = {}
    for name, values in written.methods.items():
        if preset.methods.get(name, {}) is None:
            continue
        own = _make(Method, f"methods.{name}", values, name=name)
        at_preset = preset.methods.get(name) or {}
        whole = {
            **(values or {}),
            **at_preset,
            "overrides": [*own.overrides, *_preset_overrides(name, at_preset)],
        }
        if whole.get("data") is not None:
            whole["data"] = _make(DataSet, f"methods.{name}.data", whole["data"])
        methods[name] = _make(Method, f"methods.{name}", whole, name=name)
    if not methods:
        raise ConfigError(f"presets.{preset.name}.methods removes every method; keep at least one")
    return methods


def _preset_overrides(name: str, at_preset: Mapping[str, Any]) -> list[str]:
    """Return the overrides that a preset adds to a method."""
    if not isinstance(found := at_preset.get("overrides") or [], list):
        raise ConfigError(f"methods.{name}.overrides: got {found!r}, want a list")
    return found


def _check_references(experiment: Experiment) -> None:
    """Raise ConfigError if a key refers to a method, measure, task or modality that does not exist."""
    one, preset = experiment, experiment.preset
    trained = [name for name, method in one.methods.items() if method.model is None]
    sections = (one.base.get(key) for key in ("modalities", "tasks"))
    modalities, tasks = (section if isinstance(section, Mapping) else {} for section in sections)
    references: list[tuple[str, Sequence[str | None], Any]] = [
        (f"presets.{preset.name}.measures", preset.measures or [], one.measures),
        (
            f"presets.{preset.name}.methods",
            [name for name, at in preset.methods.items() if at is not None],
            one.methods,
        ),
        *[(f"methods.{name}.model", [method.model], trained) for name, method in one.methods.items()],
        *[(f"methods.{name}.init", [method.init], trained) for name, method in one.methods.items()],
        *[(f"methods.{name}.teacher", [method.teacher], trained) for name, method in one.methods.items()],
        *[(f"measures.{name}.methods", m.methods or [], one.methods) for name, m in one.measures.items()],
        ("main", [one.main], one.methods),
        ("judge", [one.judge], one.methods),
        ("watch", list(one.watch), one.methods),
        ("task_words", list(one.task_words), tasks),
    ]
    for panel in one.overview:
        references.append((f"overview.{panel.name}.measure", [panel.measure], one.measures))
        instances = panel.figure.split("/")[0].split("_from_")
        references.append((f"overview.{panel.name}.figure", instances, modalities))
    if one.pictures:
        references.append(("pictures.measure", [one.pictures.measure], one.measures))
        references.append(("pictures.methods", one.pictures.methods, trained))
        references.append(("pictures.instances", one.pictures.instances, modalities))
    for best in one.best:
        references.append((f"best.{best.name}.of", best.of, one.methods))
        references.append((f"best.{best.name}.measure", [best.measure], one.measures))
    rows = [*one.methods, *(best.name for best in one.best)]
    for goal in one.goals:
        references.append((f"goals.{goal.name}.measure", [goal.measure], one.measures))
        references.append((f"goals.{goal.name}", [goal.a, goal.b], rows))
    for key, names, known in references:
        for name in names:
            if name is not None and name not in known:
                raise ConfigError(unknown(key, name, list(known)))
    if len({data.folds for data in one.data if data.folds}) > 1:
        raise ConfigError("data: all data sets with folds must have the same number of folds")


def _make(kind: type, where: str, values: Any, **more: Any) -> Any:
    """Build a dataclass from plain values. Raises ConfigError for unknown or missing keys and wrong types."""
    if not isinstance(values or {}, Mapping):
        raise ConfigError(f"{where}: got {values!r}, want a section of names and values")
    known = [one.name for one in dataclasses.fields(kind) if one.name not in more]
    for key in values or {}:
        if key not in known:
            raise ConfigError(unknown(where, key, known, "key"))
    return configuration.options(kind, {**(values or {}), **more}, where)
