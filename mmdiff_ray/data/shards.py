"""Write a data set as Parquet shards with a manifest, and check its files."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from mmdiff_ray.config import ConfigError, OutageError, RunError, decoding
from mmdiff_ray.data.journal import RESTART, Journal, load_journal, make_room
from mmdiff_ray.data.manifest import (
    FORMAT_VERSION,
    JOURNAL,
    MANIFEST,
    SPLITS,
    Manifest,
    Shard,
    Split,
    created_by,
    read_manifest,
    to_json,
)
from mmdiff_ray.data.parquet import encode, footer_crc32, read_row_group
from mmdiff_ray.data.schema import Column, Tally, add_tallies, make_column
from mmdiff_ray.storage.filesystem import cannot_write, checksum, filesystem, remove, write_atomic
from mmdiff_ray.storage.retry import retry


class ShardWriter:
    """Write rows as shards. The same calls take up an interrupted build; a finished one is refused.

    columns: column -> its kind and static facts, e.g. {"kind": "mask", "classes": 25, "names": [...]}.
    rows_per_group: rows of a row group, the unit of reading. val_share, test_share: the shares of rows that
    go to "val" and "test", see `split_of`. force: replace a finished or unfinished data set; only files that
    its manifest or journal names are removed. done: key -> split of the rows that an interrupted build has
    already written; a restarted pipeline must skip them. Memory: one shard per split, and an id per row
    against double keys. Raises RunError where storage does not take a file any more.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        columns: Mapping[str, Mapping[str, Any]],
        *,
        description: str = "",
        credit: str = "",
        rows_per_shard: int = 1024,
        rows_per_group: int = 64,
        val_share: float = 0.1,
        test_share: float = 0.0,
        force: bool = False,
    ) -> None:
        self.uri = uri
        self._name, self._description, self._credit = name, description, credit
        self._rows_per_shard = rows_per_shard
        self._rows_per_group = rows_per_group
        if min(val_share, test_share) < 0 or val_share + test_share > 1:
            raise ConfigError(
                f"val_share ({val_share}) and test_share ({test_share}) must be 0 or more, together at most 1"
            )
        self._shares = val_share, test_share
        self._columns = {column: make_column(column, facts) for column, facts in columns.items()}
        self._rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._tallies: dict[str, list[dict[str, Tally]]] = {split: [] for split in SPLITS}
        self._journal = Journal(
            settings={
                "format_version": FORMAT_VERSION,
                "name": name,
                "rows_per_shard": rows_per_shard,
                "rows_per_group": rows_per_group,
                "val_share": val_share,
            }
            | ({"test_share": test_share} if test_share else {}),  # as builds begun before it existed
            facts={column.name: column.facts for column in self._columns.values()},  # shared, they still grow
            totals={column: {} for column in columns},
            shards={split: [] for split in SPLITS},
        )
        try:
            make_room(uri, force)
            self.done = self._resume()
        except OSError as error:
            raise cannot_write(uri, error) from None
        self._seen = {row_id(key) for key in self.done}

    def add(self, row: Mapping[str, Any], split: str | None = None, group: str | None = None) -> None:
        """Add a row: "key", and a value or None per column.

        image, mask: PNG bytes; label: a name or an index; embedding: a vector; text: a string. split: the
        row's; by default chosen by the shares and a hash of its group, or of its key if it has no group.
        Raises ConfigError for a value that does not fit its column, a key that was added before, or an
        unknown split.
        """
        key = self._checked_key(row)
        accepted = {name: _accept(key, column, row.get(name)) for name, column in self._columns.items()}
        number = row_id(key)
        if number in self._seen:
            raise ConfigError(
                f"row {key!r} comes twice in {self.uri}; keys must differ, and those in `done` be skipped"
            )
        self._seen.add(number)
        if split is None:
            split = split_of(row_id(group or key), *self._shares)
        elif split not in SPLITS:
            raise ConfigError(f"row {key!r} has an unknown split {split!r}; known: {', '.join(SPLITS)}")
        self._rows[split].append(
            {"id": number, "key": key} | {name: value for name, (value, _) in accepted.items()}
        )
        self._tallies[split].append({name: tally for name, (_, tally) in accepted.items()})
        if len(self._rows[split]) >= self._rows_per_shard:
            self._flush(split)

    def close(self) -> Manifest:
        """Write what is left and the manifest, and return it. Raises ConfigError if there are no rows."""
        if not self._seen:
            raise ConfigError(f"{self.uri}: the source gave no rows, so there is nothing to write")
        for split in SPLITS:
            if self._rows[split]:
                self._flush(split)
        manifest = Manifest(
            name=self._name,
            description=self._description,
            credit=self._credit,
            columns={
                name: column.summary(self._journal.totals[name]) for name, column in self._columns.items()
            },
            splits={split: Split.of(shards) for split, shards in self._journal.shards.items()},
            created_by=created_by(),
        )
        fs, root = filesystem(self.uri)
        self._bring(lambda: write_atomic(fs, f"{root}/{MANIFEST}", to_json(manifest)))
        self._bring(lambda: remove(fs, f"{root}/{JOURNAL}"))
        return manifest

    def _checked_key(self, row: Mapping[str, Any]) -> str:
        key = row.get("key")
        if not isinstance(key, str) or not key:
            raise ConfigError(f"a row needs a key, a string that names it; got {key!r}")
        unknown = [name for name in row if name != "key" and name not in self._columns]
        if unknown:
            raise ConfigError(
                f"row {key!r} has an unknown column {unknown[0]!r}; known: {', '.join(self._columns)}"
            )
        return key

    def _flush(self, split: str) -> None:
        rows, tallies = self._rows[split], self._tallies[split]
        path = f"{split}/{len(self._journal.shards[split]):05d}.parquet"
        data = encode(rows, self._columns, self._rows_per_group)
        fs, root = filesystem(self.uri)
        self._bring(lambda: write_atomic(fs, f"{root}/{path}", data))
        groups = _group_sizes(len(rows), self._rows_per_group)
        digest = hashlib.sha256(data).hexdigest()
        self._journal.shards[split].append(
            Shard(path, len(rows), len(data), digest, footer_crc32(data), groups)
        )
        for name, total in self._journal.totals.items():
            shard = add_tallies(row[name] for row in tallies)
            if split == "train":
                parts = self._columns[name].train_parts.items()
                shard |= {own: shard[part] for part, own in parts if part in shard}
            self._journal.totals[name] = add_tallies([total, shard])
        self._rows[split], self._tallies[split] = [], []
        self._bring(lambda: self._journal.save(self.uri))

    def _bring(self, action: Callable[[], None]) -> None:
        """Change something in storage, and wait an outage out. Raises RunError where that cannot be done."""
        try:
            retry(action, f"write to {self.uri}")
        except (OSError, OutageError) as error:
            what = str(error) if isinstance(error, OutageError) else f"cannot write to {self.uri}: {error}"
            raise RunError(f"{what}; run the same command again, it goes on where it stopped") from None

    def _resume(self) -> dict[str, str]:
        earlier = load_journal(self.uri)
        if earlier is None:
            self._journal.save(self.uri)
            return {}
        self._journal.go_on_from(earlier, self.uri)
        return {
            key: split
            for split in SPLITS
            for shard in earlier.shards[split]
            for key in _keys(self.uri, shard)
        }


