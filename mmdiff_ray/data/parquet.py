"""Turn rows into Parquet files and read their row groups back; no corrupt byte passes unnoticed."""

import contextlib
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmdiff_ray.data.manifest import RowGroup, Shard
from mmdiff_ray.data.schema import Column
from mmdiff_ray.storage.filesystem import filesystem, read_bytes

FOOTERS_KEPT = 256
TAIL_BYTES = 1 << 16
Tables = Callable[[str, RowGroup, Sequence[str]], pa.Table]
"""(data set's URI, row group, columns) -> its table, as `read_table` returns it."""


def encode(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], rows_per_group: int) -> bytes:
    """Return rows, each with "id", "key" and its stored values, as a Parquet file."""
    arrays = {
        "id": pa.array([row["id"] for row in rows], pa.int64()),
        "key": pa.array([row["key"] for row in rows]),
    }
    for name, column in columns.items():
        arrays[name] = column.to_arrow([row[name] for row in rows])
    fields = [
        pa.field(name, array.type, nullable=name not in ("id", "key")) for name, array in arrays.items()
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(list(arrays.values()), schema=pa.schema(fields)),
        sink,
        row_group_size=rows_per_group,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()


def footer_crc32(data: bytes) -> int:
    """Return the checksum of a Parquet file's footer."""
    return zlib.crc32(data[-_footer_bytes(data) :])


def read_row_group(
    uri: str,
    row_group: RowGroup,
    columns: Sequence[str],
    take: Sequence[int] | None = None,
    tables: Tables | None = None,
) -> dict[str, list[Any]]:
    """Return rows of one row group as column -> list of values; always with "id".

    take: the rows wanted, in this order (all by default). tables: who reads, else this process. image, mask:
    PNG bytes; map: .npy bytes; label: int; labels: list of int; embedding, vector: float32 array (D,); text:
    str, or a list of str where the column has several; None where the row lacks one. Raises ValueError if a
    column is missing or the bytes are not those that were written, and OSError where storage does not give
    them.
    """
    wanted = list(dict.fromkeys(("id", *columns)))
    table = (tables or read_table)(uri, row_group, wanted)
    if table.num_rows != row_group.rows or set(table.column_names) != set(wanted):
        raise ValueError(
            f"got {table.num_rows} rows of {', '.join(table.column_names)}; "
            f"want {row_group.rows} rows of {', '.join(wanted)}"
        )
    if take is not None:
        table = table.take(pa.array(take, pa.int64()))
    return {name: _values(table[name].combine_chunks()) for name in wanted}


def _values(array: pa.Array) -> list[Any]:
    if not pa.types.is_fixed_size_list(array.type):
        return array.to_pylist()
    flat = array.flatten()
    vectors = flat.to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
    absent = flat.is_null().to_numpy(zero_copy_only=False).reshape(vectors.shape)[:, 0]
    return [None if lacks else vector for lacks, vector in zip(absent, vectors, strict=True)]


def read_table(uri: str, row_group: RowGroup, columns: Sequence[str]) -> pa.Table:
    """Return a row group as written: the pages have checksums, the manifest has the footer's.

    Raises ValueError if the bytes are not those that were written, and OSError where storage does not give
    them.
    """
    return _read_groups(uri, row_group.path, row_group.footer_crc32, [row_group.group], columns)


def read_shard(uri: str, shard: Shard, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Return columns of a whole shard, as `read_row_group` does those of a row group."""
    groups = range(len(shard.row_groups))
    table = _read_groups(uri, shard.path, shard.footer_crc32, groups, columns)
    return {name: _values(table[name].combine_chunks()) for name in columns}


def _read_groups(uri: str, name: str, crc32: int, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
    fs, root = filesystem(uri)
    path = f"{root}/{name}"
    try:
        footer = _footer(uri, name, crc32)
        with fs.open_input_file(path) as file, contextlib.suppress(OSError):
            return _parsed(file, footer, groups, columns)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
    data = read_bytes(
        fs, path
    )  # pyarrow raises OSError for corrupt bytes too: with them here, only for those
    try:
        return _parsed(pa.BufferReader(data), footer, groups, columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None


def _parsed(
    file: pa.NativeFile, footer: pq.FileMetaData, groups: Sequence[int], columns: Sequence[str]
) -> pa.Table:
    parquet = pq.ParquetFile(file, metadata=footer, page_checksum_verification=True, pre_buffer=True)
    return parquet.read_row_groups(list(groups), columns=list(columns), use_threads=False)


@functools.lru_cache(maxsize=FOOTERS_KEPT)
def _footer(uri: str, path: str, crc32: int) -> pq.FileMetaData:
    """Return a shard's footer, read once per process."""
    fs, root = filesystem(uri)
    with fs.open_input_file(f"{root}/{path}") as file:
        size = file.size()
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read()
        length = _footer_bytes(tail)
        if length > len(tail) and length <= size:
            file.seek(size - length)
            tail = file.read()
    footer = tail[-length:]
    if not 8 < length <= size or zlib.crc32(footer) != crc32:
        raise ValueError(f"the footer of {path} ({size} bytes) is not the one that was written")
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer))


def _footer_bytes(tail: bytes) -> int:
    """Return the length of a Parquet file's footer, with the 8 bytes at its end: this length, and "PAR1"."""
    return int.from_bytes(tail[-8:-4], "little") + 8


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a whole Parquet file of plain values. Raises OSError or ValueError."""
    return pq.read_table(str(file)).to_pylist()
