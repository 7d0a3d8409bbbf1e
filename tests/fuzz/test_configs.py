"""Configurations, overrides, roles and run names."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import strategies as st

from mmdiff_ray import config as configuration
from mmdiff_ray.batch import Batch
from mmdiff_ray.config import ConfigError, TaskConfig, check_overrides, flatten, from_plain, load, to_plain
from mmdiff_ray.config.checks import check_name
from mmdiff_ray.diffusion.process import ABSENT, GENERATED
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.storage.filesystem import filesystem, join
from mmdiff_ray.storage.mirror import cached
from mmdiff_ray.tasks import ROLES, Tasks
from tests import sprites as tiny
from tests.fuzz.cases import Refused, answer, changed, damaged, fuzz, junk, leaves, words

KEYS = sorted(flatten(from_plain(tiny.PLAIN)))
STORAGE = "s3://bucket/runs?region=x&endpoint_override=localhost:1"
TEXT = yaml.safe_dump(tiny.PLAIN).encode()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@fuzz(35, plain=changed(tiny.PLAIN))
def test_a_configuration_is_refused_or_read_back_equal(plain):
    config = answer(lambda: load(base=plain) if isinstance(plain, dict) else load(base={"name": plain}))
    if not isinstance(config, Refused):
        assert from_plain(to_plain(config)) == config
        Path("again.yaml").write_text(configuration.to_yaml(config), encoding="utf8")
        assert load(["again.yaml"]) == config


@fuzz(15, data=damaged(TEXT))
def test_a_damaged_file_is_refused_or_read(data):
    Path("x.yaml").write_bytes(data)
    answer(lambda: load(["x.yaml"]))
    answer(lambda: configuration.read_json("x.yaml"))


override = st.one_of(
    words,
    st.builds("{}={}".format, st.sampled_from(KEYS), st.one_of(words, junk)),
    st.builds("{}={}".format, words, leaves),
    st.builds("{}.{}={}".format, st.sampled_from(KEYS), words, leaves),
    st.builds("{}[{}]={}".format, st.sampled_from(KEYS), leaves, leaves),
)


@fuzz(35, given=st.lists(override, min_size=1, max_size=3))
def test_overrides_are_refused_or_taken(given):
    config = answer(lambda: load(base=tiny.PLAIN, overrides=given))
    answer(lambda: check_overrides(given))
    if not isinstance(config, Refused):
        assert from_plain(to_plain(config)) == config


small = st.one_of(
    st.integers(-2, 20), st.floats(0, 2), words, st.none(), st.lists(st.integers(0, 3), max_size=3)
)


@fuzz(15, plain=changed(tiny.PLAIN, small, most=2))
def test_a_configuration_is_refused_before_a_run_begins_or_makes_a_job(sprites, plain):
    if not isinstance(plain, dict):
        return
    config = answer(lambda: load(base={**plain, "data": {"sources": [{"uri": sprites}]}}))
    if not isinstance(config, Refused):
        answer(lambda: jobs.prepare(config, Path("unused")))
    assert os.listdir() == []


@fuzz(15, name=words, runs=st.sampled_from(["runs", STORAGE]))
def test_a_run_name_that_is_taken_is_one_folder_in_that_of_all_runs(name, runs):
    in_uri = "://" in runs
    if isinstance(answer(lambda: check_name("name", name, in_uri)), Refused):
        return
    place = join(runs, name)
    if in_uri:
        assert filesystem(place)[1] == f"bucket/runs/{name}"
    folder = cached(place)
    assert folder.parent == cached(runs)
    if not in_uri:
        folder.mkdir(parents=True)
        assert folder.parent.resolve() == Path("runs").resolve() and folder.name in os.listdir("runs")
        folder.rmdir()


role = st.one_of(st.sampled_from(list(ROLES)), st.lists(st.sampled_from(list(ROLES)), max_size=4))
row = st.builds(
    TaskConfig,
    roles=st.dictionaries(st.sampled_from("abc"), role, max_size=3),
    frequency=st.sampled_from([0.0, 0.5, 3.0]),
    drop=st.sampled_from([0.0, 0.3]),
)


@fuzz(15, rows=st.dictionaries(st.sampled_from("xyz"), row, max_size=3), seed=st.integers(0, 9))
def test_roles_are_refused_or_drawn_so_that_a_row_generates_what_it_has(rows, seed):
    tasks = answer(lambda: Tasks(rows, "abc", {"c"}))
    if isinstance(tasks, Refused):
        return
    draw = torch.Generator().manual_seed(seed)
    present = {name: torch.rand(16, generator=draw) < 0.7 for name in "abc"}
    real = torch.rand(16, generator=draw) < 0.9
    ids = torch.arange(16)
    chosen, roles = tasks.draw(Batch(ids, ids * 0, real, {}, present), seed)
    table = torch.stack([roles[name] for name in "abc"], 1)
    has = torch.stack([present[name] for name in "abc"], 1)
    assert (table[~has] == ABSENT).all() and (table[~real] == ABSENT).all()
    generates = (table == GENERATED).any(1)
    assert ((table == ABSENT).all(1) | generates).all()
    names = list(rows)
    for index in generates.nonzero().flatten().tolist():
        allowed = rows[names[chosen[index]]]
        for column, name in enumerate("abc"):
            known = {ROLES[one] for one in allowed.alternatives(name)} | {ABSENT}
            assert table[index, column].item() in known


def test_the_table_of_refusals_knows_only_our_errors():
    with pytest.raises(KeyError):
        answer(lambda: {}["x"])
    assert answer(lambda: (_ for _ in ()).throw(ConfigError("no"))) == "no"
