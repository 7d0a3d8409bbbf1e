"""What streamed sources share: which of their fields becomes which column, and how."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from mmdiff_ray.config import ConfigError, decoding
from mmdiff_ray.config.checks import unknown
from mmdiff_ray.datasets.base import FILE, BadRow, Streamed, is_off
from mmdiff_ray.datasets.listing import clean
from mmdiff_ray.datasets.maps import MapFormat, formats
from mmdiff_ray.datasets.masks import VOID
from mmdiff_ray.datasets.pictured import Pictured, PictureOptions
from mmdiff_ray.datasets.pictures import UNREADABLE, Picture, open_picture
from mmdiff_ray.modalities.audio import checked_sound
from mmdiff_ray.modalities.image import to_png

KINDS = ("image", "mask", "map", "label", "labels", "text", "vector", "embedding", "audio")
BY_NAME = {"pixels": "image", "mask": "mask", "label": "label", "text": "text"}
"""Our column -> its kind, where a map does not say it."""


@dataclass(frozen=True)
class MappedOptions(PictureOptions):
    """What is read.

    source: files: a path or URI, with * and ? for several, or a folder. map: COLUMN=FIELD or
    COLUMN=FIELD:KIND, several separated by spaces or commas, kinds image, mask, map, label, labels, text,
    vector, embedding, audio; the columns pixels, mask, label and text have theirs by name; without a map it
    is guessed. classes: the names of the labels, separated by commas, or their number; without it all files
    are looked through. mask_classes: the same of the mask, which needs it. ignore: the mask value of pixels
    that are neither learned nor measured, or none. map_range: LOW:HIGH, the known values of real-valued maps,
    which need it; for all maps or COLUMN=VALUE.
    """

    map: str = ""
    classes: str = ""
    mask_classes: str = ""
    ignore: str = "255"


@dataclass(frozen=True)
class Field:
    """A field of the source that becomes a column. facts: the manifest's entry of it; format: of a map."""

    name: str
    kind: str
    facts: Mapping[str, Any]
    format: MapFormat | None = None


