"""A user's own embeddings: a table of vectors whose names are those of rows."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmdiff_ray.config import ConfigError, decoding
from mmdiff_ray.datasets.embedders import file_hash
from mmdiff_ray.datasets.listing import ALIASES, find_column, normal, read_cells

KEYS = ("key", *ALIASES["file"], "name", "id")
"""What the column of names in a table goes by."""
WRONG = "embeddings: got {!r}, want COLUMN=FILE.npy,KEYS or COLUMN=FILE.npz, several separated by semicolons"
SHOWN = 3
CHECKED_ROWS = 4096


class OwnVectors:
    """The vectors of a file, by name; they are read as rows ask for them.

    file: .npy of shape (N, D) beside a file with N names (text, .csv, .jsonl, .parquet or a JSON list), or
    .npz with both. Raises ConfigError for files that are not, or vectors that are not finite or are 0.
    """

    def __init__(self, column: str, file: Path, names: Path | None) -> None:
        self.column, self.file = column, file
        self.where = f"embeddings: {file}"
        try:
            with decoding():
                self.vectors, found = _loaded(file)
                found = found if names is None else _names(names)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.where} cannot be read: {error}") from None
        if self.vectors.ndim != 2 or self.vectors.dtype.kind != "f" or not self.vectors.size:
            raise ConfigError(
                f"{self.where} holds {self.vectors.dtype} of shape {self.vectors.shape}, want floats (N, D)"
            )
        if len(found) != len(self.vectors):
            raise ConfigError(f"{self.where} holds {len(self.vectors)} vectors for {len(found)} names")
        self.places = {normal(name): place for place, name in enumerate(found)}
        if len(self.places) < len(found):
            raise ConfigError(f"{self.where}: {len(found) - len(self.places)} of the names come twice")
        self._check(found)
        self.used: set[int] = set()

    def _check(self, names: list[str]) -> None:
        for start in range(0, len(names), CHECKED_ROWS):
            norms = np.linalg.norm(self.vectors[start : start + CHECKED_ROWS].astype(np.float64), axis=1)
            wrong = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
            if len(wrong):
                place = start + int(wrong[0])
                raise ConfigError(f"{self.where}: the vector of {names[place]!r} is 0 or not finite")

    def entry(self) -> dict[str, Any]:
        """Return the manifest's entry of the column."""
        codec = f"{self.file.name}@{file_hash(self.file)}"
        return {"kind": "embedding", "dim": self.vectors.shape[1], "codec": codec}

    def of(self, *names: str) -> np.ndarray | None:
        """Return the vector of the first name that has one, with or without its suffix, float32 (D,)."""
        for name in map(normal, names):
            stem = name.rpartition(".")[0] if "." in name.rpartition("/")[2] else name
            place = self.places.get(name, self.places.get(stem))
            if place is not None:
                self.used.add(place)
                return np.asarray(self.vectors[place], dtype=np.float32)
        return None

    def note(self) -> Iterator[str]:
        """Yield a line that says which names no row had."""
        unknown = [name for name, place in self.places.items() if place not in self.used]
        if unknown:
            shown = ", ".join(unknown[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
            yield f"{self.column}: {len(unknown):,} of {len(self.places):,} names are no row's: {shown}"


def own_vectors(text: str) -> list[OwnVectors]:
    """Return the vectors that the option `embeddings` names. Raises ConfigError for other text or files."""
    found = []
    for part in filter(None, map(str.strip, text.split(";"))):
        column, _, files = part.partition("=")
        file, _, names = files.partition(",")
        if not column or not file or bool(names) == file.endswith(".npz"):
            raise ConfigError(WRONG.format(part))
        names_file = Path(names).expanduser() if names else None
        found.append(OwnVectors(column, Path(file).expanduser(), names_file))
    return found


def _loaded(file: Path) -> tuple[np.ndarray, list[str]]:
    """Return the vectors in a file, and the names where it has them."""
    stored: Any = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(stored, Mapping):
        return stored, []
    arrays = list(stored.values())
    names = [array for array in arrays if array.ndim == 1 and array.dtype.kind in "US"]
    vectors = [array for array in arrays if array.ndim == 2]
    if len(names) != 1 or len(vectors) != 1:
        raise ValueError(f"it holds {', '.join(stored)}; want one array of names and one of vectors")
    return vectors[0], [str(name) for name in names[0].astype(str)]


def _names(file: Path) -> list[str]:
    """Return the names in a file: a JSON list, a column of a table, or one per line."""
    if file.suffix == ".json":
        listed = json.loads(file.read_text(encoding="utf8"))
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise ValueError(f"{file} is no JSON list of names")
        return listed
    if file.suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        rows = read_cells(file)
        column = find_column(list(rows[0]) if rows else [], KEYS)
        if column is None:
            raise ValueError(f"{file} needs a column with the names: {', '.join(KEYS)}")
        return [str(row[column]) for row in rows]
    return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
