"""What every dataset pipeline is made of.

A pipeline lists the items of its source and turns one item into one row; embedding stages add columns made by
a frozen encoder. `datasets.build` runs them.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from mmdiff_ray.config import OneLine
from mmdiff_ray.datasets.embedders import Embedder, make_embedder
from mmdiff_ray.datasets.vectors import OwnVectors

FILE = "__file__"
"""The key of a row's file name on its way to the writer: no column, since a user's may be called `file`."""


class Item(NamedTuple):
    """One item of a source.

    key: stable, unique, the row's name. source: what `row` needs, cheap to send. group: rows of the same
    group land in the same split. split: the row's split; by default the options' shares decide it.
    annotated: whether the row keeps the columns of `Pipeline.annotations`.
    """

    key: str
    source: Any
    group: str | None = None
    split: str | None = None
    annotated: bool = True


class BadRow(OneLine):
    """An item that cannot be read. `build` counts and reports it, and stops above `bad_limit`."""


@dataclass(frozen=True)
class Options:
    """What every pipeline can be told.

    limit: build only so many items, a stable random choice. bad_limit: unreadable items tolerated before the
    build stops: a number, or a share such as 1%, but at least 10. val_share: the share of rows that go to the
    validation split, where the source names none. test_share: the share of rows that go to the test split;
    the validation rows are the same for any test_share. annotated: the share of training rows that keep their
    annotations (masks, labels), the same share of each class; the rest have none. lacks: the columns that the
    rest lacks, separated by commas; all annotations where it names none. subset: another number draws other
    rows. part: all training rows, or only the annotated, or only the rest. latent: the folder of an
    autoencoder (config.json, diffusion_pytorch_model.safetensors), which makes the column latent of the
    pictures over white.
    """

    limit: int | None = None
    bad_limit: str = "0"
    val_share: float = 0.1
    test_share: float = 0.0
    annotated: float = 1.0
    lacks: str = ""
    subset: int = 0
    part: str = "all"
    latent: str = "off"


class Made(NamedTuple):
    """What a chunk of items became. rows: in the items' order; bad: key -> why the item could not be read."""

    rows: list[dict[str, Any]]
    bad: dict[str, str]


@dataclass(frozen=True)
class Stage:
    """An embedding stage: `column` holds the embedder's vectors of column `source` (image or text)."""

    column: str
    source: str
    embedder: Embedder

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return the manifest's entry of the column."""
        return {self.column: {"kind": "embedding", "dim": self.embedder.dim, "codec": self.embedder.codec_id}}

    def __call__(self, made: Made) -> Made:
        """Return a chunk with the column added to its rows; None where a row lacks the source."""
        has = [index for index, row in enumerate(made.rows) if row.get(self.source) is not None]
        vectors = self.embedder([_embeddable(made.rows[index][self.source]) for index in has])
        found: dict[int, np.ndarray] = dict(zip(has, vectors, strict=True))
        rows = [{**row, self.column: found.get(index)} for index, row in enumerate(made.rows)]
        return Made(rows, made.bad)


def look_stages(spec: str) -> list[Stage]:
    """Return the stage that embeds the pictures into the column `look`, in a list; none where it is off.

    spec: as of `make_embedder`. Raises ConfigError for one that is not there.
    """
    return [] if is_off(spec) else [Stage("look", "pixels", make_embedder(spec, "image"))]


def _embeddable(value: bytes | str | list[str]) -> Image.Image | str:
    """Return the picture or text to embed: of several texts the first."""
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    return value if isinstance(value, str) else value[0]


class Pipeline:
    """A source of rows; subclasses register themselves with `registry.register("pipeline", name)`."""

    Options: ClassVar[type[Options]] = Options
    credit: ClassVar[str] = ""
    annotations: ClassVar[tuple[str, ...]] = ()
    """The columns that rows without annotations lack."""
    own_vectors: Sequence[OwnVectors] = ()
    """Vectors that the process that writes joins to rows by their keys or their files' names (`FILE`); never
    sent to workers."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "own_vectors": ()}

    def stratum(self, item: Item) -> str:
        """Return the class of an item, of each of which the same share keeps its annotations."""
        return ""

    @property
    def description(self) -> str:
        """Return what the data set is, one sentence for its manifest."""
        return (type(self).__doc__ or "").split("\n")[0]

    def notes(self) -> list[str]:
        """Return what a person should know once the data set is built, one line each."""
        return []

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return column -> what the manifest says of it, but the stages' columns and own vectors."""
        raise NotImplementedError

    def stages(self) -> Sequence[Any]:
        """Return the stages that hold a model: functions from Made to Made with `columns()`, as `Stage`."""
        return []

    def items(self) -> list[Item]:
        """Return the items of the source, cheaply and in any order."""
        raise NotImplementedError

    def row(self, item: Item) -> dict[str, Any]:
        """Return one item's row without its key: column -> value. Raises BadRow for an unreadable item.

        Values: PNG bytes for images and masks, an index or a name for labels, float32 (dim,) for embeddings,
        str for text, and None where the row lacks the column. `FILE` is no column, but the row's name in
        `own_vectors`.
        """
        raise NotImplementedError


class Streamed(Pipeline):
    """A source of files with many rows each, which are read one after another and never unpacked.

    Its items are files or parts of files; the rows of the item `a` have the keys a#000000, a#000001, ...
    """

    def row(self, item: Item) -> dict[str, Any]:
        raise NotImplementedError("a streamed source has many rows per item")

    def rows(self, item: Item) -> Iterator[dict[str, Any] | BadRow]:
        """Yield the rows of an item without their keys, or what is wrong with one, in the item's order."""
        raise NotImplementedError


def is_off(value: str) -> bool:
    """Return whether an option's text means no."""
    return value.lower() in ("off", "false", "none", "no", "")
