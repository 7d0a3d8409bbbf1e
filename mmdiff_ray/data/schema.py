"""The kinds of columns a data set can have: what they accept, how they are stored, what is counted of them.

A kind knows nothing of modalities: several modality types may read the same kind.
"""

import io
import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from mmdiff_ray.config import ConfigError, decoding
from mmdiff_ray.registry import suggestion

Tally = dict[str, np.ndarray]
"""What is counted of a column: arrays that add up over rows and shards."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 6: 4}
MOST_PIXELS = 178_956_970
"""Of a picture: the limit above which PIL takes one for a decompression bomb."""


class Column:
    """One column being written.

    facts: what the manifest says of every row: classes, names, size, dim, codec, and whatever else its
    writer wants to say. A size or dimension that was not given is taken from the first row; every later row
    must fit it.
    """

    kind: ClassVar[str]
    arrow: ClassVar[pa.DataType] = pa.binary()
    """The type of stored values."""
    train_parts: ClassVar[Mapping[str, str]] = {}
    """Part of the tally -> its name when it is counted of the training split alone."""

    def __init__(self, name: str, facts: Mapping[str, Any]) -> None:
        self.name = name
        try:
            self.facts = json.loads(json.dumps(dict(facts)))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"column {name!r}: its facts must be what JSON can hold: {error}") from None

    def accept(self, value: Any) -> tuple[Any, Tally]:
        """Return a value as it is stored, and its tally. Raises ConfigError if it does not fit."""
        raise NotImplementedError

    def to_arrow(self, values: Sequence[Any]) -> pa.Array:
        """Return stored values, None where a row lacks one, as an Arrow array."""
        return pa.array(values, self.arrow)

    def summary(self, tally: Tally) -> dict[str, Any]:
        """Return the manifest's entry: the facts and the statistics of all rows."""
        return {"kind": self.kind, **self.facts, "present": int(tally.get("present", 0))}

    def fix(self, fact: str, value: Any) -> None:
        """Keep a fact of the first row, and hold every later row to it."""
        if self.facts.setdefault(fact, value) != value:
            raise ConfigError(f"{fact} is {value}, want {self.facts[fact]} as given or as in the first row")


class ImageColumn(Column):
    """PNG images, 8 bits, RGB or RGBA, all of one size."""

    kind = "image"

    def accept(self, value: Any) -> tuple[bytes, Tally]:
        channels, size = png_header(value)
        if channels not in (3, 4):
            raise ConfigError("an image must be RGB or RGBA, got a grey one")
        self.fix("channels", channels)
        self.fix("size", size)
        return bytes(value), _present()


class MaskColumn(Column):
    """PNG masks, 8 bits, one channel of class indices, all of one size."""

    kind = "mask"

    def __init__(self, name: str, facts: Mapping[str, Any]) -> None:
        super().__init__(name, facts)
        names = _names(name, facts) if "names" in facts else None
        classes = self.facts.setdefault("classes", len(names or ()))
        if not 2 <= classes <= 256 or (names is not None and len(names) != classes):
            raise ConfigError(
                f"column {name!r} (mask) needs classes from 2 to 256, as many as names; got {classes}"
            )

    def accept(self, value: Any) -> tuple[bytes, Tally]:
        channels, size = png_header(value)
        if channels != 1:
            raise ConfigError(f"a mask must have one channel of class indices (mode L), got {channels}")
        self.fix("size", size)
        with decoding():
            indices = np.asarray(Image.open(io.BytesIO(value)))
        if (void := self.facts.get("void")) is not None:
            indices = indices[indices != void]
        pixels = np.bincount(indices.ravel(), minlength=self.facts["classes"])
        if len(pixels) > self.facts["classes"]:
            raise ConfigError(f"a mask of {self.facts['classes']} classes holds the index {len(pixels) - 1}")
        return bytes(value), {**_present(), "pixels": pixels}

    def summary(self, tally: Tally) -> dict[str, Any]:
        pixels = np.asarray(tally.get("pixels", np.zeros(self.facts["classes"])), dtype=float)
        share = pixels / max(1.0, pixels.sum())
        return {**super().summary(tally), "pixel_share": [round(float(part), 6) for part in share]}


