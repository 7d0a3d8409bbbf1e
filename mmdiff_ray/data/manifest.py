"""Describe a data set in its `manifest.json`: the columns, the splits and the shards they are made of."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from mmdiff_ray import __version__
from mmdiff_ray.config import ConfigError, UnreachableError
from mmdiff_ray.data.entries import check_entry, is_count
from mmdiff_ray.storage.filesystem import exists, filesystem, is_inside, read_bytes

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "_building.json"
SPLITS = ("train", "val", "test")

Migrations = Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]
MIGRATIONS: Migrations = {}
"""Format version -> function from a manifest of that version, as plain values, to one of the next version."""


class RowGroup(NamedTuple):
    """The unit of reading, row group number `group` of the shard at `path`, and what it must be like."""

    path: str
    footer_crc32: int
    group: int
    rows: int


@dataclass(frozen=True)
class Shard:
    """One Parquet file.

    path: relative to the data set. footer_crc32: of the Parquet footer, which alone carries no checksum of
    its own. row_groups: the rows of each of its row groups.
    """

    path: str
    rows: int
    bytes: int
    sha256: str
    footer_crc32: int
    row_groups: tuple[int, ...]

    def row_group(self, group: int) -> RowGroup:
        """Return what is to be known to read one of the row groups."""
        return RowGroup(self.path, self.footer_crc32, group, self.row_groups[group])


@dataclass(frozen=True)
class Split:
    """One split of a data set, one of SPLITS."""

    rows: int = 0
    bytes: int = 0
    shards: tuple[Shard, ...] = ()

    @classmethod
    def of(cls, shards: list[Shard]) -> "Split":
        """Return the split made of these shards."""
        return cls(sum(shard.rows for shard in shards), sum(shard.bytes for shard in shards), tuple(shards))


@dataclass(frozen=True)
class Manifest:
    """What a data set is.

    columns: column -> its kind, the facts of its kind and its statistics. splits: all of SPLITS; those that
    are left out are empty.
    """

    name: str
    columns: Mapping[str, Mapping[str, Any]]
    splits: Mapping[str, Split]
    created_by: str = ""
    description: str = ""
    credit: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", {name: self.splits.get(name, Split()) for name in SPLITS})

    @property
    def digest(self) -> str:
        """Return the sha256 of the manifest's canonical JSON: equal for equal data, wherever it lies."""
        text = json.dumps(to_plain(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def is_built(uri: str) -> bool:
    """Return whether there is a finished data set at a URI."""
    fs, root = filesystem(uri)
    return exists(fs, f"{root}/{MANIFEST}")


def read_manifest(uri: str) -> Manifest:
    """Return the manifest of the data set at a URI.

    Raises ConfigError if there is none, if its build is unfinished, or if it cannot be read.
    """
    fs, root = filesystem(uri)
    try:
        text = read_bytes(fs, f"{root}/{MANIFEST}")
    except FileNotFoundError:
        raise ConfigError(_missing(uri, unfinished=exists(fs, f"{root}/{JOURNAL}"))) from None
    except OSError as error:
        raise UnreachableError(f"data.sources: cannot read {uri}: {error}") from None
    try:
        return from_json(text)
    except ConfigError as error:
        raise ConfigError(f"data.sources: {uri}: {error}") from None


def to_json(manifest: Manifest) -> bytes:
    """Return a manifest as JSON for people and programs."""
    return (json.dumps(to_plain(manifest), indent=1) + "\n").encode()


def from_json(text: bytes | str) -> Manifest:
    """Return the manifest of JSON text. Raises ConfigError if it is no manifest or a newer version's."""
    try:
        plain = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(_corrupt(f"it is not JSON: {error}")) from None
    return from_plain(plain)


def to_plain(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest as plain dictionaries, lists and numbers.

    An empty test split is left out, so that data sets without one keep the digest they had before it existed.
    """
    plain = {"format_version": manifest.format_version, **dataclasses.asdict(manifest)}
    if not manifest.splits["test"].rows:
        del plain["splits"]["test"]
    return plain


def from_plain(plain: Any, migrations: Migrations = MIGRATIONS) -> Manifest:
    """Return the manifest of plain values, brought to the present format first."""
    try:
        values = _migrate(plain, migrations)
        splits = {split: _split(values["splits"][split]) for split in listed_splits(values["splits"])}
        columns = {name: {"kind": entry["kind"], **entry} for name, entry in values["columns"].items()}
        for name, entry in columns.items():
            check_entry(name, entry)
        for key in ("name", "description", "credit", "created_by"):
            if not isinstance(values.get(key, ""), str):
                raise ValueError(f"{key} is {values[key]!r}")
        return Manifest(**{**values, "splits": splits, "columns": columns})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(_corrupt(f"{type(error).__name__}: {error}")) from None


def listed_splits(listed: Mapping[str, Any]) -> list[str]:
    """Return the splits to read from a manifest or journal; "test" may be missing, the others may not."""
    return [split for split in SPLITS if split != "test" or split in listed]


def shard_from_plain(plain: Mapping[str, Any]) -> Shard:
    """Return a shard's entry from plain values. Raises ValueError for a path out of the data set's folder,
    numbers that are none, or row groups that do not add up."""
    shard = Shard(**{**plain, "row_groups": tuple(plain["row_groups"])})
    if not isinstance(shard.path, str) or not (is_inside(shard.path) and shard.path.isprintable()):
        raise ValueError(f"the path {shard.path!r} does not lie in the data set's folder")
    if not all(map(is_count, (shard.rows, shard.bytes, shard.footer_crc32, *shard.row_groups))):
        raise ValueError(f"{shard.path}: its numbers must be whole and at least 0")
    if sum(shard.row_groups) != shard.rows:
        raise ValueError(f"{shard.path}: row groups hold {sum(shard.row_groups)} rows, not {shard.rows}")
    return shard


def created_by() -> str:
    """Return the names and versions of what writes shards, for the manifest."""
    return f"mmdiff_ray {__version__}, pyarrow {pa.__version__}"


def _split(plain: Mapping[str, Any]) -> Split:
    split = Split.of([shard_from_plain(shard) for shard in plain["shards"]])
    if (split.rows, split.bytes) != (plain["rows"], plain["bytes"]):
        raise ValueError(
            f"the shards hold {split.rows} rows in {split.bytes} bytes, the split says otherwise"
        )
    return split


def _migrate(plain: Any, migrations: Migrations) -> dict[str, Any]:
    version = plain["format_version"]
    if not isinstance(version, int):
        raise ValueError(f"format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"{MANIFEST} has format version {version}, want {FORMAT_VERSION} or less; upgrade mmdiff_ray"
        )
    while version < FORMAT_VERSION:
        plain = migrations[version](plain)
        version = plain["format_version"]
    return plain


def _missing(uri: str, unfinished: bool) -> str:
    if unfinished:
        return (
            f"data.sources: the build of {uri} was interrupted; "
            f"run its `mmdiff data build ... --out {uri}` again, it goes on where it stopped"
        )
    return (
        f"data.sources: no data set at {uri} (there is no {MANIFEST}); "
        f"build one with `mmdiff data build PIPELINE --out {uri}`, or correct the URI"
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _corrupt(why: str) -> str:
    return f"{MANIFEST} is not a manifest ({why}); restore it, or remove the folder and build the data again"
