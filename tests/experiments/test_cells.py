"""Cells that start from what other cells made: their first steps, or data that their model made."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.experiments.cell import is_trained, run_cell
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.experiments.parts import Cell
from mmdiff_ray.experiments.spec import Experiment
from tests import sprites as tiny


@pytest.fixture
def experiment(sprites, tmp_path) -> Experiment:
    """Two lengths of one method, another method, and one that learns from the first one's labels."""
    train = {"samples": 160, "decay": "linear", "decay_samples": 32, "warmup_samples": 16}
    base = configuration.to_plain(tiny.config(sprites))
    base["train"] |= train
    base["checkpoint"] |= {"every_samples": 16, "keep_last": 100}
    plain = {
        "name": "lengths",
        "base": base,
        "presets": {"smoke": {"seeds": [0], "overrides": []}},
        "methods": {
            "long": {"title": "long"},
            "half": {"title": "half", "share": 0.5},
            "other": {"title": "other", "overrides": ["train.learning_rate=0.001"]},
            "pupil": {
                "title": "pupil",
                "teacher": "half",
                "data": {
                    "pipeline": "predictions",
                    "uri": str(tmp_path / "labelled-{seed}"),
                    "options": {"model": "{teacher}", "rows": sprites, "given": "pixels"},
                },
                "overrides": [f"data.sources=[{{uri: '{tmp_path}/labelled-{{seed}}'}}]"],
            },
        },
        "measures": {"joint": {"evaluators": ["joint"]}},
    }
    file = tmp_path / "lengths.yaml"
    file.write_text(yaml.safe_dump(plain, sort_keys=False))
    return load_experiment(str(file), "smoke")


def weights(experiment: Experiment, runs: Path, index: int) -> dict[str, torch.Tensor]:
    folder = experiment.folder(runs, experiment.cells()[index])
    return load_file(str(folder / "export" / "model.safetensors"))


def test_a_shorter_cell_starts_from_a_longer_one_and_ends_as_if_it_had_been_alone(experiment, tmp_path):
    long, half, other, _ = experiment.cells()
    lines: list[str] = []
    run_cell(experiment, half, tmp_path / "alone", False, lines.append)
    assert lines == []
    for cell in (long, half, other):
        run_cell(experiment, cell, tmp_path / "shared", False, lines.append)
    assert [line for line in lines if "starts from" in line] == [
        "starts from the checkpoint of long-0 at 64 samples"
    ]
    alone, shared = weights(experiment, tmp_path / "alone", 1), weights(experiment, tmp_path / "shared", 1)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    assert any(
        not torch.equal(alone[name], value)
        for name, value in weights(experiment, tmp_path / "shared", 0).items()
    )
    assert experiment.config(half, tmp_path).train.decay_samples == 16


def test_a_cell_learns_from_data_that_its_teacher_made(experiment, tmp_path):
    _, half, _, pupil = experiment.cells()
    with pytest.raises(ConfigError, match="pupil-0 needs half-0, which is not trained; train that first"):
        run_cell(experiment, pupil, tmp_path, False, print)
    for cell in (half, pupil):
        run_cell(experiment, cell, tmp_path, False, print)
    made = read_manifest(str(tmp_path / "labelled-0"))
    assert "Completed by half-0 (weights " in made.description
    saved = configuration.load_saved(experiment.folder(tmp_path, pupil) / "export" / "config.yaml")
    assert [source.uri for source in saved.data.sources] == [str(tmp_path / "labelled-0")]
    assert pupil not in experiment.needed_first() and half in experiment.needed_first()
    assert experiment.select(["pupil-0"]) == [half, pupil]


def test_a_pupil_does_not_outlive_its_teacher(experiment, tmp_path):
    _, half, _, pupil = experiment.cells()
    for cell in (half, pupil):
        run_cell(experiment, cell, tmp_path, False, print)
    assert is_trained(experiment, pupil, tmp_path)
    changed = dataclasses.replace(half.method, overrides=["train.learning_rate=0.01"])
    other = dataclasses.replace(experiment, methods=experiment.methods | {"half": changed})
    with pytest.raises(ConfigError, match="pupil-0 was trained with settings that differ"):
        is_trained(other, pupil, tmp_path)
    shutil.rmtree(experiment.folder(tmp_path, pupil))
    shutil.rmtree(experiment.folder(tmp_path, half))
    run_cell(other, Cell(changed, 0), tmp_path, False, print)
    with pytest.raises(
        ConfigError, match="labelled-0 was not made by the present model of half-0; remove it"
    ):
        run_cell(other, pupil, tmp_path, False, print)
