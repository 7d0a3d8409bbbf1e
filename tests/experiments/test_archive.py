"""Cells that were trained before stay valid when keys are added or defaults change."""

import zipfile
from pathlib import Path

import pytest

from mmdiff_ray.experiments.archive import archive_file, result_file, result_path, unpack
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.experiments.measurement import measurements_of

RESULTS = Path(__file__).parents[2] / "results"
ARCHIVES = sorted(RESULTS.glob("*.cells.zip"))


@pytest.mark.parametrize("file", ARCHIVES, ids=lambda file: file.name.split(".")[0])
def test_committed_cells_match_the_settings_of_their_experiment(file, tmp_path):
    result = file.name.split(".")[0]
    name, _, preset = result.partition("-")
    experiment = load_experiment(name, preset or "small")
    table = RESULTS / result
    assert archive_file(table) == file
    with zipfile.ZipFile(file) as archive:
        keys = {entry.split("/")[0] for entry in archive.namelist()}
    assert unpack(experiment, tmp_path, table) == len(keys)
    cell = next(cell for cell in experiment.cells() if cell.method.name == experiment.main)
    assert all(one.is_done for one in measurements_of(experiment, cell, tmp_path))


@pytest.mark.parametrize("given", ["tables/small.v2", "tables/small.v2.json", "tables/small.v2.md"])
def test_a_result_is_named_by_itself_or_its_table_or_page(given):
    assert result_file(result_path(Path(given)), ".cells.zip") == Path("tables/small.v2.cells.zip")
