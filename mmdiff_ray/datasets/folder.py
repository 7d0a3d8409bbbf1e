"""Folder: a user's own pictures in nested folders, with masks, labels and captions where there are any."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.base import BadRow, Item, Options, Pipeline, Stage, is_off, is_on, look_stages
from mmdiff_ray.datasets.embedders import has_alpha, make_embedder
from mmdiff_ray.datasets.layouts import Entry, Masks, read_cityscapes, read_coco
from mmdiff_ray.datasets.listing import read_csv
from mmdiff_ray.datasets.masks import find_masks
from mmdiff_ray.modalities.image import to_png

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
LAYOUTS = ("plain", "coco", "cityscapes")
READ_BY = {"masks": "plain", "csv": "plain", "annotations": "coco", "captions": "coco"}
"""Option -> the layout that it belongs to."""
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for files that are cut short, corrupt, absurdly large or no pictures at all."""


@dataclass(frozen=True)
class FolderOptions(Options):
    """What is read, and how.

    source: the folder of pictures, needed. size: pixels a side; the middle square of each picture is used.
    masks: a folder of masks that repeats the pictures' relative names, or alpha, none, or auto: alpha if any
    picture has it. csv: a file with the columns file (relative to source), label and caption, which then
    lists the rows; without it the top-level folders' names are the labels. layout: plain, any folder; coco,
    the pictures that annotations lists, with a class of masks per category; or cityscapes, the folder with
    leftImg8bit and gtFine, 19 classes and unlabelled, labels from the cities; the last two take neither masks
    nor csv. annotations: the COCO file of instances, for layout=coco. captions: the COCO file of captions,
    for layout=coco. look: embedder of the picture over white, which makes the column look:
    efficientnet-lite0, open_clip:MODEL[:weights] or off. embed_captions: embedder of the captions, which
    makes the column caption: minilm, open_clip:MODEL[:weights], on (minilm) or off.
    """

    source: str = ""
    size: int = 64
    masks: str = "auto"
    csv: str | None = None
    layout: str = "plain"
    annotations: str | None = None
    captions: str | None = None
    look: str = "off"
    embed_captions: str = "off"
    bad_limit: int = 10


