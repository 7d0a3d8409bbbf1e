"""Masks beside pictures: which file belongs to which picture, and which class each of their pixels has."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdiff_ray.config import ConfigError, decoding
from mmdiff_ray.datasets.pictures import UNREADABLE

SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
INDEX_MODES = ("1", "L", "P", "I", "I;16")
MOST_CLASSES = 256
VOID = 255
"""The stored value of pixels that are neither learned nor measured."""
NAME_SUFFIXES = ("", "_mask", "-mask", "_seg", "_segmentation", "_label", "_labels", "_labelIds", "_gt")
"""What a mask's name has behind its picture's, tried in this order."""


@dataclass(frozen=True)
class MaskFolder:
    """A folder of masks. files: relative stem -> file; values: the pixel value of each class, in order.

    A pixel value is an index (grey and palette files) or a colour packed as red << 16 | green << 8 | blue.
    names, colors: of the classes, where known. void: the value of void pixels in the shards, else None; then
    all pixels whose value is no class are void.
    """

    files: dict[str, Path]
    values: np.ndarray
    colored: bool
    names: list[str] | None = None
    colors: list[list[int]] | None = None
    void: int | None = None

    def facts(self) -> dict[str, Any]:
        """Return the manifest's entry of the column."""
        known = {"names": self.names, "colors": self.colors, "void": self.void}
        return {"kind": "mask", "classes": len(self.values)} | {
            k: v for k, v in known.items() if v is not None
        }

    def read(self, stem: str) -> np.ndarray | None:
        """Return the classes of the mask of a picture, uint8 (H, W), or None where it has none.

        Raises one of UNREADABLE for an unreadable file.
        """
        if stem not in self.files:
            return None
        with decoding(), Image.open(self.files[stem]) as mask:
            values = _values(mask, self.colored)
        order = np.argsort(self.values)
        place = np.searchsorted(self.values, values, sorter=order).clip(max=len(order) - 1)
        classes = order[place]
        known = self.values[classes] == values
        if self.void is None and not known.all():
            raise ValueError(
                f"{self.files[stem]} holds the value {values[~known].flat[0]}, which is no class"
            )
        return np.where(known, classes, self.void or 0).astype(np.uint8)


def find_masks(
    folder: Path,
    stems: Sequence[str],
    suffix: str = "auto",
    ignore: str = "auto",
    palette: Path | None = None,
) -> MaskFolder:
    """Return the masks of the pictures with these relative stems (their paths without suffix).

    The classes are those of the palette, else what all masks hold: indices up to the largest one (0 and 255
    alone: background and foreground; single indices above 255), or the colours. suffix, ignore: as in
    `FolderOptions`. Raises ConfigError if there is no mask, or if they are no masks.
    """
    tried = NAME_SUFFIXES if suffix == "auto" else (suffix,)
    files = match_files("masks", folder, stems, SUFFIXES, tried)
    values, colored, colors = _scan(files.values())
    if palette is not None:
        if not colored:
            raise ConfigError(f"palette: the masks in {folder} hold indices; only masks in colour need one")
        listed = _read_palette(palette)
        return _made(files, list(listed), True, list(listed.values()), None, not values <= listed.keys())
    void = _void(values, ignore, colored)
    values -= void
    names: list[str] | None
    if colored:
        known, names = sorted(values), [f"#{value:06x}" for value in sorted(values)]
    elif values == {0, 255}:
        known, names = [0, 255], ["background", "foreground"]
    else:
        known = sorted(values) if max(values, default=0) > 255 else list(range(max(values, default=0) + 1))
        names = [str(value) for value in known] if max(known) > 255 else None
    if len(known) < 2:
        raise ConfigError(f"masks: every mask in {folder} holds the one class {known[0]}; want two or more")
    return _made(files, known, colored, names, colors, bool(void))


