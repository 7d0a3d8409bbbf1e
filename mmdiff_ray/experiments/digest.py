"""Digests of settings: cells or measurements with equal digests have the same result."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mmdiff_ray.config import Config


def training_digest(config: Config) -> str:
    """Return the digest of the settings that the trained model depends on.

    Ignores storage, evaluation, tracking, workers and logging, and every key at its reference default (see
    `digest`).
    """
    default = Config()
    train = {
        key: getattr(default.train, key)
        for key in ("log_every_samples", "device", "compile", "channels_last")
    }
    data = dataclasses.replace(
        config.data, bad_row_limit=default.data.bad_row_limit, cache_mb=default.data.cache_mb
    )
    ignored = ("name", "runs", "tracking", "evaluate", "workers", "checkpoint")
    rest = {key: getattr(default, key) for key in ignored}
    return digest(
        dataclasses.replace(config, train=dataclasses.replace(config.train, **train), data=data, **rest)
    )


def digest(*values: Any) -> str:
    """Return 16 hex digits that change with any setting.

    Only differences from the reference defaults of a dataclass are hashed, so adding a key with a default
    keeps all digests. If the default of a key changes, put the old one in the field's metadata as
    `reference`: existing cells then keep their digest.
    """
    text = json.dumps([_essential(value) for value in values], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _essential(value: Any) -> Any:
    """Return plain values, leaving out keys at their reference defaults."""
    if isinstance(value, Mapping):
        return {str(key): _essential(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_essential(inner) for inner in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    found = {}
    for field in dataclasses.fields(value):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        default = field.metadata.get("reference", default)
        own = getattr(value, field.name)
        if dataclasses.is_dataclass(own) and type(own) is type(default):
            if section := _essential(own):
                found[field.name] = section
        elif own != default:
            found[field.name] = _essential(own)
    return found
