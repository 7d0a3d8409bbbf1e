"""Checkpoints: all of the state or nothing, of the moment of asking, and only those worth keeping."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

from mmdiff_ray.config import CheckpointConfig, ConfigError
from mmdiff_ray.training import checkpoint
from mmdiff_ray.training.checkpoint import CheckpointStore, complete, drop, read_state, restore
from mmdiff_ray.training.progress import Progress
from tests import sprites as tiny


@pytest.fixture(scope="module")
def job(sprites):
    return tiny.job(sprites)


@pytest.fixture(scope="module")
def written(job, tmp_path_factory):
    """Return a trainer after one step, and the folder of its only checkpoint."""
    folder = tmp_path_factory.mktemp("one")
    trainer = tiny.trainer(job)
    trainer.advance(tiny.batches(job), 16)
    store = CheckpointStore(folder, CheckpointConfig())
    store.save(trainer, {"version": "x"}, 1.5)
    store.wait()
    return trainer, complete(folder)[0]


def state_of(trainer) -> dict[str, torch.Tensor]:
    """Return a copy of all tensors of a trainer: weights, buffers, averages, the optimizer's moments."""
    named = {f"model.{name}": value for name, value in trainer.denoiser.state_dict().items()}
    named |= {f"ema.{name}": value for name, value in trainer.ema.model.state_dict().items()}
    for number, group in enumerate(trainer.optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            for key, value in trainer.optimizer.state[parameter].items():
                named[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
    return {name: value.detach().clone() for name, value in named.items()}


def test_ten_steps_are_five_a_checkpoint_and_five_bit_for_bit(job, tmp_path):
    whole = tiny.trainer(job)
    batches = tiny.batches(job)
    reports = [whole.advance(batches, seen) for seen in (80, 160)]
    first, store = tiny.trainer(job), CheckpointStore(tmp_path, CheckpointConfig())
    first.advance(tiny.batches(job), 80)
    store.save(first, {})
    store.wait()
    second = tiny.trainer(job)
    restore(second, complete(tmp_path)[0])
    report = second.advance(tiny.batches(job, start=second.progress.steps), 160)
    assert tiny.same(state_of(whole), state_of(second))
    assert any(name.endswith("exp_avg_sq") for name in state_of(second))
    assert {k: v for k, v in report.items() if k.startswith("loss/")} == {
        k: v for k, v in reports[1].items() if k.startswith("loss/")
    }
    assert (second.progress.steps, second.progress.samples_seen) == (10, 160)


def test_the_optimizers_settings_are_those_of_the_config_and_its_moments_those_of_the_checkpoint(
    sprites, written
):
    saved, path = written
    again = tiny.trainer(tiny.job(sprites, "train.weight_decay=0.1"))
    restore(again, path)
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.1, 0]
    assert [group["weight_decay"] for group in saved.optimizer.param_groups] == [0, 0]
    assert tiny.same(state_of(again), state_of(saved))


def test_what_is_written_is_the_state_of_the_moment_of_saving_though_training_goes_on(job, tmp_path):
    trainer, batches = tiny.trainer(job), tiny.batches(job)
    store = CheckpointStore(tmp_path, CheckpointConfig())
    trainer.advance(batches, 32)
    then, at = state_of(trainer), Progress(**vars(trainer.progress))
    store.save(trainer, {})
    trainer.advance(batches, 96)
    with torch.no_grad():  # what is changed in place reaches no file, however late that is written
        for value in [*trainer.denoiser.parameters(), *trainer.ema.model.parameters()]:
            value.fill_(7.0)
        for moments in trainer.optimizer.state.values():
            moments["exp_avg"].fill_(7.0)
    store.wait()
    again = tiny.trainer(job)
    restore(again, complete(tmp_path)[0])
    assert tiny.same(then, state_of(again))
    assert again.progress == at


def test_folder_gets_its_name_when_all_is_written(job, tmp_path):
    told: list[list[Path]] = []
    trainer = tiny.trainer(job)
    store = CheckpointStore(
        tmp_path, CheckpointConfig(), completed=lambda: told.append(list(tmp_path.iterdir()))
    )
    trainer.advance(tiny.batches(job), 16)
    final = store.save(trainer, {})
    assert not final.exists() and complete(tmp_path) == [] == told
    while not final.exists():
        store.poll()
    assert complete(tmp_path) == [final] and [path.name for path in tmp_path.iterdir()] == ["000000000016"]
    assert told == [[final]]


def test_unfinished_folder_is_ignored_and_written_anew(job, written, tmp_path):
    trainer, path = written
    shutil.copytree(path, tmp_path / "000000000008")
    shutil.copytree(path, tmp_path / "000000000016.partial")
    (tmp_path / "000000000016.partial" / "left over").write_text("by a killed worker")
    shutil.copytree(path, tmp_path / "000000000024")
    (tmp_path / "000000000024" / "state.json").unlink()
    store = CheckpointStore(tmp_path, CheckpointConfig())
    assert store.latest() == tmp_path / "000000000008"
    store.save(trainer, {})
    store.wait()
    assert store.latest() == tmp_path / "000000000016"
    assert not (tmp_path / "000000000016" / "left over").exists()
    assert not (tmp_path / "000000000016.partial").exists()


def test_reader_meets_whole_checkpoints_or_none_while_they_are_dropped(written, tmp_path):
    _, path = written
    names = [f"{samples:012d}" for samples in range(60)]
    for name in names:
        shutil.copytree(path, tmp_path / name)
    dropping = threading.Thread(target=lambda: [drop(tmp_path / name) for name in names])
    dropping.start()
    while dropping.is_alive():
        found = {path.name for path in complete(tmp_path)}
        assert found >= {path.name for path in tmp_path.iterdir()} & set(names)
    dropping.join()
    assert list(tmp_path.iterdir()) == []


def test_half_dropped_checkpoint_is_none(written, tmp_path, monkeypatch):
    _, path = written
    shutil.copytree(path, tmp_path / path.name)
    with monkeypatch.context() as killed:
        killed.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
        drop(tmp_path / path.name)
    assert complete(tmp_path) == [] and list(tmp_path.iterdir()) != []
    shutil.copytree(path, tmp_path / path.name)
    drop(tmp_path / path.name)
    assert list(tmp_path.iterdir()) == []


def test_state_says_what_it_is(written):
    trainer, path = written
    state = read_state(path)
    assert state["format_version"] == checkpoint.FORMAT_VERSION
    assert (state["metric"], state["version"]) == (1.5, "x")
    assert Progress(**state["progress"]) == trainer.progress
    assert path.name == "000000000016"


@pytest.mark.parametrize(
    "metrics, kept",
    [
        ([3.0, 1.0, 2.0, 4.0, 5.0], [32, 64, 80]),  # the best, and the last two
        ([3.0, 4.0, 5.0, 2.0, 1.0], [64, 80]),
        ([None, -9.0, None, -4.0, None], [32, 64, 80]),
        ([None] * 5, [64, 80]),
    ],
)
def test_last_and_best_are_kept(job, tmp_path, metrics, kept):
    trainer, store = tiny.trainer(job), CheckpointStore(tmp_path, CheckpointConfig(keep_last=2))
    for metric in metrics:
        trainer.progress.samples_seen += 16
        store.save(trainer, {}, metric)
    store.wait()
    assert [int(path.name) for path in complete(tmp_path)] == kept
    best = store.best()
    assert (
        best is None
        if metrics[0] is metrics[1] is None
        else int(best.name) == kept[-1 if kept == [64, 80] else 0]
    )


def change_state(path, folder, **changes):
    """Return a copy of a checkpoint with another state.json."""
    copy = folder / path.name
    shutil.copytree(path, copy)
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps({**state, **changes}))
    return copy


@pytest.mark.parametrize("version", [0, checkpoint.FORMAT_VERSION + 1])
def test_checkpoint_of_an_unknown_format_is_refused_by_name(job, written, tmp_path, version):
    path = change_state(written[1], tmp_path, format_version=version)
    with pytest.raises(ConfigError, match=rf"{path.name}: checkpoint format {version}, .* reads 1"):
        restore(tiny.trainer(job), path)


def test_older_format_is_brought_to_the_present_one(job, written, tmp_path, monkeypatch):
    """Version 1 had no field `merit`, which this imagined version 3 needs; 2 called it `grade`."""
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 3)
    migrations = {
        1: lambda state: {**state, "format_version": 2, "grade": state["metric"]},
        2: lambda state: {**state, "format_version": 3, "merit": state["grade"]},
    }
    monkeypatch.setattr(checkpoint, "MIGRATIONS", migrations)
    assert read_state(written[1])["merit"] == 1.5
    again = tiny.trainer(job)
    restore(again, written[1])
    assert tiny.same(state_of(again), state_of(written[0]))
