"""Keep the journal of an unfinished build, and find the files at a URI that are ours."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import JOURNAL, MANIFEST, SPLITS, Shard, listed_splits, shard_from_plain
from mmdiff_ray.data.schema import Tally
from mmdiff_ray.storage.filesystem import (
    exists,
    filesystem,
    list_files,
    read_bytes,
    remove,
    write_atomic,
)

SHARD_PATH = re.compile(r"(train|val|test)/\d{5,}\.parquet")
RESTART = "build with the same settings, or start again with --force"


@dataclass
class Journal:
    """What an unfinished build has written so far, a file beside the shards that goes when the build ends.

    settings: what decides how rows fall into shards. facts: column -> its facts. totals: column -> its tally
    over the rows of all finished shards. shards: split -> its finished shards.
    """

    settings: dict[str, Any]
    facts: dict[str, dict[str, Any]]
    totals: dict[str, Tally]
    shards: dict[str, list[Shard]]

    def save(self, uri: str) -> None:
        """Write the journal beside the shards."""
        fs, root = filesystem(uri)
        plain = {
            "settings": self.settings,
            "facts": self.facts,
            "totals": {
                name: {part: a.tolist() for part, a in tally.items()} for name, tally in self.totals.items()
            },
            "shards": {split: [asdict(shard) for shard in shards] for split, shards in self.shards.items()},
        }
        write_atomic(fs, f"{root}/{JOURNAL}", json.dumps(plain).encode())

    def go_on_from(self, earlier: "Journal", uri: str) -> None:
        """Take over what an interrupted build has written. Raises ConfigError if it was set up otherwise."""
        for what, was, now in (
            ("settings", earlier.settings, self.settings),
            ("columns", list(earlier.facts), list(self.facts)),
        ):
            if was != now:
                raise ConfigError(f"{uri} holds an interrupted build with {what} {was}, now {now}; {RESTART}")
        for name, facts in self.facts.items():
            for fact, value in earlier.facts[name].items():
                if facts.setdefault(fact, value) != value:
                    raise ConfigError(
                        f"{uri} holds an interrupted build where {fact} of column {name!r} is {value}, "
                        f"now {facts[fact]}; {RESTART}"
                    )
        self.totals, self.shards = earlier.totals, earlier.shards


def load_journal(uri: str) -> Journal | None:
    """Return the journal of an interrupted build, or None. Raises ConfigError if it cannot be read."""
    plain = _read_json(uri, JOURNAL)
    if plain is None:
        return None
    try:
        return Journal(
            settings=plain["settings"],
            facts=plain["facts"],
            totals={
                name: {part: np.asarray(amount) for part, amount in tally.items()}
                for name, tally in plain["totals"].items()
            },
            shards={split: [] for split in SPLITS}
            | {
                split: [shard_from_plain(shard) for shard in plain["shards"][split]]
                for split in listed_splits(plain["shards"])
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_ours(uri, JOURNAL, error) from None


def make_room(uri: str, force: bool) -> None:
    """Make sure that a build may write at a URI.

    force: remove the data set or unfinished build that is there. Raises ConfigError if a finished data set
    is there without force, or files that no manifest or journal of ours names.
    """
    fs, root = filesystem(uri)
    if exists(fs, f"{root}/{MANIFEST}") and not force:
        raise ConfigError(
            f"the data set at {uri} is finished and is never overwritten; "
            "build elsewhere, or replace it with --force"
        )
    ours = _named_files(uri)
    if force:
        for path in ours:
            remove(fs, f"{root}/{path}")
    if force or not ours:
        strangers = [path for split in SPLITS for path in list_files(fs, f"{root}/{split}")]
        if strangers:
            raise ConfigError(
                f"{uri} holds files that are not ours, e.g. {strangers[0]}; build in an empty folder"
            )


def _named_files(uri: str) -> list[str]:
    """Return the files that our journal and manifest name, what names them last."""
    journal, manifest = _read_json(uri, JOURNAL), _read_json(uri, MANIFEST)
    found: list[str] = []
    if journal is not None:
        for split, shards in _paths(uri, JOURNAL, journal, "shards").items():
            # a build that was killed may have written the shard after the last one that its journal names
            found += [*shards, f"{split}/{len(shards):05d}.parquet"]
        found.append(JOURNAL)
    if manifest is not None:
        for shards in _paths(uri, MANIFEST, manifest, "splits").values():
            found += shards
        found.append(MANIFEST)
    return found


def _paths(uri: str, name: str, plain: Any, section: str) -> dict[str, list[str]]:
    """Return split -> the paths of its shards that a file lists in a section, "shards" or "splits".

    Raises ConfigError if it does not, or for a path that no writer of ours makes.
    """
    try:
        listed, found = plain[section], {}
        for split in listed_splits(listed):
            shards = listed[split]["shards"] if section == "splits" else listed[split]
            found[split] = [shard["path"] for shard in shards]
        strange = [path for paths in found.values() for path in paths if not SHARD_PATH.fullmatch(path)]
    except (KeyError, TypeError, IndexError) as error:
        raise _not_ours(uri, name, error) from None
    if strange:
        raise _not_ours(uri, name, f"it names {strange[0]}")
    return found


def _read_json(uri: str, name: str) -> Any:
    fs, root = filesystem(uri)
    if not exists(fs, f"{root}/{name}"):
        return None
    try:
        return json.loads(read_bytes(fs, f"{root}/{name}"))
    except (ValueError, RecursionError) as error:
        raise _not_ours(uri, name, error) from None


def _not_ours(uri: str, name: str, why: object) -> ConfigError:
    return ConfigError(
        f"{uri}/{name} is not as we write it ({why}), so it is not known which files belong to it; "
        "look at the folder and remove it yourself"
    )
