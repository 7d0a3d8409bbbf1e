"""Read rows of shards as the modalities want them."""

import functools
import threading
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmdiff_ray.config import ConfigError, DataConfig, OutageError
from mmdiff_ray.data.manifest import Manifest, RowGroup, read_manifest
from mmdiff_ray.data.parquet import Tables, read_row_group
from mmdiff_ray.data.plan import Place, Window
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
OVERHEAD_BYTES = 400
"""What a decoded row takes beside its arrays' data, about, and each of its arrays."""


class Decoded(NamedTuple):
    """A row before any random choice.

    values: instance -> what its modality decoded, None where the row lacks it. row: the row as it was read,
    for modalities that read it whole.
    """

    row_id: int
    values: dict[str, np.ndarray | None]
    row: Mapping[str, Any]


class DecodedRows:
    """Decoded rows kept in memory up to a limit in bytes, 0 for none; what came first stays.

    Every epoch wants every row once, so the rows that fit are as good as any others.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[Hashable, Decoded] = {}
        self._bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_kept": {}, "_bytes": 0}  # every process keeps its own

    def get(self, key: Hashable) -> Decoded | None:
        """Return a kept row."""
        return self._kept.get(key)

    def keep(self, key: Hashable, decoded: Decoded) -> None:
        """Keep a row if there is room."""
        size = OVERHEAD_BYTES * (1 + len(decoded.values))
        size += sum(value.nbytes for value in decoded.values.values() if value is not None)
        if self._bytes + size <= self.limit:
            self._kept[key] = decoded
            self._bytes += size


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
        self._decoded = [n for n, m in self._modalities.items() if type(m).read is Modality.read]
        keeps = all(n in self._decoded or not m.columns for n, m in self._modalities.items())
        self._cache = DecodedRows(data.cache_mb * 2**20 if keeps else 0)

    @property
    def row_bytes(self) -> int:
        """Return the size of a row as it is returned, in bytes."""
        return sum(values.nbytes for values in self._blank([0]).values())

    def read(self, window: Window, ended: threading.Event | None = None) -> Arrays:
        """Return the rows of a window in its order.

        A row that cannot be read or decoded keeps its slot, so that no other row moves: it is not real, and
        its error says why. Corrupt data never raises here; who makes batches of the rows counts them and
        stops. Storage that does not answer makes no row bad: it is retried, for minutes, unless `ended`
        is set. Raises OutageError then.
        """
        places = window.places()
        arrays, errors = (
            self._blank([place.visit for place in places]),
            np.full(len(places), "", dtype=object),
        )
        for row_group, slots in _by_row_group(places).items():
            where = f"{self.uris[window.source]}/{row_group.path}, row group {row_group.group}"
            found = {slot: self._cache.get((window.source, *places[slot][:2])) for slot in slots}
            unread = [slot for slot in slots if found[slot] is None]
            take = [places[slot][1] for slot in unread]
            rows_of = functools.partial(self._rows, window.source, row_group, take)
            try:
                rows = retry(rows_of, f"read {self.uris[window.source]}", ended) if take else []
            except OutageError:
                raise
            except Exception as error:
                errors[unread] = f"{where}: {_words(error)}"
                rows, unread = [], []  # rows that are kept are still read
            for slot, row in zip(unread, rows, strict=True):
                made = self._decode(row, where)
                if isinstance(made, str):
                    errors[slot] = made
                else:
                    self._cache.keep((window.source, *places[slot][:2]), made)
                    found[slot] = made
            for slot, decoded in found.items():
                if decoded is not None:
                    errors[slot] = self._fill(arrays, slot, decoded, where)
        arrays["error"] = errors.astype(np.str_)
        arrays["real"] = errors == ""
        arrays["place"] = np.array(
            [
                f"source {window.source}, {group.path}, row group {group.group}, row {row}" if error else ""
                for (group, row, _), error in zip(places, errors, strict=True)
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

    def _blank(self, visits: Sequence[int]) -> Arrays:
        rows = len(visits)
        arrays = {"ids": np.zeros(rows, np.int64), "visits": np.array(visits, np.int64)}
        for name, modality in self._modalities.items():
            arrays[DATA + name] = np.zeros((rows, *modality.data_shape), modality.data_type)
            arrays[PRESENT + name] = np.zeros(rows, bool)
        return arrays

    def _decode(self, row: Mapping[str, Any], where: str) -> Decoded | str:
        """Return a row decoded, or why that failed."""
        values: dict[str, np.ndarray | None] = {}
        for name in self._decoded:
            try:
                values[name] = self._modalities[name].decode(row)
            except Exception as error:
                return f"{where}, row {row['id']}, {name}: {_words(error)}"
        return Decoded(row["id"], values, {} if self._cache.limit else row)

    def _fill(self, arrays: Arrays, slot: int, decoded: Decoded, where: str) -> str:
        """Fill a slot from a decoded row. Return why that failed, or an empty string."""
        visit, row_id = int(arrays["visits"][slot]), decoded.row_id
        context = RowContext(self._size, self._seed, visit, row_id, self._backgrounds, self._flip)
        done: dict[str, np.ndarray] = {}
        for name, modality in self._modalities.items():
            try:
                if name in decoded.values:
                    own = decoded.values[name]
                    value = None if own is None else modality.augment(own, context)
                else:
                    value = modality.read(decoded.row, context, done)
                if value is not None:
                    done[name] = _checked(np.asarray(value), modality)
            except Exception as error:
                return f"{where}, row {row_id}, {name}: {_words(error)}"
        arrays["ids"][slot] = row_id
        for name, value in done.items():
            arrays[DATA + name][slot] = value
            arrays[PRESENT + name][slot] = True
        return ""


def _manifest(uri: str) -> Manifest:
    return retry(lambda: read_manifest(uri), f"read {uri}")


def _by_row_group(places: Sequence[Place]) -> dict[RowGroup, list[int]]:
    """Return row group -> the slots whose rows lie there."""
    groups: dict[RowGroup, list[int]] = defaultdict(list)
    for slot, place in enumerate(places):
        groups[place.row_group].append(slot)
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
