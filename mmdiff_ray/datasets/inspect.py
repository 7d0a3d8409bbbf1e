"""Show what is in a data set: tables of its splits, columns and balance, and a picture of some rows."""

import colorsys
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.bar import Bar
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import Manifest, RowGroup, read_manifest
from mmdiff_ray.data.parquet import read_row_group
from mmdiff_ray.evaluation import tiles
from mmdiff_ray.evaluation.grids import Panel, grid
from mmdiff_ray.modalities.audio import MelSpectrum, read_sound
from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.modalities.map import paint
from mmdiff_ray.modalities.vector import as_text
from mmdiff_ray.storage.filesystem import filesystem, join

Facts = Mapping[str, Any]
Row = Mapping[str, Any]

MOST_BARS = 12
BAR_COLUMNS = 28


def inspect(uri: str, picture: str | Path | None = None, rows: int = 12) -> Path:
    """Print what a data set holds and draw some of its rows; return the picture's file.

    picture: where to draw; by default a file in the working folder that is called like the last part of the
    URI. Raises ConfigError if there is no data set.
    """
    manifest = read_manifest(uri)
    last = Path(filesystem(uri)[1]).name or manifest.name
    path = Path(picture) if picture is not None else Path(f"{last}.png")
    console = Console(highlight=False)
    console.print(tables(uri, manifest))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(draw_rows(uri, rows)))
    console.print(f"\npicture of some rows: {path}")
    return path


# --- tables -----------------------------------------------------------------------------------------


def tables(uri: str, manifest: Manifest) -> Group:
    """Return what the manifest says, for a terminal."""
    facts = [Text(f"{manifest.name}  ", style="bold").append(uri, style="dim")]
    facts += [Text(line) for line in (manifest.description,) if line]
    facts += [Text(line, style="dim") for line in (manifest.credit,) if line]
    facts.append(Text(f"{manifest.created_by}, digest {manifest.digest[:12]}", style="dim"))
    balances = [table for name, column in manifest.columns.items() for table in _balance(name, column)]
    spaced = [
        part for table in (split_table(manifest), column_table(manifest), *balances) for part in ("", table)
    ]
    return Group(*facts, *spaced)


def split_table(manifest: Manifest) -> Table:
    """Return rows, bytes, shards and row groups of each split."""
    table = _table("split", "rows", "share", "size", "shards", "row groups")
    total = sum(split.rows for split in manifest.splits.values())
    for name, split in manifest.splits.items():
        if name == "test" and not split.rows:
            continue
        groups = sum(len(shard.row_groups) for shard in split.shards)
        share = _percent(split.rows / max(1, total))
        size, shards = human_bytes(split.bytes), str(len(split.shards))
        table.add_row(name, f"{split.rows:,}", share, size, shards, str(groups))
    return table


def column_table(manifest: Manifest) -> Table:
    """Return the kind, presence and facts of each column."""
    total = sum(split.rows for split in manifest.splits.values())
    table = _table("column", "kind", "present", "holds", numbers=("present",))
    for name, facts in manifest.columns.items():
        present = _percent(facts["present"] / max(1, total))
        table.add_row(Text(name), facts["kind"], present, Text(describe(facts)))
    return table


def describe(facts: Facts) -> str:
    """Return what a column holds, in a few words."""
    size = "x".join(map(str, facts.get("size", ())))
    match facts["kind"]:
        case "image":
            return f"{size} pixels, {'RGB and alpha' if facts.get('channels') == 4 else 'RGB'}"
        case "mask":
            return f"{size} pixels, {facts['classes']} classes"
        case "map":
            (low, high), channels, known = facts["range"], facts.get("channels", 1), facts["known_share"]
            held = f"{size} pixels, {channels} channel{'s' * (channels > 1)}, {low:g} to {high:g}"
            return held if known == 1 else f"{held}, {_percent(known)} known"
        case "latent":
            return f"{size} cells, {facts.get('channels')} channels by {facts.get('codec', '?')}"
        case "label":
            largest = max(facts["counts"]) / max(1, facts["present"])
            count = len(facts["names"])
            return f"{count} name{'s' * (count > 1)}, the commonest {_percent(largest)}"
        case "labels":
            mean = sum(facts["counts"]) / max(1, facts["present"])
            return f"{len(facts['names'])} names, {mean:.1f} per row"
        case "embedding":
            return f"{facts.get('dim')} numbers by {facts.get('codec', '?')}"
        case "vector":
            return ", ".join(facts.get("names") or [f"{facts.get('dim')} numbers"])
        case "text" if "texts" in facts:
            return f"{facts['texts'] / max(1, facts['present']):.1f} texts per row"
    return ""