def match_files(
    key: str, folder: Path, stems: Sequence[str], suffixes: Sequence[str], ends: Sequence[str]
) -> dict[str, Path]:
    """Return the relative stem of a picture -> its file in a folder of masks or maps.

    A file's name is its picture's and the first of the `ends` that any file has. Raises ConfigError, naming
    the key, where no file matches.
    """
    if not folder.is_dir():
        hint = "auto, alpha, none or a folder of masks" if key == "masks" else "COLUMN=FOLDER"
        raise ConfigError(f"{key}: no folder {folder}; want {hint}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    matches = ({stem: found[stem + end] for stem in stems if stem + end in found} for end in ends)
    if files := next(filter(None, matches), None):
        return files
    known = ", ".join(f"a/b{end}{suffixes[0]}" for end in ends[:3])
    raise ConfigError(
        f"{key}: no file in {folder} has the relative name of a picture; a picture a/b.jpg wants {known}"
    )


def _made(
    files: dict[str, Path],
    values: list[int],
    colored: bool,
    names: list[str] | None,
    colors: list[list[int]] | None,
    void: bool,
) -> MaskFolder:
    if void and len(values) > VOID:
        raise ConfigError(f"masks: {len(values)} classes and void pixels; want at most {VOID} classes")
    if colored:
        colors = [[value >> 16, value >> 8 & 255, value & 255] for value in values]
    else:
        colors = [colors[value] for value in values] if colors and max(values) < len(colors) else None
    return MaskFolder(files, np.array(values), colored, names, colors, VOID if void else None)


def _void(values: set[int], ignore: str, colored: bool) -> set[int]:
    """Return the pixel values to ignore. Raises ConfigError for a wrong option."""
    if ignore.lower() in ("none", "off"):
        return set()
    if ignore == "auto":
        apart = VOID in values and not colored and values != {0, VOID} and max(values) == VOID
        return {VOID} if apart and max(values - {VOID}) < VOID - 1 else set()
    text = ignore.removeprefix("#")
    try:
        return {int(text, 16 if ignore.startswith("#") else 10)}
    except ValueError:
        raise ConfigError(
            f"ignore: got {ignore!r}, want a value (255), a colour (#ffffff), auto or none"
        ) from None


def _read_palette(file: Path) -> dict[int, str]:
    """Return colour -> name of a palette's lines. Raises ConfigError for what is none."""
    try:
        lines = [line.split(None, 1) for line in file.read_text(encoding="utf8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"palette: cannot read {file}: {error}") from None
    found = {}
    for number, parts in enumerate(lines, 1):
        color = re.fullmatch(r"#?([0-9a-fA-F]{6})", parts[0].rstrip(",;"))
        if not color:
            raise ConfigError(
                f"palette: {file}, line {number}: got {parts[0]!r}, want a colour (#ff0000 car)"
            )
        found[int(color[1], 16)] = parts[1].strip() if len(parts) > 1 else f"#{color[1].lower()}"
    if len(found) < 2 or len(set(found.values())) < len(found):
        raise ConfigError(
            f"palette: {file} holds {len(found)} colours; want two or more with names of their own"
        )
    return found


def _scan(files: Iterable[Path]) -> tuple[set[int], bool, list[list[int]] | None]:
    """Return all pixel values of masks, whether they are colours, and the colours of the first palette file.

    Unreadable files are left to `MaskFolder.read`.
    """
    values: set[int] = set()
    kinds: dict[bool, Path] = {}
    colors = None
    for path in files:
        try:
            with decoding(), Image.open(path) as mask:
                colored = mask.mode not in INDEX_MODES
                values.update(np.unique(_values(mask, colored)).tolist())
                if colors is None and mask.mode == "P" and (flat := mask.getpalette()):
                    colors = [flat[start : start + 3] for start in range(0, len(flat), 3)]
        except UNREADABLE:
            continue
        kinds.setdefault(colored, path)
        if len(values) > MOST_CLASSES:
            raise ConfigError(
                f"masks: more than {MOST_CLASSES} colours up to {path}; a mask has one flat colour or index "
                "per class: save it as PNG, without smoothing"
            )
    if len(kinds) == 2:
        raise ConfigError(f"masks: {kinds[True]} is in colour, {kinds[False]} holds indices; want one kind")
    return values or {0}, True in kinds, colors


def _values(mask: Image.Image, colored: bool) -> np.ndarray:
    """Return the pixel values of a mask, int (H, W)."""
    if not colored:
        return np.asarray(mask).astype(int)
    red, green, blue = np.moveaxis(np.asarray(mask.convert("RGB")).astype(int), -1, 0)
    return red << 16 | green << 8 | blue
