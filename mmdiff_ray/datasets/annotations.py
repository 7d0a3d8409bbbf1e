"""Data sets of which only some training rows are annotated: what a model gains from all the others."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.shards import row_id, split_of

if TYPE_CHECKING:
    from mmdiff_ray.datasets.base import Item, Options, Pipeline

PARTS = ("all", "annotated", "rest")


def lacking(pipeline: "Pipeline") -> tuple[str, ...]:
    """Return the columns that rows without annotations lack. Raises ConfigError for one that cannot be."""
    names = tuple(name.strip() for name in pipeline.options.lacks.split(",") if name.strip())
    for name in names:
        if name not in pipeline.annotations:
            known = ", ".join(pipeline.annotations) or "none"
            raise ConfigError(f"lacks ({name}): not a column of annotations; those are: {known}")
    if pipeline.options.annotated < 1 and not pipeline.annotations:
        raise ConfigError("annotated: the rows have no annotations that could be left out")
    return names or pipeline.annotations


def annotated(items: Sequence["Item"], options: "Options", stratum: Callable[["Item"], str]) -> list["Item"]:
    """Return items, of which a share of the training rows keeps its annotations, and only the wanted part.

    stratum: item -> a class; every class keeps its share, at least one row. Which rows keep theirs depends on
    their keys and `subset` alone, and those of a smaller share are among those of a larger one. Held-out rows
    keep all annotations. Raises ConfigError for a share outside (0, 1] or an unknown part.
    """
    if not 0 < options.annotated <= 1:
        raise ConfigError(f"annotated ({options.annotated:g}) must be above 0 and at most 1")
    if options.part not in PARTS:
        raise ConfigError(f"part ({options.part!r}) must be one of {', '.join(PARTS)}")
    if options.annotated == 1:
        return list(items)
    strata: dict[str, list[Item]] = {}
    for item in items:
        if _split(item, options) == "train":
            strata.setdefault(stratum(item), []).append(item)
    kept = set()
    for members in strata.values():
        order = sorted(members, key=lambda item: _place(item.key, options.subset))
        kept |= {item.key for item in order[: max(1, math.floor(options.annotated * len(order) + 0.5))]}
    found = []
    for item in items:
        mine = item.key in kept
        if _split(item, options) != "train":
            found.append(item)
        elif options.part == "all" or mine == (options.part == "annotated"):
            found.append(item._replace(annotated=mine))
    return found


def _split(item: "Item", options: "Options") -> str:
    return item.split or split_of(row_id(item.group or item.key), options.val_share, options.test_share)


def _place(key: str, subset: int) -> bytes:
    """Return a row's place in the order in which rows keep their annotations."""
    return hashlib.sha256(f"{subset} {key}".encode()).digest()