class MapColumn(Column):
    """Maps of real numbers, float16 or float32 (channels, height, width), all of one size, NaN where unknown;
    arrays or .npy files, stored as the latter."""

    kind = "map"

    def __init__(self, name: str, facts: Mapping[str, Any]) -> None:
        super().__init__(name, facts)
        limits = self.facts.get("range")
        if not (isinstance(limits, list) and len(limits) == 2 and limits[0] < limits[1]):
            raise ConfigError(f"column {name!r} (map) needs range, [lowest, highest]; got {limits!r}")

    def accept(self, value: Any) -> tuple[bytes, Tally]:
        is_file = isinstance(value, bytes | bytearray | memoryview)
        values = np.load(io.BytesIO(value)) if is_file else np.asarray(value)
        if values.dtype not in (np.float16, np.float32) or values.ndim != 3:
            raise ConfigError(
                f"a map must be float16 or float32 (channels, height, width), got {values.dtype} of shape "
                f"{values.shape}"
            )
        self.fix("channels", len(values))
        self.fix("size", list(values.shape[1:]))
        known, (low, high) = values[~np.isnan(values)].astype(float), self.facts["range"]
        slack = 1e-3 * (high - low)  # float16 keeps three digits
        if known.size and not low - slack <= known.min() <= known.max() <= high + slack:
            raise ConfigError(
                f"a map spans {known.min():g} to {known.max():g}, outside its range {low:g} to {high:g}"
            )
        buffer = io.BytesIO()
        np.save(buffer, values)
        parts = {"known": known.size, "values": values.size}
        return buffer.getvalue(), {**_present(), **{part: np.asarray(n) for part, n in parts.items()}}

    def summary(self, tally: Tally) -> dict[str, Any]:
        share = float(tally.get("known", 0)) / max(1, int(tally.get("values", 0)))
        return {**super().summary(tally), "known_share": round(share, 6)}


class LatentColumn(Column):
    """Latents of a picture and of its mirror image, float16 (2, channels, height, width), all of one size;
    arrays or .npy files, stored as the latter."""

    kind = "latent"

    def accept(self, value: Any) -> tuple[bytes, Tally]:
        is_file = isinstance(value, bytes | bytearray | memoryview)
        latents = np.load(io.BytesIO(value)) if is_file else np.asarray(value)
        if latents.dtype != np.float16 or latents.ndim != 4 or len(latents) != 2:
            raise ConfigError(
                "latents must be float16 (2, channels, height, width), of a picture and of its mirror image; "
                f"got {latents.dtype} of shape {latents.shape}"
            )
        if not np.isfinite(latents).all():
            raise ConfigError("latents must be finite float16, got NaN or infinity")
        self.fix("channels", latents.shape[1])
        self.fix("size", list(latents.shape[2:]))
        buffer, values = (
            io.BytesIO(),
            latents.astype(float).transpose(1, 0, 2, 3).reshape(latents.shape[1], -1),
        )
        np.save(buffer, latents)
        sums = {
            "sum": values.sum(1),
            "squares": np.square(values).sum(1),
            "cells": np.asarray(values.shape[1]),
        }
        return buffer.getvalue(), {**_present(), **sums}

    def summary(self, tally: Tally) -> dict[str, Any]:
        cells, none = max(1, int(tally.get("cells", 0))), np.zeros(self.facts.get("channels", 0))
        mean = tally.get("sum", none) / cells
        deviation = np.sqrt(np.maximum(tally.get("squares", none) / cells - mean**2, 0))
        parts = {"mean": mean, "deviation": deviation}
        entry = super().summary(tally)
        return entry | {part: [round(float(one), 6) for one in values] for part, values in parts.items()}


class AudioColumn(Column):
    """Sounds, as the bytes of .wav or .flac files."""

    kind = "audio"

    def accept(self, value: Any) -> tuple[bytes, Tally]:
        data = bytes(value) if isinstance(value, bytes | bytearray | memoryview) else b""
        if not (data.startswith(b"RIFF") and data[8:12] == b"WAVE") and not data.startswith(b"fLaC"):
            raise ConfigError(f"want the bytes of a .wav or .flac file, got {type(value).__name__}")
        return data, _present()


class LabelColumn(Column):
    """Categories, given by name or by index."""

    kind = "label"
    arrow = pa.int32()
    train_parts: ClassVar[Mapping[str, str]] = {"counts": "train_counts"}

    def __init__(self, name: str, facts: Mapping[str, Any]) -> None:
        super().__init__(name, facts)
        self._index = {label: index for index, label in enumerate(_names(name, facts))}

    def accept(self, value: Any) -> tuple[int, Tally]:
        index = self._index.get(value) if isinstance(value, str) else operator.index(value)
        if index is None or not 0 <= index < len(self._index):
            names = list(self._index)
            hint = suggestion(value, names) or f"; there are {len(names)}: {', '.join(names[:8])}"
            raise ConfigError(f"unknown label {value!r}{hint}")
        return index, {**_present(), "counts": np.bincount([index], minlength=len(self._index))}

    def summary(self, tally: Tally) -> dict[str, Any]:
        none = np.zeros(len(self._index))
        parts = {part: np.asarray(tally.get(part, none), int).tolist() for part in ("counts", "train_counts")}
        return {**super().summary(tally), **parts}


class LabelsColumn(LabelColumn):
    """Sets of labels, given by names or indices; stored as lists of indices in order."""

    kind = "labels"
    arrow = pa.list_(pa.int32())

    def accept(self, value: Any) -> tuple[list[int], Tally]:  # type: ignore[override]
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ConfigError(f"labels must be a list of names or indices, got {value!r}")
        indices = sorted({super(LabelsColumn, self).accept(label)[0] for label in value})
        counts = np.bincount(np.array(indices, np.int64), minlength=len(self._index))
        return indices, {**_present(), "counts": counts}


