"""The pictures of a folder, and tables that list them with their labels, captions, splits and groups."""

import contextlib
import csv
import difflib
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmdiff_ray.config import ConfigError, decoding
from mmdiff_ray.config.checks import unknown
from mmdiff_ray.data.parquet import read_rows
from mmdiff_ray.datasets.layouts import Entry, inside
from mmdiff_ray.datasets.pictures import SUFFIXES

ALIASES = {
    "file": ("file", "filename", "file_name", "path", "image"),
    "label": ("label", "class"),
    "caption": ("caption", "text"),
}
"""Column -> the names that it goes by, in the order in which they count."""
NAMES = tuple(f"metadata.{suffix}" for suffix in ("csv", "jsonl", "parquet"))
"""Tables that are read without being named, in the folder of the pictures."""
NEAR = 0.75
"""How alike a column's name is to one of ours that it is taken for a typo, from 0 to 1."""

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Names of top-level folders that are splits -> the split."""
SOUNDS = (".wav", ".flac")


def walk(
    source: Path, without: Sequence[Path], most_captions: int | None = None
) -> tuple[list[Entry], Counter[str]]:
    """Return the pictures under a folder, sorted, labelled by their top-level folder if they lie in one, and
    the number of other files by reason.

    Hidden files and folders and the folders `without` are neither, nor are sounds beside a picture with the
    same name (`sound_beside`). A text file beside one holds its captions, one per line, of which the first
    `most_captions` are kept.
    """
    entries, skipped = [], Counter[str]()
    for path in sorted(source.rglob("*")):
        parts = path.relative_to(source).parts
        if any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        if any(folder in path.parents for folder in without):
            continue
        if path.suffix.lower() not in SUFFIXES:
            may_lie_beside = path.suffix in (".txt", *SOUNDS)
            beside = may_lie_beside and any(path.with_suffix(one).is_file() for one in SUFFIXES)
            if not beside and path.name not in NAMES:
                skipped[f"{path.suffix or 'suffixless'} files"] += 1
        elif any("\udc80" <= letter <= "\udcff" for letter in "".join(parts)):
            skipped["files whose names are not UTF-8"] += 1
        else:
            label = clean(parts[0]) if len(parts) > 1 else None
            entries.append(Entry("/".join(parts), label, _captions_beside(path, most_captions)))
    return entries, skipped


def sound_beside(picture: Path) -> Path | None:
    """Return the sound beside a picture with the same name, or None."""
    return next((file for suffix in SOUNDS if (file := picture.with_suffix(suffix)).is_file()), None)


def _captions_beside(picture: Path, most: int | None) -> tuple[str, ...]:
    """Return the first lines of the text file beside a picture."""
    beside = picture.with_suffix(".txt")
    return _texts(_decoded(beside.read_bytes()).splitlines())[:most] if beside.is_file() else ()


def _texts(value: Any) -> tuple[str, ...]:
    """Return the captions in a cell of a table: a text, a list of texts, or a JSON list in a text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    texts = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for one in texts if (text := _text(one))))


def split_by_folder(entries: list[Entry]) -> list[Entry]:
    """Return pictures with the split of their top-level folder, if all of these are names of splits."""
    tops = {entry.file.partition("/")[0] for entry in entries}
    if not any("/" in entry.file for entry in entries) or not tops <= SPLITS.keys() or len(tops) < 2:
        return entries
    return [
        entry._replace(split=SPLITS[parts[0]], label=clean(parts[1]) if len(parts) > 2 else None)
        for entry in entries
        for parts in [entry.file.split("/")]
    ]


def _split(name: str | None) -> str | None:
    """Return the split that a table names. Raises ConfigError for another word."""
    if name is not None and name.lower() not in SPLITS:
        raise ConfigError(f"split_column: got {name!r}, want one of {', '.join(SPLITS)}")
    return SPLITS[name.lower()] if name else None


class Columns(NamedTuple):
    """The names of a table's columns. split: of each row; group: what rows of one split share; labels: sets
    of labels, with the separator between them; weight: how often a row is drawn, relative to others; numbers:
    what a vector is made of."""

    split: str | None = None
    group: str | None = None
    labels: str | None = None
    weight: str | None = None
    separator: str = "|"
    numbers: tuple[str, ...] = ()