def _balance(name: str, facts: Facts) -> Iterator[Table]:
    """Yield a table of bars for a label's rows per name, or a mask's pixels per class."""
    if facts["kind"] in ("label", "labels"):
        counts = facts["counts"]
        shares = [count / max(1, facts["present"]) for count in counts]
        yield _bars(f"{name}: rows per name", facts["names"], shares, [f"{count:,}" for count in counts])
    if facts["kind"] == "mask":
        names = facts.get("names") or [f"class {index}" for index in range(facts["classes"])]
        yield _bars(f"{name}: pixels per class", names, facts["pixel_share"], colors=class_colors(facts))


def _bars(
    title: str,
    names: Sequence[str],
    shares: Sequence[float],
    counts: Sequence[str] = (),
    colors: Sequence[tuple[int, int, int]] = (),
) -> Table:
    """Return the largest shares as bars. counts: a text per name; colors: a swatch per name; or none."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    for justify in ("left", "right", "right" if counts else "left", "left"):
        table.add_column(justify=justify)  # type: ignore[arg-type]
    order = sorted(range(len(names)), key=lambda index: -shares[index])
    for index in order[:MOST_BARS]:
        name = Text("██ ", style="rgb({},{},{})".format(*colors[index])) if colors else Text()
        name.append(names[index], style="default")
        bar = Bar(max(shares) or 1, 0, shares[index], width=BAR_COLUMNS, color="grey62")
        table.add_row(name, _percent(shares[index]), *counts[index : index + 1], bar)
    if len(order) > MOST_BARS:
        rest = sum(shares[index] for index in order[MOST_BARS:])
        table.add_row(f"{len(order) - MOST_BARS} more", _percent(rest))
    return table


def _table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for index, column in enumerate(columns):
        right = column in numbers or (not numbers and index > 0)
        table.add_column(column, justify="right" if right else "left")
    return table


def human_bytes(count: float) -> str:
    """Return a number of bytes for people: 11.6 MB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


# --- the picture ------------------------------------------------------------------------------------


def draw_rows(uri: str, rows: int = 12) -> Image.Image:
    """Return a picture of some rows, spread over the training split, with all columns side by side."""
    manifest = read_manifest(uri)
    drawn = {name: facts for name, facts in manifest.columns.items() if facts["kind"] != "text"}
    picked, others = _pick(uri, manifest, rows)
    panels = [Panel(name, _cells(name, facts, picked, others)) for name, facts in drawn.items()]
    words = [name for name, facts in manifest.columns.items() if facts["kind"] == "text"]
    names = [
        " · ".join(row[name] if isinstance(row[name], str) else row[name][0] for name in words if row[name])
        or row["key"]
        for row in picked
    ]
    total = sum(split.rows for split in manifest.splits.values())
    subtitle = f"{total:,} rows. {manifest.description} {manifest.credit}"
    return grid(panels, manifest.name, subtitle, names=names, blocks=2 if rows > 6 else 1)


def _pick(uri: str, manifest: Manifest, count: int) -> tuple[list[Row], list[Row]]:
    """Return rows taken in turn from row groups spread over the data, and all rows of those row groups."""
    split = next(split for split in manifest.splits.values() if split.rows)
    groups = [shard.row_group(index) for shard in split.shards for index in range(len(shard.row_groups))]
    spread = np.unique(np.linspace(0, len(groups) - 1, min(count, 4)).round().astype(int))
    columns = ["key", *manifest.columns]
    read = [_rows(uri, groups[index], columns) for index in spread]
    everything = [row for turn in itertools.zip_longest(*read) for row in turn if row is not None]
    return everything[:count], everything


