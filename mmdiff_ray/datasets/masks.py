"""Masks beside pictures: which file belongs to which picture, and which class each of their pixels has."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdiff_ray.config import ConfigError

SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
INDEX_MODES = ("1", "L", "P", "I", "I;16")
MOST_CLASSES = 256


@dataclass(frozen=True)
class MaskFolder:
    """A folder of masks. files: relative stem -> file; values: the pixel value of each class, in order.

    A pixel value is an index (grey and palette files) or a colour packed as red << 16 | green << 8 | blue.
    """

    files: dict[str, Path]
    values: np.ndarray
    colored: bool

    def facts(self) -> dict[str, Any]:
        """Return the manifest's entry of the column."""
        facts: dict[str, Any] = {"kind": "mask", "classes": len(self.values)}
        if self.colored:
            colors = [[value >> 16, value >> 8 & 255, value & 255] for value in self.values.tolist()]
            return {**facts, "names": [f"#{value:06x}" for value in self.values.tolist()], "colors": colors}
        if self.values.tolist() == [0, 255]:
            return {**facts, "names": ["background", "foreground"]}
        return facts

    def read(self, stem: str) -> np.ndarray | None:
        """Return the classes of the mask of a picture, uint8 (H, W), or None where it has none.

        Raises OSError for an unreadable file.
        """
        if stem not in self.files:
            return None
        with Image.open(self.files[stem]) as mask:
            values = _values(mask, self.colored)
        return np.searchsorted(self.values, values).astype(np.uint8)


def find_masks(folder: Path, stems: Iterable[str]) -> MaskFolder:
    """Return the masks of the pictures with these relative stems (their paths without suffix).

    The classes are what all of them hold: indices up to the largest one (0 and 255 alone: background and
    foreground), or the colours. Raises ConfigError if there is none, or if they are no masks.
    """
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in _files(folder)}
    files = {stem: found[stem] for stem in stems if stem in found}
    if not files:
        raise ConfigError(
            f"masks: no file in {folder} has the relative name of a picture; "
            "a picture a/b.jpg wants the mask a/b.png there"
        )
    values, colored = _scan(files.values())
    if colored or values == {0, 255}:
        known = np.array(sorted(values))
    else:
        known = np.arange(max(values) + 1)
    if len(known) < 2:
        raise ConfigError(f"masks: every mask in {folder} holds the one class {known[0]}; want two or more")
    return MaskFolder(files, known, colored)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"masks: no folder {folder}; want auto, alpha, none or a folder of masks")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _scan(files: Iterable[Path]) -> tuple[set[int], bool]:
    """Return all pixel values of masks and whether they are colours; unreadable files are left to `read`."""
    values: set[int] = set()
    kinds: dict[bool, Path] = {}
    for path in files:
        try:
            with Image.open(path) as mask:
                colored = mask.mode not in INDEX_MODES
                values.update(np.unique(_values(mask, colored)).tolist())
        except OSError:
            continue
        kinds.setdefault(colored, path)
        if len(values) > MOST_CLASSES:
            raise ConfigError(
                f"masks: more than {MOST_CLASSES} colours up to {path}; a mask has one flat colour or index "
                "per class: save it as PNG, without smoothing"
            )
    if len(kinds) == 2:
        raise ConfigError(f"masks: {kinds[True]} is in colour, {kinds[False]} holds indices; want one kind")
    return values or {0}, True in kinds


def _values(mask: Image.Image, colored: bool) -> np.ndarray:
    """Return the pixel values of a mask, int (H, W)."""
    if not colored:
        return np.asarray(mask).astype(int)
    red, green, blue = np.moveaxis(np.asarray(mask.convert("RGB")).astype(int), -1, 0)
    return red << 16 | green << 8 | blue
