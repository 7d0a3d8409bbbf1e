"""Every shipped experiment runs at its smallest size, from raw data to its page."""

import json
from pathlib import Path

import pytest
import yaml

from mmdiff_ray.cli import main
from mmdiff_ray.config import shipped
from mmdiff_ray.experiments.loading import load_experiment

FOLDER = shipped.root() / shipped.EXPERIMENTS

FILES = sorted(FOLDER.absolute().glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which data sets are built once for all experiments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("experiments"))
        yield Path.cwd()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_experiment_runs_to_its_page(folder, ray_cluster, capsys, file):
    plain = yaml.safe_load(file.read_text())
    plain["presets"]["smoke"]["cpus"] = 4  # two cells at a time, by processes that stay
    file = folder / file.name
    file.write_text(yaml.safe_dump(plain, sort_keys=False))
    assert main(["experiment", str(file), "--preset", "smoke"]) == 0
    experiment = load_experiment(str(file), "smoke")
    found = json.loads((folder / "runs" / "experiments" / f"{file.stem}.json").read_text())
    assert found["missing"] == []
    measured = {(line["measure"], line["method"]) for line in found["figures"]}
    for method in experiment.methods.values():
        for measure in experiment.measures_of(method):
            assert (measure.name, method.name) in measured
    shown = {line["figure"] for line in found["figures"]}
    assert {(panel.measure, panel.figure) for panel in experiment.overview} <= {
        (line["measure"], line["figure"]) for line in found["figures"]
    } or experiment.preset.measures
    for matrix in experiment.matrices:
        assert set(matrix["rows"]) <= {measure for measure, _ in measured}
        assert set(matrix["columns"]) <= shown
    assert all(line["mean"] == line["mean"] for line in found["figures"]), "a figure is not a number"
    assert experiment.title in capsys.readouterr().out