def _rows(uri: str, group: RowGroup, columns: Sequence[str]) -> list[Row]:
    try:
        values = read_row_group(uri, group, columns)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{join(uri, group.path)} cannot be read: {error}; build the data again") from None
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _cells(name: str, facts: Facts, rows: Sequence[Row], others: Sequence[Row]) -> np.ndarray:
    """Return one picture per row of a column, uint8 (n, h, w, 3), all of one size."""
    known = [row[name] for row in others if row[name] is not None]
    centre = np.mean(known, axis=0) if facts["kind"] == "embedding" and len(known) > 1 else 0.0
    cells = [tiles.blank_tile() if row[name] is None else _cell(facts, row[name], centre) for row in rows]
    side = max(max(cell.shape) for cell in cells)
    return np.stack([np.asarray(tiles.fit(cell, side)) for cell in cells])


def _cell(facts: Facts, value: Any, centre: Any) -> np.ndarray:
    match facts["kind"]:
        case "image":
            return over_checkerboard(np.asarray(Image.open(io.BytesIO(value)).convert("RGBA")))
        case "mask":
            return paint_mask(np.asarray(Image.open(io.BytesIO(value))), facts)
        case "map":
            return paint(np.load(io.BytesIO(value))[None], facts["range"], facts.get("content", "values"))[0]
        case "audio":
            samples, rate = read_sound(value)
            levels = MelSpectrum((64, 96), rate, max(1e-2, len(samples) / rate)).levels(samples)
            return paint(levels[None, None], (-80, 0), "values")[0]
        case "latent":
            return paint_latent(np.load(io.BytesIO(value))[0], facts)
        case "label":
            return tiles.text_tile(facts["names"][value])
        case "labels":
            return tiles.text_tile(", ".join(facts["names"][index] for index in value) or "none")
        case "embedding":
            return tiles.vector_tile(value - centre)
        case "vector":
            return tiles.text_tile(as_text(value, facts.get("names")))
    raise AssertionError(f"no picture for the kind {facts['kind']!r}")


def over_checkerboard(pixels: np.ndarray) -> np.ndarray:
    """Return RGBA pixels (H, W, 4) over grey and white squares, uint8 (H, W, 3)."""
    height, width = pixels.shape[:2]
    square = max(1, round(max(height, width) / 16))
    odd = (np.arange(height)[:, None] // square + np.arange(width) // square) % 2
    board = np.where(odd[..., None], 255, 226)
    alpha = pixels[..., 3:] / 255
    return np.round(pixels[..., :3] * alpha + board * (1 - alpha)).astype(np.uint8)


def paint_mask(classes: np.ndarray, facts: Facts) -> np.ndarray:
    """Return a mask (H, W) in its classes' colours, over a checkerboard where a class has none or a pixel is
    void, uint8 RGB."""
    colors = np.array(class_colors(facts))
    bare = np.array([color is None for color in facts.get("colors") or [0] * facts["classes"]])
    void = classes == facts.get("void", -1)
    classes = np.where(void, 0, classes)
    opaque = np.where(bare[classes] | void, 0, 255)[..., None]
    return over_checkerboard(np.concatenate([colors[classes], opaque], axis=-1))


def paint_latent(latent: np.ndarray, facts: Facts) -> np.ndarray:
    """Return the first three channels of a latent (C, h, w) as red, green and blue, two deviations either
    side of grey, uint8 RGB."""
    shown = np.resize(latent.astype(float), (3, *latent.shape[1:])).transpose(1, 2, 0)
    mean, deviation = (np.resize(facts[part], 3) for part in ("mean", "deviation"))
    scaled = (shown - mean) / np.maximum(deviation, 1e-6)
    return np.round((scaled + 2) * 63.75).clip(0, 255).astype(np.uint8)


def class_colors(facts: Facts) -> list[tuple[int, int, int]]:
    """Return one colour per class of a mask: the data set's, else black and white for two, else hues."""
    given = facts.get("colors") or [None] * facts["classes"]
    if not any(given) and len(given) == 2:
        return [(20, 20, 24), (245, 245, 245)]
    return [tuple(color) if color else _hue(index) for index, color in enumerate(given)]


def _hue(index: int) -> tuple[int, int, int]:
    """Return a colour for a class: dark grey for the first, then hues that stay apart, however many."""
    if index == 0:
        return (52, 56, 64)
    red, green, blue = colorsys.hls_to_rgb(index * 0.618 % 1, 0.45 + 0.2 * (index % 2), 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)
