"""Parquet files that others wrote: their columns and row groups, as plain values."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmdiff_ray.config import ConfigError, decoding
from mmdiff_ray.storage.filesystem import filesystem


@dataclass(frozen=True)
class ForeignFile:
    """What a Parquet file's footer says. groups: rows of each row group; kinds: column -> image, number,
    text, texts, vector or other; names: column -> the class names that a Hugging Face file lists."""

    groups: list[int]
    kinds: dict[str, str]
    names: dict[str, list[str]]


def look_into(uri: str) -> ForeignFile:
    """Return what a Parquet file's footer says. Raises ConfigError for a file that is none."""
    with _opened(uri) as file:
        schema = file.schema_arrow
        groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    kinds = {field.name: _kind(field.type) for field in schema}
    return ForeignFile(groups, kinds, _class_names((schema.metadata or {}).get(b"huggingface", b"{}")))


def read_group(uri: str, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group: column -> bytes, number, text, list or None. Raises ConfigError for a
    damaged one."""
    with _opened(uri) as file:
        table = file.read_row_group(group, columns=list(columns))
    for batch in table.to_batches(max_chunksize=64):
        with _reading(uri):
            rows = batch.to_pylist()
        yield from rows


def distinct(uri: str, column: str) -> set[Any]:
    """Return the values of a column of labels, or of lists of them. Raises ConfigError for another kind."""
    with _opened(uri) as file:
        values = file.read(columns=[column])[column]
        if hasattr(values.type, "value_field"):  # a kind of list
            values = pc.list_flatten(values)
        return set(values.unique().to_pylist())


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    fs, path = filesystem(uri)
    with _reading(uri), pq.ParquetFile(fs.open_input_file(path)) as file:
        yield file


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Turn what Arrow raises for damaged bytes, or values of an unfit kind, into ConfigError."""
    try:
        with decoding():
            yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"source: cannot read {uri}: {str(error).splitlines()[0]}") from None


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return "image" if {field.name for field in kind} >= {"bytes"} else "other"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "image"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    nested = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(check(kind) for check in nested):
        inner = _kind(kind.value_type)
        return {"number": "vector", "vector": "vector", "text": "texts"}.get(inner, "other")
    return "other"


def _class_names(metadata: bytes) -> dict[str, list[str]]:
    try:
        features = json.loads(metadata)["info"]["features"]
        return {name: one["names"] for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
