"""Maps beside pictures: which file belongs to which picture, and which of its values are known."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.config.checks import unknown
from mmdiff_ray.datasets.masks import match_files
from mmdiff_ray.datasets.pictures import UNREADABLE
from mmdiff_ray.modalities.map import CONTENTS, checked_range, known_within, read_map, resized

SUFFIXES = (".npy", ".png", ".tif", ".tiff")
TAKEN = ("pixels", "alpha", "mask", "label", "labels", "vector", "weight", "text", "sound", "look", "caption")
"""Columns of a folder that no map can be called."""


class Stated(NamedTuple):
    """What options say of all maps, or of some as COLUMN=VALUE, as texts (`FolderOptions`)."""

    content: str
    unit: str
    void: str
    range: str


@dataclass(frozen=True)
class MapFormat:
    """How the numbers of a map's sources are read. limits: the lowest and the highest known value, where
    stated; the rest: as of `read_map`."""

    content: str
    unit: float
    void: float | None
    limits: tuple[float, float] | None

    def facts(self) -> dict[str, Any]:
        """Return the manifest's entry of the column."""
        assert self.limits is not None, "a map's range is not known yet"
        unit = {} if self.unit == 1 else {"unit": self.unit}
        return {"kind": "map", "range": list(self.limits), "content": self.content, **unit}

    def load(self, source: Path | bytes | np.ndarray) -> np.ndarray:
        """Return a map in its own size, float32 (C, h, w), unknown outside the limits."""
        values = read_map(source, self.content, self.unit, self.void)
        return values if self.limits is None else known_within(values, *self.limits)

    def read(
        self, source: Path | bytes | np.ndarray, resize: Callable[[Image.Image], Image.Image]
    ) -> np.ndarray:
        """Return a map, float32 (C, h, w). resize: as of `resized`. Raises one of UNREADABLE."""
        return resized(self.load(source), resize, self.content)


@dataclass(frozen=True)
class MapFolder:
    """A folder of maps. files: relative stem of a picture -> the file of its map."""

    files: dict[str, Path]
    format: MapFormat


def find_maps(folders: Mapping[str, Path], stems: Sequence[str], stated: Stated) -> dict[str, MapFolder]:
    """Return column -> the maps of the pictures with these relative stems (their paths without suffix).

    folders: column -> the folder of its maps. A file is called like its picture, or has _COLUMN behind the
    name. A range that is not stated is that of all files. Raises ConfigError if a folder has no map of a
    picture, or for a wrong option.
    """
    found = {}
    for column, form in formats(folders, stated).items():
        folder = folders[column]
        ends = ("", f"_{column}", f"-{column}")
        files = match_files("maps", folder, stems, SUFFIXES, ends)
        if form.limits is None:
            form = replace(form, limits=_span(files.values(), form, folder))
        found[column] = MapFolder(files, form)
    return found


def formats(columns: Collection[str], stated: Stated) -> dict[str, MapFormat]:
    """Return column -> how its maps are read, as the options state it. Raises ConfigError for a wrong one."""
    texts = {key: _by_column(f"map_{key}", text, columns) for key, text in stated._asdict().items()}
    found = {}
    for column in columns:
        content = texts["content"].get(column, "values")
        if content not in CONTENTS:
            raise ConfigError(unknown("map_content", content, CONTENTS))
        unit = _number("map_unit", texts["unit"].get(column, "1"))
        void = _number("map_void", texts["void"][column]) if column in texts["void"] else None
        limits = (-1.0, 1.0) if content == "normals" else None
        if column in texts["range"]:
            limits = checked_range(texts["range"][column].split(":"), "map_range")
        found[column] = MapFormat(content, unit, void, limits)
    return found


def folders_of(text: str, place: Callable[[str], Path]) -> dict[str, Path]:
    """Return column -> the folder that the option `maps` names: COLUMN=FOLDER, several separated by commas.

    place: text -> a path. Raises ConfigError for other text, or a column that is taken.
    """
    named = _by_column("maps", text, ())
    for column in named:
        if column in TAKEN:
            raise ConfigError(f"maps: a map cannot be called {column}; taken are: {', '.join(TAKEN)}")
    return {column: place(folder) for column, folder in named.items()}


def _by_column(key: str, text: str, columns: Collection[str]) -> dict[str, str]:
    """Return column -> what an option states of it. A value without a column is for all; no columns: any."""
    found: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        column, separator, value = part.partition("=")
        if not separator and columns:
            found |= dict.fromkeys(columns, part)
        elif not separator or not value:
            raise ConfigError(f"{key}: got {part!r}, want COLUMN=FOLDER, as depth=photos/depth")
        elif columns and column not in columns:
            raise ConfigError(unknown(key, column, columns, "map"))
        else:
            found[column] = value
    return found


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{key}: got {text!r}, want a number") from None


def _span(files: Iterable[Path], form: MapFormat, folder: Path) -> tuple[float, float]:
    """Return the lowest and the highest known value of all files; unreadable ones are left for later."""
    low, high = math.inf, -math.inf
    for file in files:
        try:
            values = form.load(file)
        except UNREADABLE:
            continue
        if not np.isnan(values).all():
            low, high = min(low, float(np.nanmin(values))), max(high, float(np.nanmax(values)))
    if not low < high:
        raise ConfigError(f"maps: the files in {folder} hold no two different known values")
    return low, high
