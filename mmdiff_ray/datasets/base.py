"""What every dataset pipeline is made of, and `build`, which runs one: raw source -> multi-modal shards.

A pipeline lists the items of its source and turns one item into one row; embedding stages add columns made by
a frozen encoder. `build` runs them as a Ray Data program (or in this process) over one shard writer.
"""

import hashlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from mmdiff_ray import config, registry
from mmdiff_ray.config import ConfigError, OneLine
from mmdiff_ray.data.journal import RESTART
from mmdiff_ray.data.manifest import Manifest, is_built
from mmdiff_ray.data.shards import ShardWriter
from mmdiff_ray.datasets.annotations import annotated, lacking
from mmdiff_ray.datasets.embedders import Embedder, make_embedder
from mmdiff_ray.datasets.latents import LatentStage
from mmdiff_ray.datasets.vectors import OwnVectors
from mmdiff_ray.distributed import flow
from mmdiff_ray.distributed.display import show_progress
from mmdiff_ray.storage.filesystem import check_writable

CHUNK = 32
"""Items that travel, and are embedded, together."""
FEWEST_BAD = 10
"""How many unreadable items any share tolerates."""


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
    """Vectors that the process that writes joins to rows by their keys or their `file`; never sent to
    workers."""

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
        str for text, and None where the row lacks the column. `file` is no column, but the row's name in
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


@dataclass(frozen=True)
class Build:
    """What a build did.

    kept: rows of an interrupted run before it; bad: key -> why an item is unreadable; notes: the pipeline's.
    """

    manifest: Manifest
    written: int
    kept: int
    bad: Mapping[str, str]
    notes: Sequence[str] = ()


def make_pipeline(name: str, options: Mapping[str, Any] | None = None) -> Pipeline:
    """Return a registered pipeline. Raises ConfigError for an unknown name or option, or a wrong value."""
    kind, checked = check_options(name, options)
    return kind(checked)


def check_options(name: str, options: Mapping[str, Any] | None = None) -> tuple[type[Pipeline], Options]:
    """Return the class of a registered pipeline and its options; nothing of the source is looked at. Raises
    ConfigError as `make_pipeline` does."""
    try:
        kind = registry.look_up("pipeline", name)
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from None
    return kind, config.options(kind.Options, dict(options or {}), prefix="")


