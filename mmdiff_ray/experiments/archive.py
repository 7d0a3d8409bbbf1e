"""The files of a result, and the archive of its cells: a table can be rebuilt without training them again."""

import dataclasses
import json
import shutil
import zipfile
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError, decoding
from mmdiff_ray.experiments.digest import training_digest
from mmdiff_ray.experiments.measurement import is_measured
from mmdiff_ray.experiments.spec import Experiment
from mmdiff_ray.storage.filesystem import is_inside
from mmdiff_ray.storage.lock import lock_folder
from mmdiff_ray.training.checkpoint import write_json

FACTS, CONFIG = "export/facts.json", "export/config.yaml"
ARCHIVED = (CONFIG, FACTS, "watched.json", "measured/*.json", "measured/*.npz")
"""Everything in a cell's folder but models, checkpoints and pictures."""
MOST_BYTES = 1 << 28
"""Of an entry, unpacked."""
DAY = (1980, 1, 1, 0, 0, 0)
"""The time of every entry, so that the same cells make the same file."""


def result_file(out: Path, suffix: str) -> Path:
    """Return a file of the result at `out`: `out` with a suffix such as .json or -overview.png."""
    return out.with_name(f"{out.name}{suffix}")


def result_path(file: Path) -> Path:
    """Return the `out` of a result that is named by itself, its .json or its .md."""
    return file.with_suffix("") if file.suffix in (".json", ".md") else file


def archive_file(out: Path) -> Path:
    """Return the archive of the result at `out`."""
    return result_file(out, ".cells.zip")


def pack(experiment: Experiment, runs: Path, out: Path) -> Path:
    """Write the archive of all trained cells, and return it.

    Cells already in the archive stay, unless they are fully measured in `runs`.
    """
    file = archive_file(out)
    entries = _read(file)
    archived = {name.partition("/")[0] for name in entries}
    for cell in experiment.cells():
        folder = experiment.folder(runs, cell)
        if not (folder / FACTS).is_file() or (
            cell.key in archived and not is_measured(experiment, cell, runs)
        ):
            continue
        entries = {name: data for name, data in entries.items() if not name.startswith(f"{cell.key}/")}
        for path in (path for pattern in ARCHIVED for path in sorted(folder.glob(pattern))):
            entries[f"{cell.key}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
        config = dataclasses.replace(configuration.load_saved(folder / CONFIG), runs="runs")
        entries[f"{cell.key}/{CONFIG}"] = configuration.to_yaml(
            config
        ).encode()  # without this machine's paths
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for name in sorted(entries):
            archive.writestr(zipfile.ZipInfo(name, DAY), entries[name], zipfile.ZIP_DEFLATED)
    partial.replace(file)
    return file


def _read(file: Path) -> dict[str, bytes]:
    """Return the entries of an archive, name -> bytes. Raises ConfigError for other files, and for one with
    entries that no archive of cells has."""
    if not file.is_file():
        return {}
    try:
        with decoding(), zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if not _is_archived(entry.filename) or entry.file_size > MOST_BYTES:
                    raise ValueError(f"it holds {entry.filename!r} of {entry.file_size:,} bytes")
            return {name: archive.read(name) for name in archive.namelist()}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is no archive of cells: {error}; restore or remove it") from None


def _is_archived(name: str) -> bool:
    """Return whether a name is CELL/FILE with a file of ARCHIVED."""
    cell, _, inner = name.partition("/")
    depth = {pattern.count("/") for pattern in ARCHIVED if fnmatch(inner, pattern)}
    return is_inside(name) and bool(cell) and inner.count("/") in depth


def unpack(experiment: Experiment, runs: Path, out: Path) -> int:
    """Restore the archived cells of the result at `out` into `runs`; return how many.

    Skips cells that are in `runs`, cells in training, and cells trained with other settings than the
    experiment has now.
    """
    entries, restored = _read(archive_file(out)), 0
    for cell in experiment.cells():
        folder = experiment.folder(runs, cell)
        own = {name: data for name, data in entries.items() if name.startswith(f"{cell.key}/")}
        facts = json.loads(own.pop(f"{cell.key}/{FACTS}", b"{}"))
        if not facts or (folder / FACTS).is_file():
            continue
        if facts.get("digest") != training_digest(experiment.config(cell, folder.parent)):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(ConfigError), lock_folder(folder):
            shutil.rmtree(folder / "measured", ignore_errors=True)
            for name, data in own.items():
                (folder.parent / name).parent.mkdir(exist_ok=True)
                (folder.parent / name).write_bytes(data)
            write_json(folder / FACTS, facts)  # last: with it the cell counts as trained
            restored += 1
    return restored
