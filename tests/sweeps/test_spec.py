"""Sweeps as they are written: what is read, and mistakes by their name."""

from pathlib import Path

import pytest
import yaml

from mmdiff_ray.config import ConfigError
from mmdiff_ray.sweeps.spec import first_valid_config, load_sweep, standalone_yaml
from tests.sweeps import tiny
from tests.sweeps.tiny import WEIGHTS

FILES = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))


def test_a_trial_trains_with_its_values_and_the_budget(tmp_path):
    sweep = tiny.sweep(tmp_path)
    config = sweep.config({f"{WEIGHTS}.family": "linear", f"{WEIGHTS}.scale": 0.1})
    assert config.modalities["shape"].weights.family == "linear"
    assert config.modalities["shape"].weights.scale == 0.1
    assert config.train.samples == 64 and config.train.max_minutes is None
    assert sweep.period == 16 and config.checkpoint.every_samples == 16
    assert sweep.period % config.train.log_every_samples == 0


def test_overrides_reach_the_sweep_and_the_configuration(tmp_path):
    file = tiny.write(tmp_path)
    sweep = load_sweep(
        file, ["budget.trials=9", "scheduler.name=median", "seed=3", "train.learning_rate=0.5"]
    )
    assert (sweep.budget.trials, sweep.scheduler.name, sweep.seed) == (9, "median", 3)
    assert sweep.config({}).train.learning_rate == 0.5 and sweep.budget.samples == 64


@pytest.mark.parametrize("metric", ["loss/total", "val/loss/total", "val/loss/l2/shape"])
def test_a_sweep_is_not_judged_by_a_loss_that_its_space_scales(tmp_path, metric):
    with pytest.raises(ConfigError, match=f"metrics.{metric}: the space has .*, which scales this loss"):
        tiny.sweep(tmp_path, metrics={metric: "min"})


