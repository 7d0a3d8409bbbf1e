"""Load an experiment from its YAML file."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError, named, shipped
from mmdiff_ray.config.checks import check_name, unknown
from mmdiff_ray.experiments.spec import Best, DataSet, Experiment, Goal, Measure, Method, Panel, Preset


def load_experiment(name: str, preset: str) -> Experiment:
    """Return an experiment by its name or file. Raises ConfigError naming the file and the key."""
    file = shipped.find(name, shipped.EXPERIMENTS)
    if not file.is_file():
        raise ConfigError(unknown("experiment", name, shipped.names(shipped.EXPERIMENTS)))
    plain = configuration.read_yaml(file)
    with named(str(file)):
        return _build(plain, preset)


def _build(plain: Mapping[str, Any], preset: str) -> Experiment:
    known = {one.name for one in dataclasses.fields(Experiment) if one.init} - {"preset"} | {"presets"}
    for key in plain:
        if key not in known:
            raise ConfigError(unknown("experiment", key, sorted(known), "key"))
    for key in ("name", "base", "presets", "methods", "measures"):
        if not plain.get(key):
            raise ConfigError(f"{key} is missing")
    check_name("name", plain["name"])
    for key in ("presets", "methods", "measures", "best"):
        for name in plain.get(key, {}):
            check_name(key, name)
    for curve in plain.get("curves", []):
        check_name("curves", curve.get("name"))
    if preset not in plain["presets"]:
        raise ConfigError(unknown("preset", preset, list(plain["presets"])))
    chosen = _make(Preset, f"presets.{preset}", plain["presets"][preset], name=preset)
    methods = {}
    for name, values in plain["methods"].items():
        if chosen.methods.get(name, {}) is None:
            continue
        own, at_preset = values or {}, chosen.methods.get(name) or {}
        overrides = [*own.get("overrides", []), *at_preset.get("overrides", [])]
        values = {**own, **at_preset, "overrides": overrides}
        methods[name] = _make(Method, f"methods.{name}", values, name=name)
    data = plain.get("data", []) if chosen.data is None else chosen.data
    parts: dict[str, Any] = {
        "preset": chosen,
        "methods": methods,
        "main": plain.get("main", next(iter(methods))),
        "measures": {
            name: _make(Measure, f"measures.{name}", values, name=name)
            for name, values in plain["measures"].items()
        },
        "overview": [
            _make(Panel, f"overview.{name}", values, name=name)
            for name, values in plain.get("overview", {}).items()
        ],
        "goals": [
            _make(Goal, f"goals.{goal.get('name', '')}", {"name": "", **goal})
            for goal in plain.get("goals", [])
        ],
        "best": [
            _make(Best, f"best.{name}", values, name=name) for name, values in plain.get("best", {}).items()
        ],
        "data": [
            _make(DataSet, "data", one)
            for one in (data if isinstance(data, list) else [data] if data else [])
        ],
    }
    rest = {key: value for key, value in plain.items() if key not in (*parts, "presets")}
    experiment = Experiment(**{"title": plain["name"], **rest, **parts})
    _check_references(experiment)
    return experiment


def _check_references(experiment: Experiment) -> None:
    """Raise ConfigError for a name that nothing in the experiment has."""
    one, preset = experiment, experiment.preset
    trained = [name for name, method in one.methods.items() if method.model is None]
    modalities, tasks = one.base.get("modalities", {}), one.base.get("tasks", {})
    references: list[tuple[str, Sequence[str | None], Any]] = [
        (f"presets.{preset.name}.measures", preset.measures or [], one.measures),
        (
            f"presets.{preset.name}.methods",
            [name for name, at in preset.methods.items() if at is not None],
            one.methods,
        ),
        *[(f"methods.{name}.model", [method.model], trained) for name, method in one.methods.items()],
        *[(f"methods.{name}.init", [method.init], trained) for name, method in one.methods.items()],
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


def _make(kind: type, where: str, values: Mapping[str, Any] | None, **more: Any) -> Any:
    """Return a dataclass from plain values. Raises ConfigError for an unknown or missing key."""
    known = [one.name for one in dataclasses.fields(kind) if one.name not in more]
    for key in values or {}:
        if key not in known:
            raise ConfigError(unknown(where, key, known, "key"))
    try:
        return kind(**more, **(values or {}))
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
