"""Configurations that were written by a run, perhaps by an earlier release."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdiff_ray.config.errors import ConfigError
from mmdiff_ray.config.loading import load
from mmdiff_ray.config.schema import Config


def load_saved(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in a file that a run wrote: YAML, or the JSON of a published model, whose
    entry `config` it is. Raises ConfigError as `load` does.

    A run writes every key, so one that is missing is newer than the run: it has the value by which training
    stays what it was, not today's default.
    """
    saved: Any = file
    if Path(file).suffix == ".json":
        try:
            saved = json.loads(Path(file).read_text(encoding="utf8"))["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} holds no configuration: {error!r}") from None
    return load([saved], overrides, base=_references(Config))


def _references(section: type) -> dict[str, Any]:
    """Return the first default of every key whose default has changed since (`reference` in its metadata)."""
    found: dict[str, Any] = {}
    for part in dataclasses.fields(section):
        if "reference" in part.metadata:
            found[part.name] = part.metadata["reference"]
        elif dataclasses.is_dataclass(part.default_factory):
            inner = _references(part.default_factory)  # type: ignore[arg-type]
            if inner:
                found[part.name] = inner
    return found
