"""Read a configuration from YAML, JSON and `key=value` overrides, and write it.

The only module that uses omegaconf, for YAML and overrides. `from_plain` works without it.
"""

import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]

from mmdiff_ray import registry
from mmdiff_ray.config import shipped
from mmdiff_ray.config.checks import check, generates, one_of
from mmdiff_ray.config.errors import ConfigError
from mmdiff_ray.config.filling import fill
from mmdiff_ray.config.schema import Config

FORMER_PLUGINS = {"pipelines.scalar_modality": "mmdiff_ray.modalities.vector"}
"""Former plug-ins that are now part of the package. Saved configurations may still list them."""
_ENTRY = re.compile(r"\.\d+(\.|$)|\[")
"""The index in the key of a list entry."""


def load(
    files: Sequence[str | Path | Mapping] = (), overrides: Sequence[str] = (), base: Mapping | None = None
) -> Config:
    """Load and check a configuration: base, then files, then `key=value` overrides; later values win.

    files: YAML files or plain values. base: plain values, such as a saved configuration. A modality set to
    null is removed, with its roles, its coefficient, and the tasks that generate nothing else. Raises
    ConfigError for an unreadable file, an unknown key, a wrong type or an invalid value.
    """
    from omegaconf import OmegaConf

    tree: Any = OmegaConf.create(dict(base or {}))
    for file in files:
        with _as_config_errors("configuration" if isinstance(file, Mapping) else str(file)):
            tree = OmegaConf.merge(tree, file if isinstance(file, Mapping) else _read(Path(file)))
    _override(tree, overrides)
    with _as_config_errors("configuration"):
        plain = OmegaConf.to_container(tree, resolve=True)
    return from_plain(cast(dict[str, Any], plain))


def check_overrides(overrides: Sequence[str]) -> None:
    """Check overrides without a configuration: the form `key=value`, keys and types. Raises ConfigError.

    Modalities, list entries, interpolations and values can only be checked with the configuration.
    """
    from omegaconf import OmegaConf

    tree: Any = OmegaConf.create()
    apart = [word for word in overrides if not _ENTRY.search(word.partition("=")[0]) and "${" not in word]
    _override(tree, apart)
    plain = cast(dict[str, Any], OmegaConf.to_container(tree))
    plain.pop("modalities", None)
    fill(Config, _without(plain, set()))


def from_plain(plain: Mapping[str, Any]) -> Config:
    """Build and check a configuration from plain values, as returned by `to_plain`."""
    values = dict(plain)
    _import_plugins(values.get("plugins") or [])
    modalities = _section(values.pop("modalities", None), "modalities")
    removed = {name for name, value in modalities.items() if value is None}
    config = fill(Config, _without(values, removed))
    typed = {name: _modality(name, value) for name, value in modalities.items() if value is not None}
    config = dataclasses.replace(config, modalities=typed)
    check(config)
    return config


