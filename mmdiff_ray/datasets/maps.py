"""Maps beside pictures: which file belongs to which picture, and which of its values are known."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
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
TAKEN = ("pixels", "alpha", "mask", "label", "labels", "vector", "text", "look", "caption")
"""Columns of a folder that no map can be called."""


class Stated(NamedTuple):
    """What options say of all maps, or of some as COLUMN=VALUE, as texts (`FolderOptions`)."""

    content: str
    unit: str
    void: str
    range: str


@dataclass(frozen=True)
class MapFolder:
    """A folder of maps. files: relative stem -> file; limits: the lowest and the highest known value; the
    rest: as of `read_map`."""

    files: dict[str, Path]
    content: str
    unit: float
    void: float | None
    limits: tuple[float, float] = (-1.0, 1.0)

    def facts(self) -> dict[str, Any]:
        """Return the manifest's entry of the column."""
        unit = {} if self.unit == 1 else {"unit": self.unit}
        return {"kind": "map", "range": list(self.limits), "content": self.content, **unit}

    def load(self, stem: str) -> np.ndarray:
        """Return the map of a picture as its file has it, float32 (C, h, w)."""
        return read_map(self.files[stem], self.content, self.unit, self.void)

    def read(self, stem: str, resize: Callable[[Image.Image], Image.Image]) -> np.ndarray | None:
        """Return the map of a picture, float32 (C, h, w), or None where it has none.

        resize: as of `resized`. Raises one of UNREADABLE for an unreadable file.
        """
        if stem not in self.files:
            return None
        return resized(known_within(self.load(stem), *self.limits), resize, self.content)


def find_maps(folders: str, stems: Sequence[str], stated: Stated) -> dict[str, MapFolder]:
    """Return column -> the maps of the pictures with these relative stems (their paths without suffix).

    folders: COLUMN=FOLDER, several separated by commas. A file is called like its picture, or has _COLUMN
    behind the name. A range that is not stated is that of all files. Raises ConfigError if a folder has no
    map of a picture, or for a wrong option.
    """
    places = _by_column("maps", folders, ())
    texts = {key: _by_column(f"map_{key}", text, places) for key, text in stated._asdict().items()}
    found = {}
    for column, place in places.items():
        if column in TAKEN:
            raise ConfigError(f"maps: a map cannot be called {column}; taken are: {', '.join(TAKEN)}")
        folder = Path(place).expanduser().resolve()
        ends = ("", f"_{column}", f"-{column}")
        files = match_files("maps", folder, stems, SUFFIXES, ends)
        content = texts["content"].get(column, "values")
        if content not in CONTENTS:
            raise ConfigError(unknown("map_content", content, CONTENTS))
        unit = _number("map_unit", texts["unit"].get(column, "1"))
        void = _number("map_void", texts["void"][column]) if column in texts["void"] else None
        maps = MapFolder(files, content, unit, void)
        limits = texts["range"].get(column)
        if limits is not None:
            span = checked_range(limits.split(":"), "map_range")
        else:
            span = maps.limits if content == "normals" else _span(maps, folder)
        found[column] = MapFolder(files, content, unit, void, span)
    return found


def folders_of(text: str) -> list[Path]:
    """Return the folders that the option `maps` names."""
    return [Path(place).expanduser().resolve() for place in _by_column("maps", text, ()).values()]


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


def _span(maps: MapFolder, folder: Path) -> tuple[float, float]:
    """Return the lowest and the highest known value of all maps; unreadable files are left to `read`."""
    low, high = math.inf, -math.inf
    for stem in maps.files:
        try:
            values = maps.load(stem)
        except UNREADABLE:
            continue
        if not np.isnan(values).all():
            low, high = min(low, float(np.nanmin(values))), max(high, float(np.nanmax(values)))
    if not low < high:
        raise ConfigError(f"maps: the files in {folder} hold no two different known values")
    return low, high