def row_id(key: str) -> int:
    """Return the stable id of a row, 63 bits of a hash of its key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def split_of(number: int, val_share: float, test_share: float = 0.0) -> str:
    """Return the split of the row or group with this id, by a hash of the id.

    "val" are the lowest hashes and "test" the highest: a row keeps its split whatever rows are added, and the
    rows of "val" do not depend on test_share.
    """
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=8, person=b"split").digest()
    place = int.from_bytes(digest, "big")
    if place < val_share * 2**64:
        return "val"
    return "test" if place >= (1 - test_share) * 2**64 else "train"


def verify(uri: str) -> list[str]:
    """Return what is wrong with the files of a data set, one line each; none if all are as written."""
    shards = [shard for split in read_manifest(uri).splits.values() for shard in split.shards]
    problems = ((shard.path, _problem(uri, shard)) for shard in shards)
    return [f"{path}: {problem}" for path, problem in problems if problem]


def _problem(uri: str, shard: Shard) -> str | None:
    fs, root = filesystem(uri)
    try:
        size, digest = checksum(fs, f"{root}/{shard.path}")
    except OSError as error:
        return str(error)
    if size != shard.bytes:
        return f"has {size} bytes, want {shard.bytes}"
    return None if digest == shard.sha256 else f"sha256 is {digest}, want {shard.sha256}"


def _accept(key: str, column: Column, value: Any) -> tuple[Any, Tally]:
    if value is None:
        return None, {}
    try:
        with decoding():
            return column.accept(value)
    except (ValueError, OSError) as error:
        raise ConfigError(f"row {key!r}, column {column.name!r}: {error}") from None


def _group_sizes(rows: int, rows_per_group: int) -> tuple[int, ...]:
    full, rest = divmod(rows, rows_per_group)
    return (rows_per_group,) * full + ((rest,) if rest else ())


def _keys(uri: str, shard: Shard) -> list[str]:
    groups = [shard.row_group(group) for group in range(len(shard.row_groups))]

    def read() -> list[str]:
        return [key for group in groups for key in read_row_group(uri, group, ["key"])["key"]]

    try:
        return retry(read, f"read {uri}")
    except (OSError, ValueError) as error:
        where = f"{uri}/{shard.path} of an interrupted build"
        raise ConfigError(f"{where} cannot be read: {error}; {RESTART}") from None
