"""Cells of several lengths that share their first steps."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmdiff_ray import config as configuration
from mmdiff_ray.experiments.cell import run_cell
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.experiments.spec import Experiment
from tests import sprites as tiny


@pytest.fixture
def experiment(sprites, tmp_path) -> Experiment:
    """Two lengths of one method, and another method."""
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
    long, half, other = experiment.cells()
    lines: list[str] = []
    run_cell(experiment, half, tmp_path / "alone", False, lines.append)
    assert lines == []
    for cell in (long, half, other):
        run_cell(experiment, cell, tmp_path / "shared", False, lines.append)
    assert [line for line in lines if "starts from" in line] == ["starts from the 64 samples of long-0"]
    alone, shared = weights(experiment, tmp_path / "alone", 1), weights(experiment, tmp_path / "shared", 1)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    assert any(
        not torch.equal(alone[name], value)
        for name, value in weights(experiment, tmp_path / "shared", 0).items()
    )
    assert experiment.config(half, tmp_path).train.decay_samples == 16