def read_table(file: Path, source: Path, pictures: Sequence[str], named: Columns) -> list[Entry]:
    """Return the pictures that a table lists: .csv, .tsv or .txt, .jsonl, or .parquet.

    Columns are found by their names in ALIASES, whatever their case. Text files may be in UTF-8, UTF-16 or
    Latin-1, with commas, semicolons or tabs. pictures: those in the folder `source`, by relative path; names
    are matched with / or \\ between folders and in any Unicode normal form. Raises ConfigError for an
    unreadable file, a missing column, a likely typo, a picture listed twice, or a table of other pictures.
    """
    try:
        rows = read_cells(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"metadata: cannot read {file}: {error}") from None
    columns = list(dict.fromkeys(column for row in rows for column in row))
    found = {ours: find_column(columns, names) for ours, names in ALIASES.items()}
    _check_columns(file, columns, found, [*filter(None, named[:4]), *named.numbers])
    if found["file"] is None or not rows:
        raise ConfigError(
            f"metadata: {file} needs a column with the files ({', '.join(ALIASES['file'])}) and a row; it "
            f"has {len(rows)} rows of {columns}"
        )
    known = {normal(name): name for name in pictures}
    entries = []
    for number, row in enumerate(rows, 1):
        name = str(row.get(found["file"]) or "").strip()
        if not name:
            raise ConfigError(f"metadata: {file}, row {number}: no file")
        label, captions = _text(row.get(found["label"] or "")), _texts(row.get(found["caption"] or ""))
        try:
            place = known.get(normal(name)) or inside(Path(name.replace("\\", "/")).as_posix(), source)
        except ValueError as error:
            raise ConfigError(f"metadata: {file}, row {number}: {error}") from None
        held, group = (_text(row.get(column)) if column else None for column in (named.split, named.group))
        labels = _set(row.get(named.labels), named.separator) if named.labels else None
        where = f"{file}, row {number}"
        numbers = _vector("vector_columns", [row.get(column) for column in named.numbers], where)
        weight = _vector("weight_column", [row.get(named.weight)] if named.weight else [], where)
        entry = Entry(place, clean(label), captions, None, _split(held), group, labels, numbers, weight)
        entries.append(entry)
    entries = _merged(entries, file)
    names = [entry.file for entry in entries]
    if not any(os.path.isfile(source / name) for name in names):
        raise ConfigError(
            f"metadata: {file} names none of the pictures in {source}; got {names[0]!r}, "
            f"want names relative to that folder, as {pictures[0]!r}"
        )
    return entries


def _merged(entries: Sequence[Entry], table: Path) -> list[Entry]:
    """Return entries, those that differ in their captions alone as one. Raises ConfigError for others of one
    file."""
    found: dict[str, Entry] = {}
    repeated = 0
    for entry in entries:
        first = found.setdefault(entry.file, entry)
        if first is entry:
            continue
        both = tuple(dict.fromkeys(first.captions + entry.captions))
        alike = first.captions and entry.captions and first._replace(captions=entry.captions) == entry
        repeated += not alike
        found[entry.file] = first._replace(captions=both)
    if repeated:
        raise ConfigError(
            f"metadata: {table} lists {repeated} of its files twice; want one row per file, or rows that "
            "differ in their captions alone"
        )
    return list(found.values())


def clean(label: str | None) -> str | None:
    """Return a label without outer spaces, in one Unicode form; None where nothing is left."""
    return unicodedata.normalize("NFC", label.strip()) or None if label else None


def _set(value: Any, separator: str) -> tuple[str, ...] | None:
    """Return a set of labels, from a list or a text; an empty text is the empty set, None is unknown."""
    if value is None:
        return None
    words = value if isinstance(value, list | tuple) else str(value).split(separator)
    return tuple(sorted({label for word in words if (label := clean(str(word)))}))


def _vector(key: str, values: Sequence[Any], where: str) -> tuple[float, ...] | None:
    """Return numbers, or None where one is missing or there are none. Raises ConfigError for other text."""
    try:
        return None if not values or None in values or "" in values else tuple(map(float, values))
    except ValueError as error:
        raise ConfigError(f"{key}: {where}: {error}") from None


def read_cells(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a table, column -> cell. Raises OSError or ValueError for an unreadable file."""
    with decoding():
        if file.suffix == ".parquet":
            return read_rows(file)
        text = _decoded(file.read_bytes())
        if file.suffix in (".jsonl", ".ndjson"):
            lines = (json.loads(line) for line in text.splitlines() if line.strip())
            return [{str(key): value for key, value in dict(line).items()} for line in lines]
        head = text.partition("\n")[0]
        delimiter = max(",;\t|", key=head.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        return [{key.strip(): value for key, value in row.items() if key is not None} for row in reader]


def _decoded(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column that goes by one of the names."""
    lower = {column.strip().lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def normal(name: str) -> str:
    """Return a relative path with / between folders, in one Unicode form."""
    return unicodedata.normalize("NFC", Path(name.replace("\\", "/")).as_posix())


def _text(value: Any) -> str | None:
    return None if value is None else str(value).strip() or None


def _check_columns(
    file: Path, columns: Sequence[str], found: Mapping[str, str | None], named: Sequence[str]
) -> None:
    """Raise ConfigError for a missing named column, for a likely typo of a column that is not there, and for
    any other column where there is no label and no caption."""
    for column in named:
        if column not in columns:
            raise ConfigError(unknown(f"metadata: {file}", column, columns, "column"))
    lacking = [ours for ours, column in found.items() if column is None]
    for column in columns:
        if column in found.values() or column in named:
            continue
        typo = difflib.get_close_matches(column.strip().lower(), lacking, n=1, cutoff=NEAR)
        if typo or (found["file"] and {"label", "caption"} <= set(lacking) and not named):
            raise ConfigError(unknown(f"metadata: {file}", column, list(ALIASES), "column"))
