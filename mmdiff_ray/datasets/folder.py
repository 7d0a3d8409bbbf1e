"""Folder: a user's own pictures in nested folders, with masks, labels and captions where there are any."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.base import BadRow, Item, is_off
from mmdiff_ray.datasets.layouts import Entry, Masks, read_cityscapes, read_coco
from mmdiff_ray.datasets.listing import NAMES, Columns, read_table, sound_beside, split_by_folder, walk
from mmdiff_ray.datasets.maps import find_maps, folders_of
from mmdiff_ray.datasets.masks import find_masks
from mmdiff_ray.datasets.pictured import Pictured, PictureOptions
from mmdiff_ray.datasets.pictures import SUFFIXES, UNREADABLE, is_transparent, open_picture
from mmdiff_ray.datasets.raw import RawFiles
from mmdiff_ray.modalities.audio import checked_sound
from mmdiff_ray.modalities.image import to_png

LAYOUTS = ("plain", "coco", "cityscapes")
READ_BY = dict.fromkeys(("masks", "maps", "metadata", "csv"), "plain") | {
    "annotations": "coco",
    "captions": "coco",
}
"""Option -> the layout that it belongs to."""


@dataclass(frozen=True)
class FolderOptions(PictureOptions):
    """What is read.

    source: the folder of pictures, needed; like all files and folders here a path or a URI
    (s3://bucket/photos). A .wav or .flac file beside a picture with the same name becomes the column sound.
    masks: a folder of masks that repeats the pictures' relative names, or alpha, none, or auto: alpha if any
    picture has a transparent pixel. mask_suffix: what a mask's name has behind its picture's, such as _mask;
    auto finds it. palette: a text file with a colour and a name per line (#ff0000 car), the classes of masks
    in colour in their order; other colours are void. ignore: the mask value of pixels that are neither
    learned nor measured, such as 255; auto takes 255 where it lies apart from all classes; none. maps:
    folders of real-valued maps in .npy files or 16-bit pictures that repeat the pictures' relative names:
    COLUMN=FOLDER, several separated by commas. map_range: LOW:HIGH; values outside are unknown; by default
    that of all files. metadata: a table (.csv, .tsv, .jsonl, .parquet) with the columns file, label and
    caption, which then lists the rows; metadata.csv and the like in the source is found without it. Without a
    table the top-level folders' names are the labels, and train, val and test are splits. csv: the former
    name of metadata. labels_column: the table's column with several labels per row, the column labels; an
    empty cell is the empty set. vector_columns: the table's columns of numbers that make the column vector,
    separated by commas. weight_column: the table's column of numbers that makes the column weight, for
    data.weight. caption_lines: which lines of the text file beside a picture are captions: all or first.
    split_column: the table's column with each row's split. group_by: the table's column with what rows of one
    split share, such as a patient. val_source: a folder with the pictures of the validation split. layout:
    plain, any folder; coco, the pictures that annotations lists, with a class of masks per category; or
    cityscapes, the folder with leftImg8bit and gtFine, 19 classes and unlabelled, labels from the cities; the
    last two take neither masks nor metadata. annotations: the COCO file of instances, for layout=coco.
    captions: the COCO file of captions, for layout=coco.
    """

    masks: str = "auto"
    mask_suffix: str = "auto"
    palette: str | None = None
    ignore: str = "auto"
    maps: str = ""
    metadata: str | None = None
    csv: str | None = None
    labels_column: str | None = None
    vector_columns: str | None = None
    weight_column: str | None = None
    caption_lines: str = "all"
    split_column: str | None = None
    group_by: str | None = None
    val_source: str | None = None
    layout: str = "plain"
    annotations: str | None = None
    captions: str | None = None


@registry.register("pipeline", "folder")
class Folder(Pictured):
    """A folder of pictures, one row each."""

    Options = FolderOptions

    def __init__(self, options: FolderOptions) -> None:
        super().__init__(options)
        if options.caption_lines not in ("all", "first"):
            raise ConfigError(f"caption_lines: got {options.caption_lines!r}, want all or first")
        self.raw = RawFiles()
        self.source = self.raw.place(options.source)
        if not self.source.is_dir():
            raise ConfigError(f"source: no folder {self.source}")
        self.remarks: list[str] = []
        self.map_folders = folders_of(options.maps, self.raw.place)
        self.entries, drawn = self._listed()
        self.has_alpha = any(is_transparent(self.source / entry.file) for entry in self.entries)
        self.masks = drawn or self._masks()
        self.maps = find_maps(self.map_folders, [entry.mask for entry in self.entries], self.stated)

    def __getstate__(self) -> dict[str, Any]:
        """Return what workers need; each item brings its own entry."""
        return {**super().__getstate__(), "entries": []}

    @property
    def description(self) -> str:
        return f"The pictures of the folder {self.source.name}."

    def notes(self) -> list[str]:
        return [*self.remarks, *_alike({entry.label for entry in self.entries if entry.label})]

    @property
    def _mask_folder(self) -> Path | None:
        choice = self.options.masks
        return None if choice in ("auto", "alpha") or is_off(choice) else self.raw.place(choice)

    def _listed(self) -> tuple[list[Entry], Masks | None]:
        """Return the pictures, and their masks where the layout has them."""
        options = self.options
        if options.layout not in LAYOUTS:
            raise ConfigError(f"layout: got {options.layout!r}, want one of {', '.join(LAYOUTS)}")
        for key, layout in READ_BY.items():
            if getattr(options, key) not in (None, "auto", "") and options.layout != layout:
                raise ConfigError(f"{key}: only layout={layout} reads it; got layout={options.layout}")
        if options.layout == "cityscapes":
            return read_cityscapes(self.source)
        if options.layout == "plain":
            return self._entries(), None
        if options.annotations is None:
            raise ConfigError("annotations is missing; name the COCO file of instances: annotations=FILE")
        words = self.raw.place(options.captions) if options.captions else None
        entries, masks, self.remarks = read_coco(self.raw.place(options.annotations), self.source, words)
        return entries, masks

    def _entries(self) -> list[Entry]:
        options, held_out = self.options, []
        if options.val_source:
            folder = self.raw.place(options.val_source)
            held_out = [
                entry._replace(file=os.path.relpath(folder / entry.file, self.source), split="val")
                for entry in self._walked(folder)
            ]
        found = [
            entry for entry in self._walked(self.source) if entry.file not in {one.file for one in held_out}
        ]
        if not found:
            raise ConfigError(f"source: no picture in {self.source}; known suffixes: {', '.join(SUFFIXES)}")
        table = self._table()
        if table is None:
            for key in ("split_column", "group_by", "labels_column", "vector_columns", "weight_column"):
                if getattr(options, key):
                    raise ConfigError(f"{key}: only a table has columns; name it: metadata=FILE")
            return [*split_by_folder(found), *(entry._replace(split="val") for entry in held_out)]
        names = [entry.file for entry in found]
        columns = Columns(
            *(options.split_column, options.group_by, options.labels_column, options.weight_column),
            *(options.labels_separator, self._numbers),
        )
        listed = read_table(table, self.source, names, columns)
        unlisted = len(set(names) - {entry.file for entry in listed})
        if unlisted:
            named = "picture is" if unlisted == 1 else "pictures are"
            self.remarks.append(f"{unlisted:,} {named} not in {table.name} and left out")
        return [*listed, *held_out]

    @property
    def _numbers(self) -> tuple[str, ...]:
        """Return the table's columns that make the vector."""
        return tuple(filter(None, map(str.strip, (self.options.vector_columns or "").split(","))))

    def _table(self) -> Path | None:
        """Return the table of the pictures: the named one, or one that lies beside them."""
        if named := self.options.metadata or self.options.csv:
            return self.raw.place(named)
        return next((self.source / name for name in NAMES if (self.source / name).is_file()), None)

    def _walked(self, folder: Path) -> list[Entry]:
        without = [*self.map_folders.values(), *([self._mask_folder] if self._mask_folder else [])]
        entries, skipped = walk(folder, without, 1 if self.options.caption_lines == "first" else None)
        if skipped:
            counts = ", ".join(f"{count:,} {what}" for what, count in sorted(skipped.items()))
            self.remarks.append(f"skipped: {counts}")
        return entries

    def _masks(self) -> Masks | None:
        options, folder = self.options, self._mask_folder
        if options.masks == "alpha" and not self.has_alpha:
            raise ConfigError(f"masks=alpha, but no picture in {self.source} has a transparent pixel")
        if not folder:
            return None
        palette = self.raw.place(options.palette) if options.palette else None
        stems = [entry.mask for entry in self.entries]
        return find_masks(folder, stems, options.mask_suffix, options.ignore, palette)

    def columns(self) -> dict[str, dict[str, Any]]:
        columns: dict[str, dict[str, Any]] = {
            "pixels": {"kind": "image", "channels": 4 if self.has_alpha else 3}
        }
        if self._alpha_is_mask:
            columns["alpha"] = {"kind": "mask", "classes": 2, "names": ["background", "foreground"]}
        if self.masks is not None:
            columns["mask"] = self.masks.facts()
        columns |= {column: maps.format.facts() for column, maps in self.maps.items()}
        if labels := sorted({entry.label for entry in self.entries if entry.label}):
            columns["label"] = {"kind": "label", "names": labels}
        if self.options.labels_column:
            names = sorted({name for entry in self.entries for name in entry.labels or ()})
            columns["labels"] = {"kind": "labels", "names": names}
        if self._numbers:
            columns["vector"] = {"kind": "vector", "names": list(self._numbers)}
        if any(entry.weight for entry in self.entries):
            columns["weight"] = {"kind": "vector", "dim": 1}
        if most := max((len(entry.captions) for entry in self.entries), default=0):
            columns["text"] = {"kind": "text"} | ({"several": True} if most > 1 else {})
        if any(sound_beside(self.source / entry.file) for entry in self.entries):
            columns["sound"] = {"kind": "audio"}
        return columns

    @property
    def _alpha_is_mask(self) -> bool:
        return self.has_alpha and self.options.masks in ("auto", "alpha")

    def items(self) -> list[Item]:
        return [Item(entry.file, entry, entry.group, entry.split) for entry in self.entries]

    def row(self, item: Item) -> dict[str, Any]:
        self.raw.copy_here()
        entry: Entry = item.source
        texts = list(entry.captions) if len(entry.captions) > 1 else next(iter(entry.captions), None)
        words = {"label": entry.label or None, "text": texts}
        values = {**words, "labels": entry.labels, "vector": entry.numbers, "weight": entry.weight}
        known = {column: value for column, value in values.items() if value is not None}
        try:
            return {**self._pictures(entry), **known}
        except UNREADABLE as error:
            raise BadRow(str(error) or type(error).__name__) from None

    def _pictures(self, entry: Entry) -> dict[str, Any]:
        picture = open_picture(self.source / entry.file, self.options.depth)
        mode = "RGBA" if self.has_alpha else "RGB"
        pixels = np.asarray(self.frame(picture.image.convert(mode), Image.Resampling.BICUBIC))
        row: dict[str, Any] = {"pixels": to_png(pixels)}
        if sound := sound_beside(self.source / entry.file):
            row["sound"] = checked_sound(sound.read_bytes())
        if self._alpha_is_mask:
            row["alpha"] = to_png((pixels[..., 3] >= 128).astype(np.uint8))
        if self.masks is not None and (classes := self.masks.read(entry.mask)) is not None:
            mask = picture.annotation(Image.fromarray(classes))
            row["mask"] = to_png(np.asarray(self.frame(mask, Image.Resampling.NEAREST, self.masks.void or 0)))

        def resize(part: Image.Image) -> Image.Image:
            return self.frame(picture.annotation(part, "map"), Image.Resampling.BOX)

        for column, maps in self.maps.items():
            if file := maps.files.get(entry.mask):
                row[column] = maps.format.read(file, resize)
        return row


def _alike(labels: Iterable[str]) -> list[str]:
    """Return a note for labels that differ in case alone; they stay different classes."""
    groups: dict[str, list[str]] = {}
    for label in sorted(labels):
        groups.setdefault(label.casefold(), []).append(label)
    found = [group for group in groups.values() if len(group) > 1]
    return [f"labels that differ only in case are different classes: {', '.join(group)}" for group in found]


@dataclass(frozen=True)
class CocoOptions(FolderOptions):
    """layout: coco, which needs annotations."""

    layout: str = "coco"


@registry.register("pipeline", "coco")
class Coco(Folder):
    """The pictures and masks of COCO's annotations: source, annotations, captions."""

    Options = CocoOptions


@dataclass(frozen=True)
class CityscapesOptions(FolderOptions):
    """layout: cityscapes, whose folder is the source."""

    layout: str = "cityscapes"


@registry.register("pipeline", "cityscapes")
class Cityscapes(Folder):
    """The pictures and masks of a folder in the layout of Cityscapes."""

    Options = CityscapesOptions
