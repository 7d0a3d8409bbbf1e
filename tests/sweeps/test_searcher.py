"""What a sweep's searcher suggests, also after the end of an earlier driver."""

import time

import pytest

from mmdiff_ray.distributed.tune.searcher import SpaceSearcher
from mmdiff_ray.distributed.tune.sweep import make_configs
from mmdiff_ray.sweeps.journal import Trial
from tests.sweeps import tiny

SPACE = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}, "loss.gamma": {"uniform": [1, 9]}}


def drawn(searcher: SpaceSearcher) -> list[Trial]:
    found = []
    while isinstance(point := searcher.suggest(f"trial {len(found)}"), dict):
        found.append(Trial(point["number"], point["values"]))
    return found


@pytest.mark.parametrize("name", ["random", "tpe", "nsga2"])
def test_a_resumed_searcher_draws_nothing_again(sprites, tmp_path, name):
    metrics = {"a": "min", "b": "max"} if name == "nsga2" else {"a": "min"}
    sweep = tiny.sweep(tmp_path, sprites, space=SPACE, searcher__name=name, metrics=metrics, budget__trials=8)
    known = drawn(SpaceSearcher(sweep, make_configs(sweep), []))
    assert known == drawn(SpaceSearcher(sweep, make_configs(sweep), [])), "the seed decides"
    for trial in known[:4]:
        trial.outcome = "finished"
        trial.reports = [{"samples": 64, "figures": {"a": trial.number, "b": 1.0}}]
    later = drawn(SpaceSearcher(sweep, make_configs(sweep), known[:4]))
    assert [trial.number for trial in later] == [4, 5, 6, 7]
    values = [tuple(trial.values.values()) for trial in known[:4] + later]
    assert len(set(values)) == 8


@pytest.mark.parametrize("name", ["random", "tpe", "nsga2", "grid"])
def test_the_base_configuration_itself_goes_first_and_teaches_the_searcher_nothing(sprites, tmp_path, name):
    metrics = {"a": "min", "b": "max"} if name == "nsga2" else {"a": "min"}
    space = {"loss.gamma": {"grid": [2.0, 3.0, 4.0]}} if name == "grid" else SPACE
    words = {"space": space, "searcher__name": name, "metrics": metrics, "budget__trials": 4}
    plain = tiny.sweep(tmp_path, sprites, **words)
    sweep = tiny.sweep(tmp_path, sprites, **words, baseline=True)
    searcher = SpaceSearcher(sweep, make_configs(sweep), [])
    first, *others = drawn(searcher)
    assert (first.number, first.values) == (0, {}) and [trial.number for trial in others] == [1, 2, 3]
    values = [trial.values for trial in drawn(SpaceSearcher(plain, make_configs(plain), []))]
    assert [trial.values for trial in others] == values[:3]
    first.outcome, first.reports = "finished", [{"samples": 64, "figures": {"a": 1.0, "b": 1.0}}]
    searcher.note(first)
    again = SpaceSearcher(sweep, make_configs(sweep), [first])
    for one in (searcher, again):
        assert not [trial for trial in one.study.trials if trial.state.is_finished()]
    assert [trial.number for trial in drawn(again)] == [1, 2, 3]
    later = Trial(1, others[0].values, outcome="failed")  # the baseline's process died before its journal
    lost = drawn(SpaceSearcher(sweep, make_configs(sweep), [later]))
    assert [trial.number for trial in lost] == [0, 2, 3] and lost[0].values == {}


def test_a_trial_that_was_cut_short_goes_first_and_none_goes_after_the_deadline(sprites, tmp_path):
    sweep = tiny.sweep(tmp_path, sprites, space=SPACE, budget__trials=3)
    known = [Trial(0, {"train.learning_rate": 1e-3, "loss.gamma": 2.0})]
    assert drawn(SpaceSearcher(sweep, make_configs(sweep), known))[0] == known[0]
    assert drawn(SpaceSearcher(sweep, make_configs(sweep), known, deadline=time.time() - 1)) == []