@registry.register("pipeline", "folder")
class Folder(Pipeline):
    """A folder of pictures, one row each."""

    Options = FolderOptions

    def __init__(self, options: FolderOptions) -> None:
        super().__init__(options)
        if not options.source:
            raise ConfigError("source is missing; name the folder of pictures, for example source=photos")
        if options.size < 8:
            raise ConfigError(f"size ({options.size}) must be at least 8")
        self.source = Path(options.source).expanduser().resolve()
        if not self.source.is_dir():
            raise ConfigError(f"source: no folder {self.source}")
        self.unlisted = 0
        self.entries, drawn = self._listed()
        self.has_alpha = any(_opens_with_alpha(self.source / entry.file) for entry in self.entries)
        self.masks = drawn or self._masks()

    def __getstate__(self) -> dict[str, Any]:
        """Return what workers need; each item brings its own entry."""
        return {**self.__dict__, "entries": []}

    @property
    def description(self) -> str:
        return f"The pictures of the folder {self.source.name}."

    def notes(self) -> list[str]:
        count = self.unlisted
        named = "picture is" if count == 1 else "pictures are"
        return [f"{count:,} {named} not in {self.options.csv} and left out"] if count else []

    @property
    def _mask_folder(self) -> Path | None:
        choice = self.options.masks
        return None if choice in ("auto", "alpha") or is_off(choice) else Path(choice).expanduser().resolve()

    def _listed(self) -> tuple[list[Entry], Masks | None]:
        """Return the pictures, and their masks where the layout has them."""
        options = self.options
        if options.layout not in LAYOUTS:
            raise ConfigError(f"layout: got {options.layout!r}, want one of {', '.join(LAYOUTS)}")
        for key, layout in READ_BY.items():
            if getattr(options, key) not in (None, "auto") and options.layout != layout:
                raise ConfigError(f"{key}: only layout={layout} reads it; got layout={options.layout}")
        if options.layout == "cityscapes":
            return read_cityscapes(self.source)
        if options.layout == "plain":
            return self._entries(), None
        if options.annotations is None:
            raise ConfigError("annotations is missing; name the COCO file of instances: annotations=FILE")
        words = Path(options.captions).expanduser() if options.captions else None
        return read_coco(Path(options.annotations).expanduser(), words)

    def _entries(self) -> list[Entry]:
        entries = list(walk(self.source, self._mask_folder))
        if not entries:
            raise ConfigError(f"source: no picture in {self.source}; known suffixes: {', '.join(SUFFIXES)}")
        if self.options.csv is None:
            return entries
        listed = read_csv(Path(self.options.csv).expanduser(), self.source, entries[0].file)
        named = {os.path.normpath(entry.file) for entry in listed}
        self.unlisted = sum(os.path.normpath(entry.file) not in named for entry in entries)
        return listed

    def _masks(self) -> Masks | None:
        if self.options.masks == "alpha" and not self.has_alpha:
            raise ConfigError(f"masks=alpha, but no picture in {self.source} has an alpha channel")
        folder = self._mask_folder
        return find_masks(folder, [entry.mask for entry in self.entries]) if folder else None

    def columns(self) -> dict[str, dict[str, Any]]:
        columns: dict[str, dict[str, Any]] = {
            "pixels": {"kind": "image", "channels": 4 if self.has_alpha else 3}
        }
        if self._alpha_is_mask:
            columns["alpha"] = {"kind": "mask", "classes": 2, "names": ["background", "foreground"]}
        if self.masks is not None:
            columns["mask"] = self.masks.facts()
        if labels := sorted({entry.label for entry in self.entries if entry.label}):
            columns["label"] = {"kind": "label", "names": labels}
        if any(entry.caption for entry in self.entries):
            columns["text"] = {"kind": "text"}
        return columns

    @property
    def _alpha_is_mask(self) -> bool:
        return self.has_alpha and self.options.masks in ("auto", "alpha")

    def stages(self) -> list[Stage]:
        stages, captions = look_stages(self.options.look), self.options.embed_captions
        if not is_off(captions):
            if not any(entry.caption for entry in self.entries):
                raise ConfigError(
                    f"embed_captions={captions}, but there is no caption; give csv=FILE with a caption column"
                )
            spec = "minilm" if is_on(captions) else captions
            stages.append(Stage("caption", "text", make_embedder(spec, "text")))
        return stages

    def items(self) -> list[Item]:
        return [Item(entry.file, entry) for entry in self.entries]

    def row(self, item: Item) -> dict[str, Any]:
        entry: Entry = item.source
        try:
            return {**self._pictures(entry), **_words(entry)}
        except UNREADABLE as error:
            raise BadRow(str(error) or type(error).__name__) from None

    def _pictures(self, entry: Entry) -> dict[str, Any]:
        picture = open_picture(self.source / entry.file)
        mode = "RGBA" if self.has_alpha else "RGB"
        pixels = np.asarray(_fit(picture.convert(mode), self.options.size, Image.Resampling.BICUBIC))
        row: dict[str, Any] = {"pixels": to_png(pixels)}
        if self._alpha_is_mask:
            row["alpha"] = to_png((pixels[..., 3] >= 128).astype(np.uint8))
        if self.masks is not None:
            row["mask"] = self._mask(self.masks.read(entry.mask), picture.size)
        return row

    def _mask(self, classes: np.ndarray | None, size: tuple[int, int]) -> bytes | None:
        """Return a mask cut and resized like its picture of a size (width, height)."""
        if classes is None:
            return None
        mask = Image.fromarray(classes)
        if mask.size != size:
            raise BadRow(
                f"its mask has {mask.size[0]}x{mask.size[1]} pixels, the picture {size[0]}x{size[1]}"
            )
        return to_png(np.asarray(_fit(mask, self.options.size, Image.Resampling.NEAREST)))


def walk(source: Path, without: Path | None) -> Iterator[Entry]:
    """Yield the pictures under a folder, sorted, labelled by their top-level folder if they lie in one.

    Hidden files and folders are left out, and the folder `without`.
    """
    for path in sorted(source.rglob("*")):
        parts = path.relative_to(source).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.suffix.lower() in SUFFIXES and not hidden and without not in path.parents:
            yield Entry("/".join(parts), parts[0] if len(parts) > 1 else None)


def open_picture(file: Path) -> Image.Image:
    """Return a picture in RGB or RGBA, turned upright. Raises one of UNREADABLE if it cannot be decoded."""
    with Image.open(file) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"{file} has more than 8 bits a channel (mode {image.mode}); convert it")
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGBA" if has_alpha(upright) else "RGB")


def _words(entry: Entry) -> dict[str, Any]:
    words = {"label": entry.label, "text": entry.caption}
    return {column: value for column, value in words.items() if value}


def _fit(image: Image.Image, size: int, method: Image.Resampling) -> Image.Image:
    """Return the middle square of an image, size x size pixels."""
    return ImageOps.fit(image, (size, size), method)


def _opens_with_alpha(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return has_alpha(image)
    except UNREADABLE:
        return False
