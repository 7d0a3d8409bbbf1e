"""Read configurations saved by a run, possibly of an earlier release."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdiff_ray.config.errors import ConfigError
from mmdiff_ray.config.loading import load
from mmdiff_ray.config.schema import Config


def load_saved(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a saved configuration: the YAML of a run, or entry `config` of a published model's JSON.

    A run saves every key, so a missing key is newer than the run. It gets its reference default, with which
    training behaves as before, not the current default. Raises ConfigError like `load`.
    """
    saved: Any = file
    if Path(file).suffix == ".json":
        try:
            saved = json.loads(Path(file).read_text(encoding="utf8"))["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} has no configuration: {error!r}") from None
    return load([saved], overrides, base=_references(Config))


def _references(section: type) -> dict[str, Any]:
    """Return the reference default of every key whose default has changed (`reference` in its metadata)."""
    found: dict[str, Any] = {}
    for part in dataclasses.fields(section):
        if "reference" in part.metadata:
            found[part.name] = part.metadata["reference"]
        elif dataclasses.is_dataclass(part.default_factory):
            inner = _references(part.default_factory)  # type: ignore[arg-type]
            if inner:
                found[part.name] = inner
    return found