def build(
    name: str,
    out: str,
    options: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    workers: int = 1,
    labels: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Build:
    """Build the data set of a registered pipeline into the folder URI `out`.

    options: the pipeline's own, as values or text. workers: Ray actors per embedding stage; 0 runs in this
    process without Ray and gives the same rows (embeddings up to rounding). labels: of the nodes of the
    cluster that it runs on. An interrupted build continues
    where it stopped; a finished one is replaced only with `force`.
    Raises ConfigError for what the user can mend.
    """
    check_writable(out)
    pipeline = make_pipeline(name, options)
    stages = pipeline.stages()
    if not is_off(pipeline.options.latent):
        stages = [*stages, LatentStage.of(pipeline.options.latent, pipeline.columns())]
    lacking(pipeline)
    items = pipeline.items()
    if not isinstance(pipeline, Streamed):
        items = annotated(choose(items, pipeline.options.limit), pipeline.options, pipeline.stratum)
    columns = pipeline.columns() | {own.column: own.entry() for own in pipeline.own_vectors}
    writer = ShardWriter(
        out,
        name,
        columns | {name: entry for stage in stages for name, entry in stage.columns().items()},
        description=pipeline.description,
        credit=pipeline.credit,
        val_share=pipeline.options.val_share,
        test_share=pipeline.options.test_share,
        force=force,
    )
    with show_progress(f"{name} -> {out}", len(items), progress) as advance:
        return _write(pipeline, stages, items, writer, workers, labels, advance)


def build_missing(data: Mapping[str, Any]) -> None:
    """Build the data set of a file's `pipeline`, `uri` and `options` in this process if it is not there."""
    if data and not is_built(data["uri"]):
        options = {key: str(value) for key, value in data.get("options", {}).items()}
        build(data["pipeline"], data["uri"], options, workers=0)


def _write(
    pipeline: Pipeline,
    stages: Sequence[Any],
    items: Sequence[Item],
    writer: ShardWriter,
    workers: int,
    labels: Mapping[str, str] | None,
    advance: Callable[[int], None],
) -> Build:
    """Make the rows of the items that the writer lacks and write them, in the items' order."""
    for item in items:
        if item.split and writer.done.get(item.key, item.split) != item.split:
            raise ConfigError(
                f"{writer.uri} holds an interrupted build with {item.key!r} in the split "
                f"{writer.done[item.key]!r}, now {item.split!r}; {RESTART}"
            )
    streamed, most = isinstance(pipeline, Streamed), pipeline.options.limit
    placed = {item.key: (item.split, item.group) for item in items if item.split or item.group}
    kept = len(writer.done) if streamed else sum(item.key in writer.done for item in items)
    size = 1 if streamed else CHUNK
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    if not streamed:  # of a streamed item nobody knows how many rows it has: it is read again
        chunks = [chunk for chunk in chunks if any(item.key not in writer.done for item in chunk)]
        advance(kept)
    bad: dict[str, str] = {}
    written = seen = 0
    with closing(flow.run(partial(render, pipeline), stages, chunks, workers, labels)) as stream:
        for made in stream:
            bad |= made.bad
            seen += len(made.rows) + len(made.bad)
            _check_bad(bad, bad_limit(pipeline.options.bad_limit, seen if streamed else len(items)))
            fresh = [row for row in made.rows if row["key"] not in writer.done]
            if streamed and most is not None:
                fresh = fresh[: max(0, most - kept - written)]
            for row in fresh:
                place = row["key"].rpartition("#")[0] if streamed else row["key"]
                names = row["key"], row.pop("file", "")
                joined = {own.column: own.of(*names) for own in pipeline.own_vectors}
                writer.add(row | joined, *placed.get(place, ()))
            written += len(fresh)
            advance(1 if streamed else len(fresh) + len(made.bad))
            if streamed and most is not None and kept + written >= most:
                break
    unknown = [] if kept else [line for own in pipeline.own_vectors for line in own.note()]
    return Build(writer.close(), written, kept, bad, [*pipeline.notes(), *unknown])


def render(pipeline: Pipeline, chunk: Sequence[Item]) -> Made:
    """Return the rows of a chunk of items, and apart the items that cannot be read."""
    rows: list[dict[str, Any]] = []
    bad: dict[str, str] = {}
    if isinstance(pipeline, Streamed):
        for item in chunk:
            for number, row in enumerate(pipeline.rows(item)):
                if isinstance(row, BadRow):
                    bad[f"{item.key}#{number:06d}"] = str(row)
                else:
                    rows.append({"key": f"{item.key}#{number:06d}", **row})
        return Made(rows, bad)
    for item in chunk:
        try:
            row = {"key": item.key, **pipeline.row(item)}
            rows.append(row if item.annotated else row | dict.fromkeys(lacking(pipeline)))
        except BadRow as error:
            bad[item.key] = str(error)
    return Made(rows, bad)


def bad_limit(text: str, items: int) -> int:
    """Return how many of so many items may be unreadable. Raises ConfigError for what is no number or
    share."""
    share = text.strip().endswith("%")
    try:
        number = float(text.strip().removesuffix("%"))
    except ValueError:
        number = -1.0
    if number < 0 or (not share and not number.is_integer()) or (share and number > 100):
        raise ConfigError(f"bad_limit: got {text!r}, want a number (5) or a share (1%)")
    return max(FEWEST_BAD, int(items * number / 100)) if share else int(number)


def _check_bad(bad: Mapping[str, str], limit: int) -> None:
    if len(bad) > limit:
        listed = "; ".join(f"{key}: {reason}" for key, reason in list(bad.items())[:5])
        raise ConfigError(
            f"{len(bad)} items of the source cannot be read, more than bad_limit ({limit}); mend or remove "
            f"them, or raise bad_limit and they are left out: {listed}"
        )


def choose(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return items in a random order that depends on their keys alone, the first `limit` of them.

    Raises ConfigError for no items or two of the same key.
    """
    if not items:
        raise ConfigError("the source has no items")
    ordered = sorted(items, key=lambda item: hashlib.sha256(item.key.encode()).digest())
    for first, second in itertools.pairwise(ordered):
        if first.key == second.key:
            raise ConfigError(f"two items of the source have the same key {first.key!r}")
    return ordered[:limit]


def is_off(value: str) -> bool:
    """Return whether an option's text means no."""
    return value.lower() in ("off", "false", "none", "no", "")
