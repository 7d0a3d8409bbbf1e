"""Build dataclasses from plain values; check each value against its field's type."""

import copy
import dataclasses
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mmdiff_ray.config.checks import unknown
from mmdiff_ray.config.errors import ConfigError

MISSING = "???"
"""The default of a key that must be set."""
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def fill(schema: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a dataclass from plain values (numbers, text, lists, mappings).

    prefix: the key of the section that the dataclass describes. Raises ConfigError for an unknown or
    missing key, or a value of the wrong type.
    """
    hints = get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for name in values:
        if name not in fields:
            raise ConfigError(unknown(dotted(prefix, str(name)), name, list(fields), "key"))
    filled = {name: _convert(hints[name], value, dotted(prefix, name)) for name, value in values.items()}
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if filled.get(name, MISSING if no_default else field.default) == MISSING:
            raise ConfigError(f"{dotted(prefix, name)}: missing; set it")
    try:
        return schema(**filled)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{prefix}: {error}" if prefix else str(error)) from None


def dotted(*parts: str) -> str:
    """Join the parts of a key with dots."""
    return ".".join(part for part in parts if part)


def _convert(wanted: Any, value: Any, key: str) -> Any:
    """Convert a value to the type of its field."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        first = next(kind for kind in inner if kind is not NoneType)
        return _convert(first, value, key)
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, Mapping):
            known = ", ".join(field.name for field in dataclasses.fields(wanted))
            raise ConfigError(f"{key}: got {value!r}, want a section with some of the keys {known}")
        return fill(wanted, value, key)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key}: got {value!r}, want a list")
        return [_convert(inner[0], entry, f"{key}[{index}]") for index, entry in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}: got {value!r}, want a section of names and values")
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{key}: got {name!r}, want text; put the name in quotes")
        return {name: _convert(inner[1], entry, dotted(key, str(name))) for name, entry in value.items()}
    if wanted in _WANTED:
        return _convert_scalar(wanted, value, key)
    return copy.deepcopy(value)


def _convert_scalar(wanted: type, value: Any, key: str) -> Any:
    """Convert a value to int, float, bool or str. Parses text such as "3" or "true"."""
    try:
        if wanted is str and isinstance(value, str | int | float):
            return str(value)
        if wanted is bool and (isinstance(value, bool) or str(value).lower() in _WORDS):
            return value if isinstance(value, bool) else _WORDS[str(value).lower()]
        is_number = isinstance(value, str | int | float) and not isinstance(value, bool)
        if wanted is int and is_number and (not isinstance(value, float) or value.is_integer()):
            return int(value)
        if wanted is float and is_number:
            return float(value)
    except ValueError:
        pass
    raise ConfigError(f"{key}: got {value!r}, want {_WANTED[wanted]}")
