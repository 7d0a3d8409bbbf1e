"""`build` runs a pipeline: raw source -> multi-modal shards, as a Ray Data program or in this process."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmdiff_ray import config, registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.journal import RESTART
from mmdiff_ray.data.manifest import Manifest, is_built
from mmdiff_ray.data.shards import ShardWriter
from mmdiff_ray.datasets.annotations import annotated, lacking
from mmdiff_ray.datasets.base import FILE, BadRow, Item, Made, Options, Pipeline, Streamed, is_off
from mmdiff_ray.datasets.latents import LatentStage
from mmdiff_ray.distributed import flow
from mmdiff_ray.distributed.display import show_progress
from mmdiff_ray.storage.filesystem import check_writable

CHUNK = 32
"""Items that travel, and are embedded, together."""
FEWEST_BAD = 10
"""How many unreadable items any share tolerates."""


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
                names = row["key"], row.pop(FILE, "")
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
