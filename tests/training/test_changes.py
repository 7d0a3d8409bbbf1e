"""Values that change while a model trains: in force from their sample on, the same after a stop."""

import dataclasses
import json

import pytest
import torch

from mmdiff_ray.config import ChangeConfig, ConfigError, check_changes, in_force
from mmdiff_ray.distributed.worker import local_stream, train_worker
from mmdiff_ray.runs.job import prepare
from mmdiff_ray.sampling.export import load_export
from tests import sprites as tiny

CHANGES = [
    ChangeConfig(64, {"loss.coefficients.l2": 0.25, "modalities.shape.weights.scale": 0.05}),
    ChangeConfig(96, {"train.learning_rate": 1e-4}),
]


def changing(config, changes=CHANGES):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, changes=list(changes)))


@pytest.fixture(scope="module")
def config(sprites):
    return changing(tiny.job(sprites).config)


def test_each_value_is_in_force_from_its_sample_on(config):
    before, between, after = (in_force(config, samples) for samples in (63, 64, 96))
    assert (before.loss.coefficients.l2, before.modalities["shape"].weights.scale) == (1.0, 0.2)
    assert (between.loss.coefficients.l2, between.modalities["shape"].weights.scale) == (0.25, 0.05)
    assert after.loss.coefficients.l2 == 0.25 and after.train.learning_rate == 1e-4
    assert after.train.changes == []


@pytest.mark.parametrize("at", [0, 16])
def test_process_and_objective_train_on_a_change_from_its_sample_on(sprites, at):
    change = ChangeConfig(at, {"loss.coefficients.l2": 0.25, "modalities.shape.weights.scale": 0.05})
    made = tiny.job(sprites)
    made = dataclasses.replace(made, config=changing(made.config, [change]))
    plain, trainer = made.denoiser().process.profiles["shape"], tiny.trainer(made)
    stream = tiny.batches(made)
    t = torch.tensor([0.5], dtype=torch.float64)
    for stop, changed in ((16, at == 0), (32, True)):
        trainer.advance(stream, stop)
        for process in (trainer.denoiser.process, trainer.ema.model.process, trainer.objective.process):
            part = float(process.profiles["shape"](t)) / float(plain(t))
            assert part == pytest.approx(0.25 if changed else 1.0)
        assert trainer.objective.config.coefficients.l2 == (0.25 if changed else 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([ChangeConfig(64), ChangeConfig(64)], r"train.changes\[1\].at \(64\) must be above"),
        ([ChangeConfig(1, {"model.preset": "nano"})], "model.preset cannot change during training"),
        ([ChangeConfig(1, {"modalities.shape.type": "image"})], "modalities.shape.type cannot change"),
        ([ChangeConfig(1, {"loss.coefficients.l9": 1})], r"train.changes\[0\].values: .*l9"),
    ],
)
def test_changes_that_cannot_be_are_named(config, changes, words):
    with pytest.raises(ConfigError, match=words):
        check_changes(changing(config, changes))


def test_a_change_that_breaks_the_prior_is_refused_before_training(config, tmp_path):
    flat = {"modalities.shape.weights.family": "constant", "modalities.shape.weights.scale": 1.0}
    bad = [ChangeConfig(64, flat)]
    with pytest.raises(ConfigError, match=r"train.changes\[0\].*nats per dimension"):
        prepare(changing(config, bad), tmp_path / "run")


def test_training_follows_the_changes_and_a_pause_changes_nothing(sprites, tmp_path):
    def trained(name: str, *pauses: int):
        job = tiny.job(sprites)
        job = dataclasses.replace(job, config=changing(job.config), folder=tmp_path / name)
        for pause in (*pauses, None):
            state = train_worker(
                dataclasses.replace(job, pause_at=pause), local_stream, lambda event: None, lambda: False
            )
            assert state == ("finished" if pause is None else "stopped")
            facts = json.loads((job.export / "facts.json").read_text())
            assert facts["progress"]["samples_seen"] == (pause or job.config.train.samples)
        return load_export(job.export)

    straight, paused = trained("straight"), trained("paused", 64, 96)
    assert straight.config.loss.coefficients.l2 == 0.25 and straight.config.train.learning_rate == 1e-4
    for (name, first), second in zip(
        straight.denoiser.state_dict().items(), paused.denoiser.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name
    t = torch.tensor([0.5], dtype=torch.float64)
    plain = tiny.job(sprites).denoiser().process.profiles["shape"](t)
    assert float(straight.denoiser.process.profiles["shape"](t)) == pytest.approx(float(plain) / 4)
