"""Cells that were trained before stay valid when keys are added or defaults change."""

import zipfile
from pathlib import Path

import pytest

from mmdiff_ray.experiments.archive import archive_file, unpack
from mmdiff_ray.experiments.cell import asked_of
from mmdiff_ray.experiments.spec import load_experiment

RESULTS = Path(__file__).parents[2] / "results"
ARCHIVES = sorted(RESULTS.glob("*.cells.zip"))


@pytest.mark.parametrize("file", ARCHIVES, ids=lambda file: file.name.split(".")[0])
def test_committed_cells_match_the_settings_of_their_experiment(file, tmp_path):
    name = file.name.split(".")[0]
    experiment = load_experiment(name, "small")
    table = RESULTS / name
    assert archive_file(table) == file
    with zipfile.ZipFile(file) as archive:
        keys = {entry.split("/")[0] for entry in archive.namelist()}
    assert unpack(experiment, tmp_path, table) == len(keys)
    cell = next(cell for cell in experiment.cells() if cell.method.name == experiment.main)
    assert all(asked.taken for asked in asked_of(experiment, cell, tmp_path))