def test_a_loss_may_judge_what_does_not_scale_it(tmp_path):
    space = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    assert tiny.sweep(tmp_path, space=space, metrics={"val/loss/total": "min"}).main == "val/loss/total"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spaces": {}}, "sweep: unknown key 'spaces'.*did you mean 'space'"),
        ({"space": None}, "space is missing"),
        ({"name": "../x"}, "name: '../x' cannot name a file"),
        ({"metrics": {"shape/head_nll": "down"}}, "metrics.shape/head_nll: unknown 'down'; known: min, max"),
        ({"searcher__name": "tpa"}, "searcher.name: unknown 'tpa'.*did you mean 'tpe'"),
        ({"scheduler__name": "asah"}, "scheduler.name: unknown 'asah'.*did you mean 'asha'"),
        ({"scheduler__grace": 0}, r"scheduler.grace \(0\) must be above 0"),
        ({"budget__trials": 0}, r"budget.trials \(0\) must be at least 1"),
        ({"budget__trails": 5}, "budget.trails: unknown key 'trails'"),
        ({"searcher__name": "nsga2"}, "nsga2 needs two or more metrics"),
        ({"searcher__name": "grid"}, "the grid searcher needs a list of values"),
        (
            {"searcher__name": "grid", "budget__trials": 3, "space": {"seed": {"grid": [0, 1, 2, 3]}}},
            r"budget.trials \(3\) must be 4: all points of the grid$",
        ),
        (
            {"space": {"train.log_every_samples": {"choice": [1, 2]}}},
            "space.train.log_every_samples: the sweep sets this key",
        ),
        ({"space": {"evaluate.rows": {"randint": [8, 64]}}}, "space.evaluate.rows: it changes how trials"),
        (
            {"space": {"modalities.shpe.weights.scale": {"uniform": [0, 1]}}},
            "space.modalities.shpe.weights.scale: unknown 'shpe'; known: .*; did you mean 'shape'",
        ),
        (
            {"overrides": [f"{WEIGHTS}.scale=0.1"]},
            f"space.{WEIGHTS}.scale: an override also sets this key",
        ),
        ({"base": "nowhere.yaml"}, "no config file nowhere.yaml"),
        ({"space": {"a.b": {"uniform": [1, 0]}}}, r"space.a.b.uniform: got \[1, 0\], want \[low, high\]"),
        ({"space": {"a.b": {"loguniform": [0, 1]}}}, r"low \(0\) must be above 0"),
        ({"space": {"a.b": {"normal": [0, 1]}}}, "want one of uniform, loguniform"),
        ({"space": {"a.b": {"choice": []}}}, "the list is empty"),
        ({"space": {"a.b": {"choice": [1], "when": {"c": [1]}}}}, "c must be a choice listed before it"),
        ({"scheduler__name": "pbt"}, "pbt does not support conditions"),
        ({"baseline": "maybe"}, "baseline: got 'maybe', want true or false"),
        ({"metrics": ["shape/head_nll"]}, "metrics: got .*, want a section"),
        ({"metrics": {7: "min"}}, "metrics: got 7, want text"),
        ({"seed": "x"}, "seed: got 'x', want a whole number"),
        ({"overrides": "a=b"}, "overrides: got 'a=b', want a list"),
        ({"budget": 3}, "budget: got 3, want a section"),
        ({"space": {"a.b": {"choice": [1], "when": [2]}}}, r"space.a.b.when: got \[2\], want a section"),
        ({"space": {"a.b": {"uniform": [0, float("inf")]}}}, "space.a.b.uniform: .*low below high"),
        ({"space": {"a.b": {"randint": [0.5, 2]}}}, "space.a.b.randint: .*want whole numbers"),
        (
            {"searcher__name": "grid", "space": {f"a.b{i}": {"grid": list(range(99))} for i in range(9)}},
            "space: a grid of .* points exceeds",
        ),
        ({"scheduler__name": "pbt", "baseline": True}, "baseline: pbt changes the values of all"),
        (
            {
                "searcher__name": "grid",
                "baseline": True,
                "budget__trials": 2,
                "space": {"seed": {"grid": [0, 1]}},
            },
            r"budget.trials \(2\) must be 3: all points of the grid plus the baseline",
        ),
        (
            {"scheduler__name": "pbt", "space": {"model.preset": {"choice": ["nano", "tiny"]}}},
            "space.model.preset: pbt changes values during training",
        ),
    ],
)
def test_mistakes_are_named_with_file_and_key(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        tiny.sweep(tmp_path, **changes)
    assert "tiny.yaml" in str(caught.value)


def test_what_is_kept_of_a_sweep_needs_no_other_file(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(tiny.PLAIN["base"]))
    file = tiny.write(tmp_path)
    plain = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**plain, "base": str(base)}))
    before = load_sweep(file, ["budget.trials=9", "train.learning_rate=0.5"])
    kept = tmp_path / "kept.yaml"
    kept.write_text(standalone_yaml(file, ["budget.trials=9", "train.learning_rate=0.5"]))
    base.unlink()
    file.unlink()
    after = load_sweep(kept)
    assert after == before and after.name == "tiny" and after.config({}) == before.config({})


def test_a_space_in_which_nothing_is_a_configuration_is_told_without_data(tmp_path):
    space = {"modalities.shape.weights.scala": {"uniform": [0, 1]}}
    with pytest.raises(ConfigError, match="scala"):
        first_valid_config(tiny.sweep(tmp_path, space=space))
    first_valid_config(tiny.sweep(tmp_path))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_sweeps_load_and_say_how_they_are_run(file):
    sweep = load_sweep(file)
    assert f"# command: mmdiff sweep sweeps/{file.name}\n" in file.read_text()
    config = sweep.config({})
    assert config.workers.count == 1 and sweep.budget.trials * sweep.budget.samples <= 1_000_000
    assert sweep.data["uri"] == config.data.sources[0].uri