class EmbeddingColumn(Column):
    """Vectors of one dimension, stored as fixed-size lists of float32.

    A row without a vector is stored as a list of nulls: pyarrow writes a fixed-size list that is itself null
    but cannot read it back (apache/arrow#35692).
    """

    kind = "embedding"

    def accept(self, value: Any) -> tuple[np.ndarray, Tally]:
        vector = np.asarray(value, dtype=np.float32)
        if vector.ndim != 1 or not len(vector):
            raise ConfigError(f"a value of kind {self.kind} must be one vector, got shape {vector.shape}")
        if not np.isfinite(vector).all():
            raise ConfigError(f"a value of kind {self.kind} must be finite, got NaN or infinity")
        self.fix("dim", len(vector))
        return vector, {**_present(), "norm": np.asarray(math.sqrt(math.fsum(vector.astype(float) ** 2)))}

    def to_arrow(self, values: Sequence[Any]) -> pa.Array:
        dim = self.facts.get("dim", 1)  # unknown as long as no row has had a vector
        absent = np.repeat([value is None for value in values], dim)
        filler = np.zeros(dim, np.float32)
        flat = np.concatenate([filler if value is None else value for value in values])
        return pa.FixedSizeListArray.from_arrays(pa.array(flat, mask=absent), dim)

    def summary(self, tally: Tally) -> dict[str, Any]:
        entry = super().summary(tally)
        return {**entry, "mean_norm": round(float(tally.get("norm", 0.0)) / max(1, entry["present"]), 6)}


class VectorColumn(EmbeddingColumn):
    """Vectors of real numbers, which may have names."""

    kind = "vector"

    def __init__(self, name: str, facts: Mapping[str, Any]) -> None:
        super().__init__(name, facts)
        if "names" in facts:
            self.fix("dim", len(_names(name, facts)))


class TextColumn(Column):
    """Text, for captions and the like. The fact `several` makes it a column of lists of texts."""

    kind = "text"
    arrow = pa.string()

    def accept(self, value: Any) -> tuple[str | list[str], Tally]:
        if not self.facts.get("several"):
            if not isinstance(value, str):
                raise ConfigError(f"text must be a string, got {type(value).__name__}")
            return value, _present()
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"several texts must be a list of one or more strings, got {value!r}")
        return texts, {**_present(), "texts": np.asarray(len(texts))}

    def to_arrow(self, values: Sequence[Any]) -> pa.Array:
        return pa.array(values, pa.list_(self.arrow) if self.facts.get("several") else self.arrow)

    def summary(self, tally: Tally) -> dict[str, Any]:
        texts = {"texts": int(tally.get("texts", 0))} if self.facts.get("several") else {}
        return {**super().summary(tally), **texts}


KINDS: dict[str, type[Column]] = {
    column.kind: column
    for column in (
        *(ImageColumn, MaskColumn, MapColumn, AudioColumn, LatentColumn, LabelColumn, LabelsColumn),
        *(EmbeddingColumn, VectorColumn, TextColumn),
    )
}


def make_column(name: str, facts: Mapping[str, Any]) -> Column:
    """Return a column from its facts. Raises ConfigError for an unknown kind or facts that do not fit it."""
    if name in ("id", "key"):
        raise ConfigError(f"a column cannot be called {name!r}; every row has one already")
    kind = facts.get("kind")
    if kind not in KINDS:
        raise ConfigError(f"column {name!r}: unknown kind {kind!r}; known: {', '.join(KINDS)}")
    return KINDS[kind](name, facts)


def png_header(value: Any) -> tuple[int, list[int]]:
    """Return the channels and the [height, width] of PNG bytes.

    Raises ConfigError unless they are a PNG of 8 bits and mode L, RGB or RGBA.
    """
    if not isinstance(value, bytes | bytearray | memoryview) or bytes(value[:8]) != _PNG or len(value) < 33:
        raise ConfigError(f"want PNG bytes, got {type(value).__name__}")
    width, height = int.from_bytes(value[16:20], "big"), int.from_bytes(value[20:24], "big")
    if not 0 < width * height <= MOST_PIXELS:
        raise ConfigError(f"want a PNG of 1 to {MOST_PIXELS:,} pixels, got {width} x {height}")
    depth, colour = value[24], value[25]
    if depth != 8 or colour not in _PNG_CHANNELS:
        raise ConfigError(
            f"want a PNG of mode L, RGB or RGBA with 8 bits, got colour type {colour} with {depth} bits"
        )
    return _PNG_CHANNELS[colour], [height, width]


def add_tallies(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of tallies."""
    total: Tally = {}
    for tally in tallies:
        for part, amount in tally.items():
            total[part] = total.get(part, 0) + np.asarray(amount)
    return total


def _present() -> Tally:
    return {"present": np.ones((), np.int64)}


def _names(name: str, facts: Mapping[str, Any]) -> list[str]:
    names = facts.get("names") or []
    if not names or len(set(names)) != len(names) or not all(isinstance(label, str) for label in names):
        raise ConfigError(f"column {name!r} needs `names`, a list of different names; got {names!r}")
    return list(names)
