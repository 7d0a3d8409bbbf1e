"""Folders in the layouts of COCO and Cityscapes: the pictures that they list, and the masks of these."""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from mmdiff_ray.config import ConfigError, decoding
from mmdiff_ray.data.entries import is_count
from mmdiff_ray.data.schema import MOST_PIXELS
from mmdiff_ray.datasets.embedders import need


class Entry(NamedTuple):
    """One picture. file: relative to the source, with / between folders; drawn: what its mask is read from,
    where that is not a file of the picture's name; split, group: as of `Item`; labels: the set of labels;
    numbers: the vector; weight: of one number, how often it is drawn, relative to others."""

    file: str
    label: str | None = None
    captions: tuple[str, ...] = ()
    drawn: Any = None
    split: str | None = None
    group: str | None = None
    labels: tuple[str, ...] | None = None
    numbers: tuple[float, ...] | None = None
    weight: tuple[float, ...] | None = None

    @property
    def mask(self) -> Any:
        """Return what `Masks.read` takes: `drawn`, or the relative path without its suffix."""
        return Path(self.file).with_suffix("").as_posix() if self.drawn is None else self.drawn


def inside(name: str, folder: Path) -> str:
    """Return a file's name relative to a folder as it is. Raises ValueError for one that leads out of it."""
    place = os.path.normpath(os.path.join(folder, name))
    if not name or "\0" in name or os.path.commonpath([place, folder]) != str(folder):
        raise ValueError(f"{name!r} is no file in {folder}")
    return name


class Masks(Protocol):
    """The masks of pictures. void: the value of pixels that are neither learned nor measured, if any."""

    @property
    def void(self) -> int | None: ...

    def facts(self) -> dict[str, Any]:
        """Return the manifest's entry of the column."""

    def read(self, mask: Any) -> np.ndarray | None:
        """Return the classes of a mask, uint8 (H, W), or None where a picture has none. mask: `Entry.mask`.

        Raises OSError or ValueError for an unreadable one.
        """


# --- COCO ---------------------------------------------------------------------------------------------------


BACKGROUND = "background"


class Drawing(NamedTuple):
    """What is drawn on one picture. outlines: (class from 1, polygons or runs), large ones first."""

    height: int
    width: int
    outlines: tuple[tuple[int, Any], ...]


@dataclass(frozen=True)
class CocoMasks:
    """Masks drawn from annotations. names: of the categories; class 0 is what none of them covers."""

    names: tuple[str, ...]
    void = None

    def facts(self) -> dict[str, Any]:
        return {"kind": "mask", "classes": 1 + len(self.names), "names": [BACKGROUND, *self.names]}

    def read(self, mask: Drawing) -> np.ndarray:
        size = mask.height, mask.width
        if not all(map(is_count, size)) or not 0 < mask.height * mask.width <= MOST_PIXELS:
            raise ValueError(f"want a height and width of 1 to {MOST_PIXELS:,} pixels together, got {size}")
        classes = np.zeros(size, np.uint8)
        for index, outline in mask.outlines:
            try:
                with decoding():
                    draw = _draw_runs if isinstance(outline, dict) else _draw_polygons
                    classes[draw(outline, *size)] = index
            except ValueError as error:
                raise ValueError(f"its outline of class {self.names[index - 1]!r}: {error}") from None
        return classes


