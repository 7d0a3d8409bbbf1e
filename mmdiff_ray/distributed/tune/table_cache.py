"""A cache of row groups in Ray's object store: the trials of a sweep read each from storage once."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from mmdiff_ray.data.manifest import RowGroup
from mmdiff_ray.data.parquet import read_table

_log = logging.getLogger(__name__)

SHARE = 0.3
"""Fraction of a node's object store that the cache may fill."""
READERS = 4
Key = tuple[str, RowGroup, tuple[str, ...]]


class TableCache:
    """The actor that reads row groups and caches those that fit, without eviction.

    Every epoch reads all row groups, so an LRU cache would evict each before its next use.
    limit: in bytes; None: `SHARE` of the node's object store.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = int(SHARE * _store_bytes()) if limit is None else limit
        self.bytes = self.reads = 0
        self._futures: dict[Key, Future] = {}
        self._lock = threading.Lock()

    def table(self, key: Key) -> list[Any]:
        """Return a list with a reference to a row group's table, or None if the cache is full.

        A list, because Ray would resolve a bare reference.
        """
        with self._lock:
            first = key not in self._futures
            future = self._futures.setdefault(key, Future())
            full = self.bytes >= self.limit
        if first:
            try:
                future.set_result(None if full else self._put(read_table(*key)))
            except Exception as error:
                future.set_exception(error)
                with self._lock:
                    del self._futures[key]
        return [future.result()]

    def _put(self, table: Any) -> Any:
        import ray

        with self._lock:
            self.reads += 1
            if self.bytes + table.nbytes > self.limit:
                return None
            self.bytes += table.nbytes
        return ray.put(table)

    def facts(self) -> dict[str, int]:
        """Return how many row groups were read from storage, and how many bytes are cached."""
        return {"reads": self.reads, "bytes": self.bytes}


class SharedTables:
    """Read row groups through the cache; passed to `RowReader` in place of `read_table`.

    Falls back to storage if the cache is full, fails or has died.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self._known: dict[Key, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache, "_known": {}}

    def __call__(self, uri: str, row_group: RowGroup, columns: Sequence[str]) -> Any:
        """Return the table of a row group (pyarrow), as `read_table` does."""
        import ray

        key = (uri, row_group, tuple(columns))
        try:
            if key not in self._known:
                (self._known[key],) = ray.get(self.cache.table.remote(key))
            if self._known[key] is not None:
                return ray.get(self._known[key])
        except Exception as error:  # also corrupt data: read_table below raises it again
            _log.info("%s is read from storage: %s", row_group.path, error)
        return read_table(uri, row_group, columns)


def start_cache(limit: int | None = None) -> Any:
    """Start a cache that lives as long as its handle. limit: as in `TableCache`."""
    import ray

    actor: Any = ray.remote(TableCache)
    return actor.options(num_cpus=0, max_concurrency=READERS).remote(limit)


def describe(cache: Any) -> str:
    """Summarize the reads of a cache in one line."""
    import ray

    try:
        facts = ray.get(cache.facts.remote())
    except ray.exceptions.RayError:
        return "the cache shared by the trials has died"
    return (
        f"{facts['reads']} row groups read from storage for all trials ({facts['bytes'] / 1e6:.3g} MB cached)"
    )


def _store_bytes() -> float:
    """Return the size of this node's object store."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    return node["Resources"].get("object_store_memory", 0)
