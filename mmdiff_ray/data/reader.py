"""Read rows of shards as the modalities want them."""

import functools
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff_ray.config import ConfigError, DataConfig, OutageError
from mmdiff_ray.data.manifest import Manifest, RowGroup, read_manifest
from mmdiff_ray.data.parquet import Tables, read_row_group
from mmdiff_ray.data.plan import Window
from mmdiff_ray.modalities.base import Modality, RowContext
from mmdiff_ray.storage.filesystem import absolute
from mmdiff_ray.storage.retry import retry

Arrays = dict[str, np.ndarray]
"""Rows as arrays of one length n, fit for any transport.

ids, visits: int64. real: bool, False where the row could not be read. error, place: str, why not and
where it is ("" for a real row). data/<instance>: the modality's own shape and type, zeros where absent.
present/<instance>: bool.
"""
DATA, PRESENT = "data/", "present/"


class RowReader:
    """Read windows of rows, in data workers. It can be pickled if its modalities can.

    modalities: instance -> modality. uris: one per data set, in the plan's order. data: what is read and how.
    seed: keys all that is random about reading a row, with its visit and id. tables: who reads row groups
    from storage, else this process.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        uris: Sequence[str],
        data: DataConfig,
        seed: int,
        tables: Tables | None = None,
    ) -> None:
        self.uris = [absolute(uri) for uri in uris]
        self.bad_row_limit = data.bad_row_limit
        self._modalities = in_reading_order(modalities)
        wanted = dict.fromkeys(column for modality in modalities.values() for column in modality.columns)
        self._columns = [_has(wanted, _manifest(uri).columns) for uri in self.uris]
        self._size = next(iter(modalities.values())).size
        self._seed, self._backgrounds, self._flip = seed, data.backgrounds, data.flip
        self._tables = tables

    @property
    def row_bytes(self) -> int:
        """Return the size of a row as it is returned, in bytes."""
        return sum(values.nbytes for values in self._blank(1, 0).values())

    def read(self, window: Window, ended: threading.Event | None = None) -> Arrays:
        """Return the rows of a window in its order.

        A row that cannot be read or decoded keeps its slot, so that no other row moves: it is not real, and
        its error says why. Corrupt data never raises here; who makes batches of the rows counts them and
        stops. Storage that does not answer makes no row bad: it is retried, for minutes, unless `ended`
        is set. Raises OutageError then.
        """
        places = window.places()
        arrays, errors = self._blank(len(places), window.visit), np.full(len(places), "", dtype=object)
        for row_group, slots in _by_row_group(places).items():
            where = f"{self.uris[window.source]}/{row_group.path}, row group {row_group.group}"
            take = [places[slot][1] for slot in slots]
            rows_of = functools.partial(self._rows, window.source, row_group, take)
            try:
                rows = retry(rows_of, f"read {self.uris[window.source]}", ended)
            except OutageError:
                raise
            except Exception as error:
                errors[slots] = f"{where}: {_words(error)}"
                continue
            for slot, row in zip(slots, rows, strict=True):
                errors[slot] = self._read_row(arrays, slot, row, where)
        arrays["error"] = errors.astype(np.str_)
        arrays["real"] = errors == ""
        arrays["place"] = np.array(
            [
                f"source {window.source}, {group.path}, row group {group.group}, row {row}" if error else ""
                for (group, row), error in zip(places, errors, strict=True)
            ],
            np.str_,
        )
        return arrays

    def _rows(self, source: int, row_group: RowGroup, take: list[int]) -> list[dict[str, Any]]:
        """Return rows of a row group; a column that the whole data set lacks is None."""
        has = self._columns[source]
        wanted = [name for name in has if has[name]]
        columns = read_row_group(self.uris[source], row_group, wanted, take, self._tables)
        lacking = {name: None for name in has if not has[name]}
        return [
            lacking | dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]

    def _blank(self, rows: int, visit: int) -> Arrays:
        arrays = {"ids": np.zeros(rows, np.int64), "visits": np.full(rows, visit, np.int64)}
        for name, modality in self._modalities.items():
            arrays[DATA + name] = np.zeros((rows, *modality.data_shape), modality.data_type)
            arrays[PRESENT + name] = np.zeros(rows, bool)
        return arrays

    def _read_row(self, arrays: Arrays, slot: int, row: Mapping[str, Any], where: str) -> str:
        """Fill a slot from a row. Return why that failed, or an empty string."""
        visit = int(arrays["visits"][slot])
        context = RowContext(self._size, self._seed, visit, row["id"], self._backgrounds, self._flip)
        done: dict[str, np.ndarray] = {}
        for name, modality in self._modalities.items():
            try:
                value = modality.read(row, context, done)
                if value is not None:
                    done[name] = _checked(np.asarray(value), modality)
            except Exception as error:
                return f"{where}, row {row['id']}, {name}: {_words(error)}"
        arrays["ids"][slot] = row["id"]
        for name, value in done.items():
            arrays[DATA + name][slot] = value
            arrays[PRESENT + name][slot] = True
        return ""


def _manifest(uri: str) -> Manifest:
    return retry(lambda: read_manifest(uri), f"read {uri}")


def _by_row_group(places: Sequence[tuple[RowGroup, int]]) -> dict[RowGroup, list[int]]:
    """Return row group -> the slots whose rows lie there."""
    groups: dict[RowGroup, list[int]] = defaultdict(list)
    for slot, (row_group, _) in enumerate(places):
        groups[row_group].append(slot)
    return groups


def in_reading_order(modalities: Mapping[str, Modality]) -> dict[str, Modality]:
    """Return the modalities, each after the one it is made from."""
    ordered: dict[str, Modality] = {}
    waiting = dict(modalities)
    while waiting:
        ready = [n for n, m in waiting.items() if m.made_from is None or m.made_from in ordered]
        if not ready:
            name, modality = next(iter(waiting.items()))
            raise ConfigError(
                f"modalities.{name} is made from {modality.made_from!r}, which cannot be read first; "
                f"known: {', '.join(modalities)}"
            )
        ordered |= {name: waiting.pop(name) for name in ready}
    return ordered


def _has(wanted: Iterable[str], columns: Collection[str]) -> dict[str, bool]:
    return {column: column in columns for column in wanted}


def _checked(value: np.ndarray, modality: Modality) -> np.ndarray:
    want = np.dtype(modality.data_type)
    if value.shape != modality.data_shape or value.dtype != want:
        raise ValueError(f"got {value.dtype} {value.shape}, want {want} {modality.data_shape}")
    return value


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
