"""What a table needs of its cells, in one small file beside it: who has it need not train them again."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

from mmdiff_ray import config as configuration
from mmdiff_ray.experiments.cell import cell_folder, training_digest
from mmdiff_ray.experiments.spec import Experiment

FACTS, CONFIG = "export/facts.json", "export/config.yaml"
KEPT = (CONFIG, "watched.json", "measured/*.json", "measured/*.npz", FACTS)
"""Everything but models, checkpoints and pictures; the facts come last: with them a cell counts."""
DAY = (1980, 1, 1, 0, 0, 0)
"""The time of every entry: the same cells make the same file."""


def archive_file(out: Path) -> Path:
    """Return where the cells of the table at `out` are kept."""
    return out.with_name(f"{out.name}.cells.zip")


def pack(experiment: Experiment, runs: Path, out: Path) -> Path:
    """Write what a table needs of all trained cells. Returns the file."""
    file = archive_file(out)
    partial = file.with_name(f"{file.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for cell in experiment.cells():
            folder = cell_folder(experiment, cell, runs)
            if not (folder / FACTS).is_file():
                continue
            for path in (path for pattern in KEPT for path in sorted(folder.glob(pattern))):
                name = path.relative_to(folder).as_posix()
                data = _anywhere(path) if name == CONFIG else path.read_bytes()
                entry = zipfile.ZipInfo(f"{cell.key}/{name}", DAY)
                archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    partial.replace(file)
    return file


def _anywhere(config: Path) -> bytes:
    """Return a configuration without the folder that the cell was trained in."""
    return configuration.to_yaml(dataclasses.replace(configuration.load([config]), runs="runs")).encode()


def unpack(experiment: Experiment, runs: Path, out: Path) -> int:
    """Lay the cells that are kept beside a table where they would have been trained; return how many.

    Left alone are cells that are there, and those that were trained with other settings than the experiment
    asks for now.
    """
    file, found = archive_file(out), 0
    if not file.is_file():
        return 0
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        for cell in experiment.cells():
            folder = cell_folder(experiment, cell, runs)
            mine = [name for name in names if name.startswith(f"{cell.key}/")]
            if not mine or (folder / FACTS).is_file():
                continue
            settings = training_digest(experiment.config(cell, folder.parent))
            if json.loads(archive.read(f"{cell.key}/{FACTS}"))["digest"] != settings:
                continue
            shutil.rmtree(folder / "measured", ignore_errors=True)
            archive.extractall(folder.parent, mine)
            found += 1
    return found
