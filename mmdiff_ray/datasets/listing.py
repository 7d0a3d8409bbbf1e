"""A CSV file that lists the pictures of a folder, with their labels and captions."""

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path

from mmdiff_ray.config import ConfigError
from mmdiff_ray.config.checks import unknown
from mmdiff_ray.datasets.layouts import Entry

COLUMNS = ("file", "label", "caption")
NEAR = 0.75
"""How alike a column's name is to one of ours that it is taken for a slip, from 0 to 1."""


def read_csv(file: Path, source: Path, example: str) -> list[Entry]:
    """Return the pictures in `source` that a CSV file lists: its columns file, and label and caption where
    there are any. Other columns are passed over beside a label or a caption.

    example: how a picture there is named. Raises ConfigError for an unreadable file, a missing column, one
    that seems to be a slip of the pen, a picture listed twice, or a list that names no picture that is there.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"csv: cannot read {file}: {error}") from None
    _check_columns(file, columns)
    if "file" not in columns or not rows:
        raise ConfigError(
            f"csv: {file} needs a column 'file' and a row; it has {len(rows)} rows of {columns}"
        )
    names = [Path(row["file"] or "").as_posix() for row in rows]
    if "." in names:
        raise ConfigError(f"csv: {file}, row {names.index('.') + 1}: no file")
    if repeated := len(names) - len(set(names)):
        raise ConfigError(f"csv: {file} lists {repeated} of its files twice; want one row per file")
    if not any((source / name).is_file() for name in names):
        raise ConfigError(
            f"csv: {file} names none of the pictures in {source}; got {names[0]!r}, "
            f"want names relative to that folder, as {example!r}"
        )
    return [Entry(name, row.get("label"), row.get("caption")) for name, row in zip(names, rows, strict=True)]


def _check_columns(file: Path, columns: Sequence[str]) -> None:
    """Raise ConfigError for a column that is like one of ours which is not there, and, where there is no
    label and no caption, for any that is not ours."""
    others = [column for column in columns if column not in COLUMNS]
    lacking = [column for column in COLUMNS if column not in columns]
    for column in others:
        slip = difflib.get_close_matches(column.strip().lower(), lacking, n=1, cutoff=NEAR)
        if slip or ("file" in columns and {"label", "caption"} <= set(lacking)):
            raise ConfigError(unknown(f"csv: {file}", column, COLUMNS, "column"))
