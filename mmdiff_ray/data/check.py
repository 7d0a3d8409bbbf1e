"""Check a configuration against the data sets it names, before any worker starts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmdiff_ray import registry
from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.data.manifest import Manifest, read_manifest
from mmdiff_ray.data.reader import in_reading_order
from mmdiff_ray.modalities.base import Modality

SHARED_FACTS = ("kind", "classes", "names", "dim", "codec", "range", "content")
"""What every data set must say alike of a column that a modality reads; sizes may differ."""

Columns = Mapping[str, Mapping[str, Any]]


def read_sources(config: Config) -> list[Manifest]:
    """Return the manifests of `data.sources`. Raises ConfigError if one is missing or there are none."""
    if not config.data.sources:
        raise ConfigError(
            "data.sources is empty; name a data set, for example data.sources: [{uri: data/openmoji}]"
        )
    return [read_manifest(source.uri) for source in config.data.sources]


def resolve_modalities(config: Config, manifests: Sequence[Manifest]) -> Config:
    """Return the configuration with what only the data sets know filled in (classes, dimensions, names).

    A data set may lack a modality's column, its rows then lack the modality; but one must have it, with a
    value in some row. Raises ConfigError where a column is missing or unfit, the data sets disagree, or a
    split that is needed has no rows.
    """
    _check_splits(config, manifests)
    columns = _all_columns(manifests)
    resolved, instances = {}, {}
    for name, options in config.modalities.items():
        resolved[name] = _resolve(name, options, columns, manifests)
        instances[name] = _make(name, resolved[name], config)
        _check_agreement(name, instances[name].columns, config, manifests)
    in_reading_order(instances)
    return dataclasses.replace(config, modalities=resolved)


def _check_splits(config: Config, manifests: Sequence[Manifest]) -> None:
    for source, manifest in zip(config.data.sources, manifests, strict=True):
        if source.weight <= 0:
            raise ConfigError(f"data.sources: the weight of {source.uri} ({source.weight}) must be above 0")
        if not manifest.splits["train"].rows:
            raise ConfigError(f"data.sources: {source.uri} has no rows to train on; build it with more rows")
    split = config.evaluate.split
    if config.evaluate.evaluators and not any(manifest.splits[split].rows for manifest in manifests):
        raise ConfigError(
            f"evaluate.split: the split {split!r} has no rows; build the data with more rows"
            f"{' or a larger test_share' if split == 'test' else ''}, "
            "or set evaluate.split=train or evaluate.evaluators=[]"
        )


def _all_columns(manifests: Sequence[Manifest]) -> Columns:
    """Return every column that has a value in some row, as the first data set that has it describes it."""
    columns: dict[str, Mapping[str, Any]] = {}
    for manifest in manifests:
        for name, entry in manifest.columns.items():
            if entry["present"]:
                columns.setdefault(name, entry)
    return columns


def _resolve(name: str, options: Any, columns: Columns, manifests: Sequence[Manifest]) -> Any:
    try:
        return registry.look_up("modality", options.type).resolve(name, options, columns)
    except ConfigError as error:
        empty = {column for manifest in manifests for column in manifest.columns} - set(columns)
        note = f" (in no row there is a value of: {', '.join(sorted(empty))})" if empty else ""
        raise ConfigError(f"{error}{note}") from None


def _make(name: str, options: Any, config: Config) -> Modality:
    return registry.look_up("modality", options.type)(
        name, options, (config.space.height, config.space.width)
    )


def _check_agreement(
    name: str, columns: Sequence[str], config: Config, manifests: Sequence[Manifest]
) -> None:
    for column in columns:
        having = [
            (source.uri, manifest.columns[column])
            for source, manifest in zip(config.data.sources, manifests, strict=True)
            if manifest.columns.get(column, {}).get("present")
        ]
        for fact in SHARED_FACTS:
            for uri, entry in having[1:]:
                if entry.get(fact) != having[0][1].get(fact):
                    raise ConfigError(
                        f"modalities.{name}: the data sets disagree on {fact} of column {column!r}: "
                        f"{having[0][1].get(fact)!r} in {having[0][0]}, {entry.get(fact)!r} in {uri}; "
                        "build them alike, or drop one of data.sources"
                    )
