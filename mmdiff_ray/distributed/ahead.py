"""Check on this machine what a cluster is about to run, as far as it can be known here."""

from pathlib import Path

from mmdiff_ray.config import Config, ConfigError, UnreachableError, check_changes
from mmdiff_ray.data.manifest import Manifest, read_manifest
from mmdiff_ray.data.storage import is_uri, within
from mmdiff_ray.distributed import job as jobs
from mmdiff_ray.distributed import runs

ANSWER_S = 20.0


def check_ahead(config: Config, here: bool) -> list[str]:
    """Check a configuration by the code of `--dry-run` and return what was checked, and what could not be.

    here: whether the cluster is this machine, so that paths and weights here are those there. Raises
    ConfigError for what cannot run; data and runs that cannot be reached from here are no error.
    """
    notes = look_at_runs(config.runs) if is_uri(config.runs) else []
    if here:
        jobs.prepare(config, Path("unused"))
        return ["checked against its data", *notes]
    from mmdiff_ray.evaluation.run import known_evaluators

    known_evaluators(config)
    check_changes(config)
    if not config.data.sources:
        jobs.read_sources(config)  # says so
    found = []
    for source in config.data.sources:
        try:
            found.append(_look(source.uri))
        except UnreachableError as error:
            notes.append(f"not checked: {error}")
    if len(found) == len(config.data.sources):
        jobs.fit(config, found)
        return ["checked against its data", *notes]
    return ["checked without its data: names, numbers, tasks", *notes]


def look_at_runs(where: str) -> list[str]:
    """Return why the storage of runs could not be looked at. Raises ConfigError for a URI that is none."""
    try:
        within(ANSWER_S, lambda: runs.opened(where), f"runs: {where} does not answer this machine")
    except UnreachableError as error:
        return [f"not checked: {error}"]
    return []


def _look(uri: str) -> Manifest:
    """Return the manifest of a data set that a cluster will read.

    Raises UnreachableError where that cannot be done from here, and ConfigError where there surely is none.
    """
    if is_uri(uri):
        return within(ANSWER_S, lambda: read_manifest(uri), f"{uri} does not answer this machine")
    if not Path(uri).is_absolute() or not Path(uri).exists():
        raise UnreachableError(f"{uri} is a folder of the cluster")
    return read_manifest(uri)


def check_paths(config: Config) -> None:
    """Raise ConfigError for a path that means nothing on a cluster, where no folder of it was named."""
    for key, value in [
        ("runs", config.runs),
        *(("data.sources", source.uri) for source in config.data.sources),
    ]:
        if not is_uri(value) and not Path(value).is_absolute():
            raise ConfigError(
                f"{key} ({value}) is a path of this machine; give --folder DIR, a folder that all nodes of "
                "the cluster share and that such paths shall start from, or a path or URI of the cluster"
            )
