"""Paths of a result's files, and the archive of its cells, from which a table is rebuilt without training."""

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
"""The archived files of a cell: everything except models, checkpoints and pictures."""
MAX_ENTRY_BYTES = 1 << 28
"""Largest unpacked size of one entry."""
ENTRY_TIME = (1980, 1, 1, 0, 0, 0)
"""Fixed modification time of every entry, so that equal cells give byte-identical archives."""


def result_file(out: Path, suffix: str) -> Path:
    """Return `out` with a suffix such as .json or -overview.png."""
    return out.with_name(f"{out.name}{suffix}")


def result_path(file: Path) -> Path:
    """Return a result's `out`. file: `out` itself, or its .json or .md file."""
    return file.with_suffix("") if file.suffix in (".json", ".md") else file


def archive_file(out: Path) -> Path:
    """Return the path of the archive of the result at `out`."""
    return result_file(out, ".cells.zip")


def pack(experiment: Experiment, runs: Path, out: Path) -> Path:
    """Add the trained cells in `runs` to the archive of the result at `out`; return its path.

    A cell replaces its archived version only if all its measurements are done.
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
        # No absolute path of this machine in the archive.
        config = dataclasses.replace(configuration.load_saved(folder / CONFIG), runs="runs")
        entries[f"{cell.key}/{CONFIG}"] = configuration.to_yaml(config).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for name in sorted(entries):
            archive.writestr(zipfile.ZipInfo(name, ENTRY_TIME), entries[name], zipfile.ZIP_DEFLATED)
    partial.replace(file)
    return file


def _read(file: Path) -> dict[str, bytes]:
    """Return the entries of an archive, name -> bytes. ConfigError if it is not an archive of cells."""
    if not file.is_file():
        return {}
    try:
        with decoding(), zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if not _is_archived(entry.filename) or entry.file_size > MAX_ENTRY_BYTES:
                    raise ValueError(f"unexpected entry {entry.filename!r} ({entry.file_size:,} bytes)")
            return {name: archive.read(name) for name in archive.namelist()}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not an archive of cells: {error}; restore or remove it") from None


def _is_archived(name: str) -> bool:
    """Return whether a name is CELL/FILE, where FILE matches a pattern in ARCHIVED at the same depth."""
    cell, _, inner = name.partition("/")
    depth = {pattern.count("/") for pattern in ARCHIVED if fnmatch(inner, pattern)}
    return is_inside(name) and bool(cell) and inner.count("/") in depth


def unpack(experiment: Experiment, runs: Path, out: Path) -> int:
    """Restore the archived cells of the result at `out` into `runs`; return their number.

    Skips cells that are already in `runs`, are being trained, or were trained with different settings.
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
            write_json(folder / FACTS, facts)  # last: a cell with this file counts as trained
            restored += 1
    return restored
