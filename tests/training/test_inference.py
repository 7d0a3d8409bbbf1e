"""Use of a trained model: exports, samples, what is given, and what is refused."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from mmdiff_ray.config import ConfigError
from mmdiff_ray.sampling.export import load_export, save_export
from mmdiff_ray.sampling.generator import Generator
from tests import sprites as tiny


@pytest.fixture(scope="module")
def trained(sprites):
    """Return a job and its trainer after a few steps."""
    job = tiny.job(sprites, "train.samples=320", "train.learning_rate=1e-2")
    trainer = tiny.trainer(job)
    trainer.advance(tiny.batches(job), 320)
    return job, trainer


@pytest.fixture(scope="module")
def model(trained) -> Generator:
    return Generator(trained[0].config, trained[1].ema.model)


@pytest.fixture(scope="module")
def row(trained) -> dict[str, np.ndarray]:
    """Return one held-out row."""
    batch = tiny.held_out(trained[0])[0]
    return {name: value[0].numpy() for name, value in batch.data.items()}


def test_exported_model_draws_the_same_samples(trained, model, tmp_path):
    job, trainer = trained
    save_export(tmp_path / "export", job.config, trainer.ema.model, {"progress": {"samples_seen": 320}})
    loaded = load_export(tmp_path / "export")
    for given in ({}, {"shape": np.int64(2)}):
        first, second = model.draw(given, 5, seed=3), loaded.draw(given, 5, seed=3)
        assert tiny.same(first.data, second.data) and tiny.same(first.heads, second.heads)
    assert loaded.config == job.config
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "config.yaml",
        "facts.json",
        "model.safetensors",
    ]


def test_export_replaces_the_one_before(trained, tmp_path):
    job, trainer = trained
    for model in (tiny.trainer(job).denoiser, trainer.ema.model):
        save_export(tmp_path / "export", job.config, model, {})
    assert tiny.same(tiny.weights(load_export(tmp_path / "export").denoiser), tiny.weights(trainer.ema.model))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere holds no exported model"):
        load_export(tmp_path / "nowhere")


def test_samples_depend_on_the_seed_and_on_nothing_else(model):
    first, again, other = (model.draw({}, 4, seed=seed).data for seed in (0, 0, 1))
    assert tiny.same(first, again)
    assert not torch.equal(first["pixels"], other["pixels"])
    assert not torch.equal(first["pixels"][0], first["pixels"][1])


def test_samples_do_not_depend_on_how_many_are_drawn_at_once(model):
    together, one_by_one = model.draw({}, 5, batch=64), model.draw({}, 5, batch=2)
    few = model.draw({}, 2)
    for name, value in together.heads.items():
        torch.testing.assert_close(one_by_one.heads[name], value, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(few.heads[name], value[:2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm2"])
@pytest.mark.parametrize("given", [("pixels",), ("shape",), ("masked",), ("pixels", "shapes", "factors")])
def test_given_modalities_come_back_bit_for_bit_and_all_else_is_generated(model, row, sampler, given):
    drawn = model.draw({name: row[name] for name in given}, 3, sampler=sampler, steps=3).data
    for name in given:
        assert all(np.array_equal(value.numpy(), row[name]) for value in drawn[name])
    assert set(drawn) == {"pixels", "shapes", "shape", "factors", *given}
    assert drawn["pixels"].dtype == torch.uint8 and drawn["pixels"].shape == (3, 3, 8, 8)
    assert drawn["shapes"].max() < 7 and drawn["shape"].dtype == torch.int64
    torch.testing.assert_close(drawn["factors"].norm(dim=1), torch.ones(3))


def test_each_row_can_be_given_its_own(model):
    labels = np.array([0, 3, 5])
    drawn = model.draw({"shape": labels}, 3).data
    assert drawn["shape"].tolist() == [0, 3, 5]


def test_what_no_task_generates_stays_away(sprites):
    roles = {"shape": "given", "shapes": "absent", "factors": "absent"}
    changed = [f"tasks.joint.roles.{name}={role}" for name, role in roles.items()]
    never = tiny.generator(tiny.job(sprites, *changed, "tasks.understand=null", "tasks.prompt=null"))
    assert set(never.draw({}, 2, steps=2).data) == {"pixels"}
    assert set(never.draw({"shape": np.int64(1)}, 2, steps=2).data) == {"pixels", "shape"}


def test_guidance_of_one_changes_nothing_and_more_of_it_does(model, row):
    given = {"shape": row["shape"]}
    plain, one = model.draw(given, 3), model.draw(given, 3, guidance={"shape": 1.0})
    more, named = model.draw(given, 3, guidance=3.0), model.draw(given, 3, guidance={"shape": 3.0})
    assert tiny.same(plain.data, one.data) and tiny.same(more.data, named.data)
    assert not torch.equal(plain.heads["pixels"], more.heads["pixels"])
    assert torch.equal(more.data["shape"], plain.data["shape"])
    assert tiny.same(model.draw({}, 2).data, model.draw({}, 2, guidance=3.0).data)  # nothing is given


def test_agreement_of_answer_and_code_is_a_share_of_discrete_instances_alone(model, row):
    joint = model.draw({}, 4).agreement
    assert set(joint) == {"shapes", "shape"}
    assert all(0 <= share <= 1 for share in joint.values())
    assert set(model.draw({"shape": row["shape"]}, 4).agreement) == {"shapes"}


def test_drawing_leaves_the_model_as_it_was(trained):
    job, trainer = trained
    before = tiny.weights(trainer.ema.model)
    trainer.denoiser.train()
    Generator(job.config, trainer.ema.model).draw({}, 1)
    assert tiny.same(before, tiny.weights(trainer.ema.model))


@pytest.mark.parametrize(
    "given, settings, message",
    [
        ({"colour": np.int64(1)}, {}, "no modality 'colour'; it has: pixels, shapes, shape, factors, masked"),
        (
            {"pixels": np.zeros((3, 9, 8), np.uint8)},
            {},
            r"given pixels: got shape \(3, 9, 8\), want \(3, 8, 8\)",
        ),
        ({"shape": np.array([1, 2, 3])}, {}, r"given shape: got shape \(3,\), want \(\) or \(2,\)"),
        ({"pixels": np.zeros((3, 8, 8))}, {}, "given pixels: got values of type float64, want uint8"),
        ({}, {"sampler": "dpm3"}, "sampler: .*dpm3.*ancestral, ddim, dpm2"),
        ({}, {"steps": 0}, r"steps \(0\) must be at least 1"),
        ({}, {"num": 0}, r"num \(0\) must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_a_reason(model, given, settings, message):
    with pytest.raises(ConfigError, match=message):
        model.draw(given, **{"num": 2, **settings})


# --- plain values, as MLflow's models hand them out ----------------------------------------------------


def test_plain_samples_are_arrays_and_names(model, row):
    drawn = model.sample({"shape": ["star", 2]}, num=2, steps=3)
    assert drawn["shape"][0] == "star" and len(drawn["shape"]) == 2
    assert drawn["pixels"][0].shape == (3, 8, 8) and drawn["pixels"][0].dtype == np.uint8
    assert drawn["shapes"][0].shape == (8, 8)
    drawn = model.sample(
        {"pixels": [row["pixels"]] * 2, "factors": [list(row["factors"])] * 2}, num=2, steps=2
    )
    assert np.array_equal(drawn["pixels"][1], row["pixels"])
    with pytest.raises(ConfigError, match="no label 'sta'; did you mean 'star'"):
        model.sample({"shape": ["sta"]}, num=1)


def test_export_can_be_copied_elsewhere(trained, tmp_path):
    job, trainer = trained
    save_export(tmp_path / "export", job.config, trainer.ema.model, {})
    shutil.move(tmp_path / "export", tmp_path / "elsewhere")
    assert len(load_export(tmp_path / "elsewhere").draw({}, 1, steps=1).data) == 4


def test_the_most_likely_answer_needs_no_seed_and_is_the_walk_without_noise(model, row):
    given = {"pixels": row["pixels"]}
    first, second = (model.draw(given, 2, seed=seed, likely=True) for seed in (0, 1))
    assert tiny.same(first.data, second.data)
    assert all(torch.allclose(value[0].float(), value[1].float(), atol=1e-5) for value in first.data.values())
    sampled = model.draw(given, 2, seed=0, likely=False)
    assert not tiny.same(first.data, sampled.data)


def test_a_task_says_how_it_is_answered_and_the_caller_may_say_otherwise(trained, row):
    config, denoiser = trained[0].config, trained[1].ema.model
    tasks = {**config.tasks, "understand": dataclasses.replace(config.tasks["understand"], readout="likely")}
    model = Generator(dataclasses.replace(config, tasks=tasks), denoiser)
    assert model.is_likely(["pixels"])
    assert not model.is_likely([]) and not model.is_likely(["masked"]) and not model.is_likely(["shape"])
    given = {"pixels": row["pixels"]}
    assert tiny.same(model.draw(given, 2).data, model.draw(given, 2, likely=True).data)
    assert not tiny.same(model.draw(given, 2).data, model.draw(given, 2, likely=False).data)
    assert model.steps(likely=True) == min(3, config.evaluate.steps)
    values = model.sample({"pixels": [row["pixels"]]}, 1)
    again = model.sample({"pixels": [row["pixels"]]}, 1, likely=True)
    assert values["shape"] == again["shape"] and np.array_equal(values["shapes"], again["shapes"])


def test_probabilities_are_the_heads_averaged_over_draws(model, row):
    given = {"pixels": row["pixels"]}
    one, other, both = (
        model.probabilities("shape", given, 3, draws, seed) for draws, seed in ((1, 0), (1, 1), (2, 0))
    )
    assert one.shape == (3, 6) and np.allclose(both.sum(1), 1, atol=1e-5)
    assert np.allclose(both, (one + other) / 2, atol=1e-6) and not np.allclose(one, other)
    assert model.probabilities("shapes", given, 3).shape[2:] == (8, 8)
    with pytest.raises(ConfigError, match="factors has no classes"):
        model.probabilities("factors", given, 3)
