"""Values that change during training (`train.changes`)."""

import dataclasses
from typing import Any

from mmdiff_ray.config.errors import ConfigError
from mmdiff_ray.config.loading import load, override, to_plain
from mmdiff_ray.config.schema import Config

LIVE = ("loss.coefficients.", "loss.modalities.", "loss.channels.", "train.learning_rate")
"""Prefixes of keys that may change during training, in addition to the weights of modalities."""


def is_live(key: str) -> bool:
    """Return whether a key may change during training."""
    parts = key.split(".")
    weights = len(parts) >= 4 and parts[0] == "modalities" and parts[2] == "weights"
    return weights or key.startswith(LIVE)


def in_force(config: Config, samples_seen: int) -> Config:
    """Return the configuration at samples_seen, with earlier changes applied and no `train.changes`."""
    plain = dataclasses.replace(config, train=_without(config))
    words = [
        override(key, value)
        for change in config.train.changes
        if change.at <= samples_seen
        for key, value in change.values.items()
    ]
    return load((), words, to_plain(plain)) if words else plain


def next_change(config: Config, samples_seen: int) -> int | None:
    """Return the samples_seen of the next change, or None."""
    return next((change.at for change in config.train.changes if change.at > samples_seen), None)


def check_changes(config: Config) -> None:
    """Raise ConfigError for changes out of order, of keys that cannot change, or to invalid values."""
    before = -1
    for index, change in enumerate(config.train.changes):
        key = f"train.changes[{index}]"
        if change.at <= before:
            raise ConfigError(f"{key}.at ({change.at}) must be above that of the previous change ({before})")
        before = change.at
        for name in change.values:
            if not is_live(name):
                raise ConfigError(
                    f"{key}.values: {name} cannot change during training; keys that can: "
                    f"{', '.join(live + '*' if live.endswith('.') else live for live in LIVE)}, "
                    "modalities.NAME.weights.*"
                )
        try:
            in_force(config, change.at)
        except ConfigError as error:
            raise ConfigError(f"{key}.values: {error}") from None


def _without(config: Config) -> Any:
    return dataclasses.replace(config.train, changes=[])
