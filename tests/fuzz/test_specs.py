"""Files of sweeps and experiments."""

from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.sweeps.spec import first_valid_config, load_sweep, standalone_yaml
from tests.experiments import test_spec
from tests.fuzz.cases import Refused, answer, changed, damaged, fuzz, leaves, words
from tests.sweeps import tiny

EXPERIMENT = {
    **test_spec.PLAIN,
    "title": "Small",
    "main": "both",
    "data": {"pipeline": "sprites", "uri": "data/{seed}", "options": {"count": 8}, "folds": 2},
    "curves": [{"name": "curve", "figure": "x/y", "points": {"thirty": 0.3}}],
    "watch": {"both": ["restore"]},
    "task_words": {"restore": "restoring"},
    "overview": {"Holes": {"measure": "thirty", "figure": "pixels_from_masked/lpips"}},
    "goals": [{"measure": "thirty", "figure": "x/y", "a": "both", "b": "half", "kind": "within 5 %"}],
}
SWEEP = {**tiny.PLAIN, "overrides": ["train.samples=64"], "seed": 3, "baseline": True}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


override = st.builds(
    "{}={}".format,
    st.sampled_from(
        ["budget.trials", "searcher.name", "scheduler", "seed", "name", "budget.x", "train.samples"]
    ),
    st.one_of(words, leaves),
)


@fuzz(25, plain=changed(SWEEP), overrides=st.lists(override, max_size=1))
def test_a_sweep_is_refused_or_makes_configurations(plain, overrides):
    Path("s.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    sweep = answer(lambda: load_sweep("s.yaml", overrides))
    if isinstance(sweep, Refused):
        return
    assert sweep.trials >= 1
    if isinstance(answer(lambda: first_valid_config(sweep)), Refused):
        return
    Path("whole.yaml").write_text(standalone_yaml("s.yaml", overrides))
    again = load_sweep("whole.yaml")
    assert (again.space, again.metrics, again.budget, again.seed) == (
        sweep.space,
        sweep.metrics,
        sweep.budget,
        sweep.seed,
    )


@fuzz(30, plain=changed(EXPERIMENT))
def test_an_experiment_is_refused_or_makes_configurations(plain):
    Path("e.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    experiment = answer(lambda: load_experiment("e.yaml", "smoke"))
    if isinstance(experiment, Refused):
        return
    runs = Path("runs")
    for cell in answer(experiment.cells)[:3]:
        assert experiment.folder(runs, cell).parent.parent == runs.absolute()
        answer(lambda: experiment.config(cell, runs))  # noqa: B023
    answer(experiment.data_sets)
    answer(lambda: [experiment.measures_of(method) for method in experiment.methods.values()])


@fuzz(10, text=damaged(yaml.safe_dump(EXPERIMENT).encode()), other=damaged(yaml.safe_dump(SWEEP).encode()))
def test_damaged_files_are_refused_or_read(text, other):
    Path("e.yaml").write_bytes(text)
    Path("s.yaml").write_bytes(other)
    answer(lambda: load_experiment("e.yaml", "smoke"))
    answer(lambda: load_sweep("s.yaml"))
