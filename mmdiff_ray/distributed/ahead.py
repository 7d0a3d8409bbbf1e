"""Check on this machine what a cluster is about to run, as far as it can be known here."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmdiff_ray.config import Config, ConfigError, UnreachableError, check_changes
from mmdiff_ray.data.manifest import Manifest, read_manifest
from mmdiff_ray.distributed import job as jobs

ANSWER_S = 20.0


def check_ahead(config: Config, here: bool) -> list[str]:
    """Check a configuration by the code of `--dry-run` and return what was checked, and what could not be.

    here: whether the cluster is this machine, so that paths and weights here are those there. Raises
    ConfigError for what cannot run; data that cannot be reached from here are no error.
    """
    if here:
        jobs.prepare(config, Path("unused"))
        return ["checked against its data"]
    from mmdiff_ray.evaluation.run import known_evaluators

    known_evaluators(config)
    check_changes(config)
    if not config.data.sources:
        jobs.read_sources(config)  # says so
    found, notes = [], []
    for source in config.data.sources:
        try:
            found.append(_look(source.uri))
        except UnreachableError as error:
            notes.append(f"not checked: {error}")
    if not notes:
        jobs.fit(config, found)
        return ["checked against its data"]
    return ["checked without its data: names, numbers, tasks", *notes]


def _look(uri: str) -> Manifest:
    """Return the manifest of a data set that a cluster will read.

    Raises UnreachableError where that cannot be done from here, and ConfigError where there surely is none.
    """
    if "://" in uri:
        return within(ANSWER_S, lambda: read_manifest(uri), f"{uri} does not answer this machine")
    if not Path(uri).is_absolute() or not Path(uri).exists():
        raise UnreachableError(f"{uri} is a folder of the cluster")
    return read_manifest(uri)


def within(seconds: float, function: Callable[[], Any], words: str) -> Any:
    """Return what a function returns, or raise what it raises; UnreachableError if that takes too long."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, function()))
        except Exception as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise UnreachableError(f"{words} within {seconds:g} s")
    good, value = outcome[0]
    if not good:
        raise value
    return value


def check_paths(config: Config) -> None:
    """Raise ConfigError for a path that means nothing on a cluster, where no folder of it was named."""
    for key, value in [
        ("runs", config.runs),
        *(("data.sources", source.uri) for source in config.data.sources),
    ]:
        if "://" not in value and not Path(value).is_absolute():
            raise ConfigError(
                f"{key} ({value}) is a path of this machine; give --folder DIR, a folder that all nodes of "
                "the cluster share and that such paths shall start from, or a path or URI of the cluster"
            )