class Mapped(Pictured, Streamed):
    """A streamed source whose fields become columns by `options.map`."""

    Options = MappedOptions
    fields: dict[str, Field]

    def __init__(self, options: MappedOptions) -> None:
        super().__init__(options)
        ignore = options.ignore.lower()
        if not ignore.isdecimal() and not is_off(ignore):
            raise ConfigError(f"ignore: got {options.ignore!r}, want a value (255) or none")
        self.ignored = None if is_off(ignore) else int(ignore)
        if options.annotated != 1 or options.part != "all":
            raise ConfigError("annotated and part: a streamed source has no list of rows to choose from")

    def choose_fields(
        self, known: Mapping[str, str], guess: Mapping[str, str], names: Mapping[str, list[str]]
    ) -> None:
        """Set `fields`, column -> field with its facts, by the map, else by a guess.

        known: the source's fields -> their kind, "" for any; guess: column -> field; names: field -> its
        classes, where the source lists them. Raises ConfigError for a map that names no field of the source.
        """
        self.fields = {
            column: replace(field, facts=self._facts(field, names.get(field.name)))
            for column, field in self._chosen(known, guess).items()
        }

    def values_of(self, field: Field) -> Iterable[Any]:
        """Return what the source holds in a field: every label, and of other kinds some value or None."""
        raise NotImplementedError

    def _chosen(self, known: Mapping[str, str], guess: Mapping[str, str]) -> dict[str, Field]:
        words = self.options.map.replace(",", " ").split()
        chosen, kinds = dict(guess) if not words else {}, dict[str, str]()
        for word in words:
            column, _, field = word.partition("=")
            field, _, kind = field.partition(":")
            if not column or not field or kind not in ("", *KINDS):
                raise ConfigError(f"map: got {word!r}, want COLUMN=FIELD or COLUMN=FIELD:{'|'.join(KINDS)}")
            if field not in known:
                raise ConfigError(unknown("map", field, list(known), "field"))
            chosen[column], kinds[column] = field, kind
        found = {}
        for column, field in chosen.items():
            usual = {"number": "label", "vector": "embedding", "texts": "text"}.get(
                known[field], known[field]
            )
            kind = kinds.get(column) or BY_NAME.get(column) or usual
            if kind not in KINDS:
                raise ConfigError(f"map: what is {column}={field}? Want {column}={field}:{'|'.join(KINDS)}")
            several = {"several": True} if (kind, known[field]) == ("text", "texts") else {}
            found[column] = Field(field, kind, {"kind": "text", **several} if kind == "text" else {})
        maps = [column for column, field in found.items() if field.kind == "map"]
        for column, form in formats(maps, self.stated).items():
            if form.limits is None:
                raise ConfigError(
                    f"map_range is missing; state the lowest and the highest value of {column}: "
                    f"map_range={column}=0.5:80"
                )
            found[column] = Field(found[column].name, "map", form.facts(), form)
        if "pixels" not in found:
            raise ConfigError(f"map: no field becomes pixels; want pixels=FIELD, of {', '.join(known)}")
        return found

    def _facts(self, field: Field, names: Iterable[str] | None) -> Mapping[str, Any]:
        """Return the manifest's entry of a field."""
        kind = field.kind
        if kind in ("embedding", "vector"):
            vector = next((value for value in self.values_of(field) if value is not None), ())
            codec = {"codec": f"{field.name} of the source"} if kind == "embedding" else {}
            return {"kind": kind, "dim": int(np.size(vector)), **codec}
        if kind not in ("label", "labels", "mask"):
            return field.facts
        stated = self.options.mask_classes if kind == "mask" else self.options.classes
        if stated:
            named = [name.strip() for name in stated.split(",")]
            names = list(map(str, range(int(stated)))) if stated.isdecimal() else named
        if names is None:
            if kind == "mask":
                raise ConfigError("mask_classes is missing; name the classes of the mask, or their number")
            values = (value for value in self.values_of(field) if value is not None)
            held = {one for value in values for one in self._members(kind, value)}
            if all(isinstance(value, int) for value in held):
                names = list(map(str, range(max(held, default=-1) + 1)))
            else:
                names = sorted({text for value in held if (text := clean(str(value)))})
        found: dict[str, Any] = {"kind": kind, "names": list(names)}
        if kind == "mask":
            found["classes"] = len(found["names"])
            if self.ignored is not None and found["classes"] <= VOID:
                found["void"] = VOID
        return found

    def _members(self, kind: str, value: Any) -> list[Any]:
        """Return the labels in a value: itself, or those of a set as a list or a text."""
        if kind != "labels":
            return [value]
        if isinstance(value, str):
            value = value.split(self.options.labels_separator)
        found = np.atleast_1d(np.asarray(value, dtype=object)).ravel()
        return [one for one in found if not isinstance(one, str) or clean(one)]

    def columns(self) -> dict[str, dict[str, Any]]:
        plain: dict[str, Any] = {"image": {"kind": "image", "channels": 3}, "audio": {"kind": "audio"}}
        return {column: dict(field.facts) or plain[field.kind] for column, field in self.fields.items()}

    def converted(self, values: Mapping[str, Any], name: str = "") -> dict[str, Any] | BadRow:
        """Return a row of field -> value as the columns' values, or what is wrong with it.

        name: of the picture's file, where it is known.
        """
        row: dict[str, Any] = {FILE: name} if name else {}
        column = "pixels"
        try:
            if (value := values.get(self.fields[column].name)) is None:
                return BadRow("no picture")
            picture = open_picture(io.BytesIO(_encoded(value)), self.options.depth)
            for column, field in self.fields.items():
                value = values.get(field.name)
                row[column] = None if value is None else self._column(field, value, picture)
        except UNREADABLE as error:
            return BadRow(f"{column}: {str(error) or type(error).__name__}")
        return row

    def _column(self, field: Field, value: Any, picture: Picture) -> Any:
        """Return a value as its column holds it. picture: the row's, with which masks and maps are turned."""
        match field.kind:
            case "image":
                own = open_picture(io.BytesIO(_encoded(value)), self.options.depth).image
                return to_png(np.asarray(self.frame(own.convert("RGB"), Image.Resampling.BICUBIC)))
            case "mask":
                mask = picture.annotation(self._classes(_encoded(value), field.facts))
                void = field.facts.get("void", 0)
                return to_png(np.asarray(self.frame(mask, Image.Resampling.NEAREST, void)))
            case "label":
                return _label(value, field.facts["names"])
            case "labels":
                return [_label(one, field.facts["names"]) for one in self._members("labels", value)]
            case "embedding" | "vector":
                return np.asarray(value, dtype=np.float32).ravel()
            case "audio":
                return checked_sound(_encoded(value))
            case "map":
                assert field.format is not None, "a map without its format"
                source = value.get("bytes") if isinstance(value, dict) else value
                source = source if isinstance(source, bytes) else np.asarray(source, dtype=np.float32)

                def resize(part: Image.Image) -> Image.Image:
                    return self.frame(picture.annotation(part, "map"), Image.Resampling.BOX)

                return field.format.read(source, resize)
        texts = [
            text for one in (value if isinstance(value, list) else [value]) if (text := str(one).strip())
        ]
        return (texts or None) if field.facts.get("several") else next(iter(texts), None)

    def _classes(self, data: bytes, facts: Mapping[str, Any]) -> Image.Image:
        """Return a mask's picture of classes. Raises one of UNREADABLE."""
        with decoding(), Image.open(io.BytesIO(data)) as mask:
            if mask.mode not in ("1", "L", "P"):
                raise ValueError(f"a mask must hold indices of 8 bits; got mode {mask.mode}")
            classes = np.asarray(mask).astype(np.uint8)
        known = classes < facts["classes"]
        if "void" in facts:
            void = classes == self.ignored
            classes[void] = VOID
            known |= void
        if not known.all():
            raise ValueError(f"got the index {classes[~known].flat[0]}, which is none of {facts['classes']}")
        return Image.fromarray(classes)


def _encoded(value: Any) -> bytes:
    """Return the bytes of a picture's or a sound's file. Raises ValueError where there are none."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError("it holds no bytes of a file")
    return data


def _label(value: Any, names: Sequence[str]) -> Any:
    """Return a label's name or index, or None where there is none. Raises ValueError for an unknown one."""
    label = int(value) if isinstance(value, int | np.integer) else clean(str(value))
    if label is not None and label not in (range(len(names)) if isinstance(label, int) else names):
        raise ValueError(f"got {label!r}, which is none of the {len(names)} classes")
    return label