def read_json(file: str | Path) -> Config:
    """Read and check a configuration from a JSON file of plain values, as returned by `to_plain`.

    Raises ConfigError for an unreadable file or an invalid configuration.
    """
    try:
        plain = json.loads(Path(file).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the config file {file}: {error}") from None
    return from_plain(_section(plain, str(file)))


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries, lists and numbers."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return a configuration as YAML text that `load` reads back."""
    return plain_yaml(to_plain(config))


def plain_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML text that `read_yaml` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def flatten(config: Any) -> dict[str, Any]:
    """Return a configuration as a flat dictionary: dotted key -> value."""

    def walk(prefix: str, value: Any):
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            yield prefix, value

    return dict(walk("", to_plain(config)))


def options(schema: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Build a dataclass from plain values. The keys in errors start with `prefix`."""
    return fill(schema, values, prefix)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Return the plain values of any YAML file. Raises ConfigError if it cannot be read."""
    from omegaconf import OmegaConf

    with _as_config_errors(str(file)):
        plain = OmegaConf.to_container(_read(Path(file)), resolve=True)
    return dict(_section(plain, str(file)))


def override(key: str, value: Any) -> str:
    """Return the override `key=value` that `load` reads back."""
    return f"{key}={'null' if value is None else value}"


def parse_value(text: str) -> Any:
    """Parse the value of an override: a number, text or a list."""
    from omegaconf import OmegaConf

    with _as_config_errors(repr(text)):
        tree: Any = OmegaConf.from_dotlist([f"value={text}"])
        return cast(dict[str, Any], OmegaConf.to_container(tree))["value"]


def parse_name(text: str) -> Any:
    """Parse the value of `name=`. Names that look like numbers stay text: 007, 1e3."""
    value = parse_value(text)
    return text if isinstance(value, int | float) else value


def _override(tree: Any, overrides: Sequence[str]) -> None:
    """Apply `key=value` overrides to a tree of values."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {override!r} must have the form key=value")
        with _as_config_errors(f"override {override!r}"):
            if key == "name":
                tree.name = parse_name(text)
                continue
            tree.merge_with_dotlist([override])


def _read(file: Path) -> Any:
    from omegaconf import OmegaConf

    file = shipped.find(file, shipped.CONFIGS, shipped.SWEEPS)
    try:
        tree = OmegaConf.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no config file {file}") from None
    except IsADirectoryError:
        raise ConfigError(f"{file} is a folder, not a config file") from None
    except OSError as error:
        raise ConfigError(f"cannot read the config file {file}: {error.strerror}") from None
    except Exception as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"{file} must be a mapping of keys to values, got a list")
    if isinstance(cast(dict[str, Any], OmegaConf.to_container(tree)).get("name"), int | float):
        tree.name = yaml.load(file.read_text(encoding="utf8"), yaml.BaseLoader)["name"]
    return tree


@contextmanager
def _as_config_errors(where: str) -> Iterator[None]:
    """Convert exceptions of omegaconf and its YAML parser to ConfigError with the location."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{_first_line(error)}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from None
    except Exception as error:  # from whichever YAML parser omegaconf uses
        raise ConfigError(f"{where}: not valid YAML: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _import_plugins(plugins: Any) -> None:
    """Import the plug-in modules. Like `python -m`, this also finds modules in the working folder."""
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        raise ConfigError(f"plugins: got {plugins!r}, want a list of modules, for example [my_modality]")
    if plugins and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for plugin in plugins:
        try:
            importlib.import_module(FORMER_PLUGINS.get(plugin) or plugin)
        except ImportError as error:
            raise ConfigError(f"plugins: cannot import {plugin!r}: {error}") from None


def _section(value: Any, key: str) -> Mapping[str, Any]:
    """Return a section as a mapping, {} for null. Raises ConfigError for other types."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: got {value!r}, want a section of names and values")
    return value


def _without(values: Mapping[str, Any], removed: set[str]) -> dict[str, Any]:
    """Return the values without references to removed modalities, and without tasks set to null.

    Also removes tasks that generate only removed modalities.
    """
    tasks = {}
    for name, row in _section(values.get("tasks"), "tasks").items():
        roles = row.get("roles") if isinstance(row, Mapping) else None
        if not isinstance(roles, Mapping):
            kept = row
        else:
            left = {instance: role for instance, role in roles.items() if instance not in removed}
            kept = {**row, "roles": left} if generates(left) or not generates(roles) else None
        if kept is not None:
            tasks[name] = kept
    result = {**values, "tasks": tasks}
    loss = values.get("loss")
    if isinstance(loss, Mapping):
        for key in ("modalities", "channels"):
            if isinstance(loss.get(key), Mapping):
                left = {name: value for name, value in loss[key].items() if name not in removed}
                loss = {**loss, key: left}
        result["loss"] = loss
    return result


def _modality(name: str, values: Any) -> Any:
    prefix = f"modalities.{name}"
    known = registry.names("modality")
    if not isinstance(values, Mapping) or not isinstance(values.get("type"), str):
        raise ConfigError(f"{prefix} needs a type; registered: {', '.join(known)}")
    one_of(f"{prefix}.type", values["type"], known)
    return fill(registry.look_up("modality", values["type"]).Options, values, prefix)
