"""What a table needs of its cells, in one small file beside it: who has it need not train them again."""

import dataclasses
import json
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError
from mmdiff_ray.experiments.cell import cell_folder, is_measured, training_digest
from mmdiff_ray.experiments.files import beside
from mmdiff_ray.experiments.spec import Experiment
from mmdiff_ray.runs.exclusive import alone
from mmdiff_ray.training.checkpoint import write_json

FACTS, CONFIG = "export/facts.json", "export/config.yaml"
KEPT = (CONFIG, FACTS, "watched.json", "measured/*.json", "measured/*.npz")
"""Everything but models, checkpoints and pictures."""
DAY = (1980, 1, 1, 0, 0, 0)
"""The time of every entry: the same cells make the same file."""


def archive_file(out: Path) -> Path:
    """Return where the cells of the table at `out` are kept."""
    return beside(out, ".cells.zip")


def pack(experiment: Experiment, runs: Path, out: Path) -> Path:
    """Write what a table needs of all trained cells. Returns the file.

    What the file has already stays, but for cells that are measured to their end here.
    """
    file = archive_file(out)
    kept = _read(file)
    known = {name.partition("/")[0] for name in kept}
    for cell in experiment.cells():
        folder = cell_folder(experiment, cell, runs)
        if not (folder / FACTS).is_file() or (cell.key in known and not is_measured(experiment, cell, runs)):
            continue
        kept = {name: data for name, data in kept.items() if not name.startswith(f"{cell.key}/")}
        for path in (path for pattern in KEPT for path in sorted(folder.glob(pattern))):
            name = path.relative_to(folder).as_posix()
            kept[f"{cell.key}/{name}"] = _anywhere(path) if name == CONFIG else path.read_bytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for name in sorted(kept):
            archive.writestr(zipfile.ZipInfo(name, DAY), kept[name], zipfile.ZIP_DEFLATED)
    partial.replace(file)
    return file


def _read(file: Path) -> dict[str, bytes]:
    """Return what an archive holds, name -> bytes."""
    if not file.is_file():
        return {}
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".." not in name.split("/")}


def _anywhere(config: Path) -> bytes:
    """Return a configuration without the folder that the cell was trained in."""
    return configuration.to_yaml(dataclasses.replace(configuration.load_saved(config), runs="runs")).encode()


def unpack(experiment: Experiment, runs: Path, out: Path) -> int:
    """Lay the cells that are kept beside a table where they would have been trained; return how many.

    Left alone are cells that are there, those that are being trained, and those that were trained with other
    settings than the experiment asks for now.
    """
    kept, found = _read(archive_file(out)), 0
    for cell in experiment.cells():
        folder = cell_folder(experiment, cell, runs)
        mine = {name: data for name, data in kept.items() if name.startswith(f"{cell.key}/")}
        facts = mine.pop(f"{cell.key}/{FACTS}", None)
        if facts is None or (folder / FACTS).is_file():
            continue
        if json.loads(facts)["digest"] != training_digest(experiment.config(cell, folder.parent)):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(ConfigError), alone(folder):
            shutil.rmtree(folder / "measured", ignore_errors=True)
            for name, data in mine.items():
                (folder.parent / name).parent.mkdir(exist_ok=True)
                (folder.parent / name).write_bytes(data)
            write_json(folder / FACTS, json.loads(facts))  # with it the cell counts
            found += 1
    return found