def _draw_polygons(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """Return what polygons [x, y, x, y, ...] cover, bool (H, W). pycocotools crashes at far points."""
    far = 4 * max(height, width)
    if not all(abs(float(number)) <= far for points in polygons for number in points):
        raise ValueError(f"its points lie far outside of the picture of {width}x{height} pixels")
    tool = need("pycocotools.mask", "coco")
    return tool.decode(tool.merge(tool.frPyObjects(polygons, height, width))) > 0


def _draw_runs(outline: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """Return what runs cover, bool (H, W): counts of pixels outside and inside by turns, down the columns."""
    counts = outline["counts"]
    counts = _unpacked(counts) if isinstance(counts, str) else counts
    if list(outline["size"]) != [height, width]:
        raise ValueError(f"its size is {outline['size']}, the picture's [{height}, {width}]")
    if not all(map(is_count, counts)) or sum(counts) != height * width:
        raise ValueError(f"its runs do not add up to {height}x{width} pixels")
    inside = np.arange(len(counts)) % 2 == 1
    return inside.repeat(counts).reshape(width, height).T


def _unpacked(text: str) -> list[int]:
    """Return the counts in packed runs: 6 bits a character from "0" on, 5 of them of a number and one that
    says that more follow; from the fourth count on, a number is the difference to the one before the last."""
    counts: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("its packed runs are damaged")
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (bits & 16) << (shift - 4)  # the sign
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    if shift:
        raise ValueError("its packed runs are cut short")
    return counts


def read_coco(
    annotations: Path, source: Path, captions: Path | None = None
) -> tuple[list[Entry], CocoMasks, list[str]]:
    """Return the pictures that a COCO file of instances lists, their masks of one class per category, and
    notes.

    Classes follow the categories' ids; categories of the same name are one class. An object without an
    outline is drawn as its box; one without either is left out and counted. Where annotations overlap, the
    smaller one (`area`) lies on top; a picture without any is background. captions: a COCO file of captions,
    kept in the order of their ids. source: the folder of the pictures. Raises ConfigError for other
    files.
    """
    need("pycocotools.mask", "coco")
    content = _read_json("annotations", annotations, ("images", "annotations", "categories"))
    try:
        names, classes, notes = _classes(content["categories"])
        found: dict[int, list[Any]] = defaultdict(list)
        lost = 0
        for annotation in sorted(content["annotations"], key=lambda one: -float(one.get("area") or 0)):
            outline = _outline(annotation)
            if outline is None:
                lost += 1
            else:
                found[annotation["image_id"]].append((classes[annotation["category_id"]], outline))
        if lost:
            notes.append(f"{lost:,} of {len(content['annotations']):,} objects have neither outline nor box")
        words = _captions(captions) if captions else {}
        entries = [
            Entry(
                inside(image["file_name"], source),
                captions=tuple(words.get(image["id"], ())),
                drawn=Drawing(image["height"], image["width"], tuple(found[image["id"]])),
            )
            for image in content["images"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"annotations: {annotations} is no COCO file of instances ({type(error).__name__}: {error})"
        ) from None
    if not entries or not names:
        raise ConfigError(
            f"annotations: {annotations} lists {len(entries)} images and {len(names)} categories; want both"
        )
    return entries, CocoMasks(names), notes


def _classes(categories: list[Any]) -> tuple[tuple[str, ...], dict[int, int], list[str]]:
    """Return the names of the classes from 1, category id -> class, and notes on what was merged or
    renamed."""
    names: list[str] = []
    classes, notes = {}, []
    for category in sorted(categories, key=lambda category: category["id"]):
        name = str(category["name"]).strip()
        if name == BACKGROUND:
            name = f"{BACKGROUND} (category)"
            notes.append(f"the category {BACKGROUND!r} is called {name!r}: class 0 has its name")
        if name in names:
            notes.append(f"categories of the name {name!r} are one class")
        else:
            names.append(name)
        classes[category["id"]] = 1 + names.index(name)
    return tuple(names), classes, notes


def _outline(annotation: Mapping[str, Any]) -> Any:
    """Return the polygons or runs of an object, or its box as a polygon; None where it has neither."""
    outline = annotation.get("segmentation")
    if isinstance(outline, dict):
        return outline
    polygons: list[Any] = [part for part in outline or () if len(part) >= 6]  # three points or more
    if polygons:
        return polygons
    box: list[Any] = annotation.get("bbox") or []
    if len(box) != 4 or not (box[2] > 0 and box[3] > 0):
        return None
    left, top, width, height = map(float, box)
    return [[left, top, left + width, top, left + width, top + height, left, top + height]]


def _captions(file: Path) -> dict[int, list[str]]:
    """Return image id -> its captions."""
    content = _read_json("captions", file, ("annotations",))
    try:
        found: dict[int, list[str]] = defaultdict(list)
        for one in sorted(content["annotations"], key=lambda one: one["id"]):
            if caption := one["caption"].strip():
                found[one["image_id"]].append(caption)
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"captions: {file} is no COCO file of captions ({type(error).__name__}: {error})"
        ) from None


def _read_json(key: str, file: Path, parts: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        with decoding():
            content = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: cannot read {file}: {error}") from None
    has = sorted(content) if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise ConfigError(f"{key}: {file} holds {has}; want a COCO file with lists of {', '.join(parts)}")
    return content


# --- Cityscapes ---------------------------------------------------------------------------------------------

PICTURES, LABELS = "leftImg8bit", "gtFine"
CITYSCAPES = {
    7: ("road", 0x804080),
    8: ("sidewalk", 0xF423E8),
    11: ("building", 0x464646),
    12: ("wall", 0x66669C),
    13: ("fence", 0xBE9999),
    17: ("pole", 0x999999),
    19: ("traffic light", 0xFAAA1E),
    20: ("traffic sign", 0xDCDC00),
    21: ("vegetation", 0x6B8E23),
    22: ("terrain", 0x98FB98),
    23: ("sky", 0x4682B4),
    24: ("person", 0xDC143C),
    25: ("rider", 0xFF0000),
    26: ("car", 0x00008E),
    27: ("truck", 0x000046),
    28: ("bus", 0x003C64),
    31: ("train", 0x005064),
    32: ("motorcycle", 0x0000E6),
    33: ("bicycle", 0x770B20),
}
"""The 19 ids of the benchmark -> name and colour, as its authors give them; all other ids are class 0."""


@dataclass(frozen=True)
class CityscapesMasks:
    """Masks of the 19 classes of the benchmark and, class 0, all that it leaves out. source: the folder."""

    source: Path
    void = None

    def facts(self) -> dict[str, Any]:
        colors = [[0, 0, 0]] + [[c >> 16, c >> 8 & 255, c & 255] for _, c in CITYSCAPES.values()]
        names = ["unlabelled", *[name for name, _ in CITYSCAPES.values()]]
        return {"kind": "mask", "classes": len(names), "names": names, "colors": colors}

    def read(self, mask: str) -> np.ndarray | None:
        file = self.source / mask
        if not mask or not file.is_file():
            return None
        with decoding(), Image.open(file) as image:
            ids = np.asarray(image)
        if ids.ndim != 2 or ids.dtype != np.uint8:
            raise ValueError(f"{file} must hold ids of 8 bits; got mode {image.mode}")
        classes = np.zeros(256, np.uint8)
        classes[list(CITYSCAPES)] = np.arange(1, 1 + len(CITYSCAPES))
        return classes[ids]


def read_cityscapes(source: Path) -> tuple[list[Entry], CityscapesMasks]:
    """Return the pictures of a Cityscapes folder, labelled by their city, and their masks.

    leftImg8bit/PART/CITY/NAME_leftImg8bit.png has its mask in gtFine/PART/CITY/NAME_gtFine_labelIds.png; the
    part "test", whose masks are not published, has none. Raises ConfigError where there is no such picture.
    """
    entries = []
    for path in sorted(source.glob(f"{PICTURES}/*/*/*_{PICTURES}.png")):
        part, city, name = path.parts[-3:]
        mask = f"{LABELS}/{part}/{city}/{name.removesuffix(f'_{PICTURES}.png')}_{LABELS}_labelIds.png"
        file = path.relative_to(source).as_posix()
        entries.append(Entry(file, city, drawn=mask if part != "test" else ""))
    if not entries:
        raise ConfigError(
            f"source: {source} has no {PICTURES}/PART/CITY/NAME_{PICTURES}.png, the layout of Cityscapes"
        )
    return entries, CityscapesMasks(source)
