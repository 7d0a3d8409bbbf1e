"""`benchmarks/gpu`: every part runs where little is installed; its configurations are up to date."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.figures import Figure
from benchmarks.gpu import configure
from benchmarks.gpu.cells import CELLS
from benchmarks.gpu.correctness import CHECKS
from benchmarks.gpu.rows import annotated
from benchmarks.gpu.run import GRAPHS_TINY, SPEED_TINY
from benchmarks.gpu.shared import CONFIGS
from mmdiff_ray import config as configuration

ROOT = Path(__file__).parents[2]
BLOCK = """
import sys

for name in ("ray", "mlflow", "omegaconf", "lpips"):
    sys.modules[name] = None  # importing it now raises ImportError
"""
FIGURE = {"figure", "value", "baseline", "ratio", "target", "met", "lower", "note"}
LOOP = {
    "step_s",
    "spread",
    "images_per_s",
    "flops_per_s",
    "peak_memory_bytes",
    "kernels",
    "busy_share",
    "profile",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a tiny run, in processes without ray, mlflow, omegaconf and lpips."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(BLOCK, encoding="utf8")
    done = subprocess.run(
        ["bash", "benchmarks/gpu/run.sh", "--tiny"],
        capture_output=True,
        text=True,
        timeout=540,
        cwd=ROOT,
        env={**os.environ, "OUT": str(folder / "out"), "PYTHON": sys.executable, "PYTHONPATH": str(folder)},
    )
    log = (folder / "out" / "log.txt").read_text(encoding="utf8")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    return folder / "out"


def read(results: Path, name: str) -> dict:
    return json.loads((results / name).read_text(encoding="utf8"))


@pytest.mark.slow
def test_every_part_is_done_and_few_small_files_come_back(results):
    run = read(results, "run.json")
    assert [part["status"] for part in run["parts"]] == ["done"] * 4 and run["failures"] == []
    assert run["machine"]["torch"] == torch.__version__
    assert len(list(results.iterdir())) <= 8


@pytest.mark.slow
def test_losses_agree_in_every_check(results):
    found = read(results, "correctness.json")
    assert found.keys() == CHECKS.keys()
    figures = [figure for part in found.values() for figure in part]
    assert all(figure.keys() == FIGURE for figure in figures)
    assert [figure["figure"] for figure in figures if figure["met"] is False] == []


@pytest.mark.slow
def test_speed_is_measured_beside_the_bare_loop_in_every_mode(results):
    found = read(results, "speed.json")
    rounds = {"plain": SPEED_TINY, "graphs": GRAPHS_TINY}
    assert found.keys() == {
        "ceiling",
        *(f"{name}-{mode}" for mode, names in rounds.items() for name in names),
    }
    assert all(found[f"{name}-plain"]["modes"].keys() == {"compiled", "eager"} for name in SPEED_TINY)
    assert all(found[f"{name}-graphs"]["modes"].keys() == {"graphs"} for name in GRAPHS_TINY)
    for mode in (mode for entry in found.values() for mode in entry.get("modes", {}).values()):
        assert mode["ours"].keys() == mode["bare"].keys() == LOOP
        assert mode["ours"]["kernels"] > mode["bare"]["kernels"] > 0


@pytest.mark.slow
def test_every_cell_returns_its_curve_and_its_model(results):
    found = read(results, "science.json")
    assert found["curves"].keys() == CELLS.keys() and found["missing"] == []
    assert len(set(found["samples"].values())) == 1
    with safe_open(str(results / "exports.safetensors"), "pt") as exports:
        names = {name.split("/")[0] for name in exports.keys()}  # noqa: SIM118
        assert json.loads(exports.metadata()["samples"]) == found["samples"]
    assert names == CELLS.keys()


@pytest.mark.slow
def test_the_table_has_a_line_for_every_figure(results):
    table = (results / "table.txt").read_text(encoding="utf8")
    assert all(f"{name}: validation loss" in table for name in CELLS)
    assert "dit_base (batch 8), compiled: step, ms" in table


@pytest.mark.slow
def test_models_are_measured_afterwards(results, tmp_path):
    words = [str(results), "image_mask-masks", "--rows", "4", "--to", str(tmp_path), "--tiny"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.measure", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    keys = {figure["key"] for figure in read(tmp_path, "measured.json")["figures"]}
    assert "alpha/iou" in keys and "palette/miou" in done.stdout


def test_committed_configurations_are_those_of_the_package(monkeypatch):
    monkeypatch.chdir(ROOT)
    made = {**configure.speed(), "correctness": configure.correctness(), **configure.science()}
    assert sorted(file.stem for file in CONFIGS.glob("*.json")) == sorted(made)
    stale = [
        name for name, config in made.items() if configuration.read_json(CONFIGS / f"{name}.json") != config
    ]
    assert stale == [], "run: .venv/bin/python -m benchmarks.gpu.configure"


def test_annotated_rows_are_a_share_of_every_stratum_and_the_same_at_every_visit():
    ids = torch.arange(100).repeat(3)
    strata = torch.arange(100).repeat(3) // 50
    chosen = annotated(ids, strata, 0.1, seed=0)
    assert torch.equal(chosen[:100], chosen[100:200]) and chosen.sum() == 30
    assert chosen[:50].sum() == chosen[50:100].sum() == 5
    assert not torch.equal(chosen, annotated(ids, strata, 0.1, seed=1))


@pytest.mark.parametrize(
    "figure, met",
    [
        (Figure("x", 1.04, 1.0, target=1.05), True),
        (Figure("x", 1.06, 1.0, target=1.05), False),
        (Figure("x", 300.0, 790.0, target=0.5, lower=False), False),
        (Figure("x", 0.0, target=0), True),
        (Figure("x", None, target=0), None),
    ],
)
def test_a_target_is_met_by_the_ratio_or_without_a_baseline_by_the_value(figure, met):
    assert figure.met is met
