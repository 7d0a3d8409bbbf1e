"""Scalars, trained and sampled, and vectors of several numbers."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mmdiff_ray.config import ConfigError
from mmdiff_ray.diffusion import rng
from mmdiff_ray.diffusion.objective import Objective
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.vector import VectorModality, VectorOptions
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.sampling.generator import Generator
from mmdiff_ray.tasks import Tasks
from tests.modalities import tiny

PLAIN = {
    **tiny.PLAIN,
    "modalities": {
        "pixels": {"type": "image"},
        "brightness": {"type": "scalar", "source": "pixels"},
        # Nothing else tells the price: loud, it is read from its own code.
        "price": {"type": "scalar", "column": "name", "weights": {"scale": 1}},
    },
    "tasks": {
        "joint": {"roles": {"pixels": "generated", "brightness": "generated", "price": "generated"}},
        "order": {"roles": {"pixels": "generated", "brightness": "given"}},
        "judge": {"roles": {"pixels": "given", "brightness": "generated"}},
    },
}


def test_the_plug_in_that_it_was_still_loads():
    assert build_denoiser(tiny.config(plain={**PLAIN, "plugins": ["pipelines.scalar_modality"]}))


@pytest.fixture
def denoiser():
    return build_denoiser(tiny.config(plain=PLAIN))


def calibrated(denoiser, count: int = 128):
    batch = tiny.rows(denoiser.modalities, count)
    for name, modality in denoiser.modalities.items():
        modality.calibrate(batch.data[name])
    return batch


def test_brightness_is_read_from_the_image_and_price_from_a_text_column(denoiser):
    batch = tiny.rows(denoiser.modalities, 8)
    mean = batch.data["pixels"].float().mean((1, 2, 3)) / 255
    torch.testing.assert_close(batch.data["brightness"], mean, atol=1e-4, rtol=0)
    assert batch.data["price"].tolist() == pytest.approx([float(tiny.raw_row(i)["name"]) for i in range(8)])


def test_it_keeps_the_promises_of_a_modality_type(denoiser):
    data = calibrated(denoiser).data["price"]
    price = denoiser.modalities["price"]
    code = price.encode(data)
    assert code.shape == (128, 1, *tiny.SIZE)
    assert float(code.square().mean().sqrt()) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(price.from_code(code), data, atol=1e-4, rtol=0)
    sure = torch.cat([price.standardise(data), torch.full((128, 1), -3.0)], 1)
    torch.testing.assert_close(price.expected_code(sure), code)
    torch.testing.assert_close(price.answer(sure), data, atol=1e-4, rtol=0)
    assert price.metrics(price.answer(sure), data)["absolute_error"].sum < 1e-2


def test_its_likelihood_integrates_to_one(denoiser):
    price = denoiser.modalities["price"]
    price.scale.fill_(2.0)
    axis = torch.linspace(-30, 30, 6001)
    prediction = torch.tensor([[0.7, math.log(1.5)]]).expand(len(axis), 2)
    nats = price.negative_log_likelihood(prediction, axis * 2.0 + price.mean)
    assert float((-nats).exp().sum() * (axis[1] - axis[0])) == pytest.approx(1, abs=1e-4)


def test_a_denoiser_with_it_learns_in_a_few_steps(denoiser):
    config = tiny.config(plain=PLAIN)
    batch = calibrated(denoiser, 48)
    tasks = Tasks(config.tasks, list(denoiser.modalities), set())
    objective = Objective(denoiser.process, config.loss, dict(denoiser.modalities))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=4e-3)
    losses = []
    for step in range(80):
        _, roles = tasks.draw(batch, seed=step)
        t = (rng.uniform(step, "time", batch.visits, batch.ids, 1)[:, 0] * 1000).floor().add(1) / 1000
        codes, conditions = denoiser.encode(batch.data), denoiser.conditions(batch.data)
        noise = rng.normal(step, "noise", batch.visits, batch.ids, (denoiser.process.channels, *tiny.SIZE))
        z_t = denoiser.process.marginal(codes, roles, t).sample(noise)
        predicted = denoiser(z_t, t, roles, codes, conditions)
        rows = objective.row_sums(z_t, t, roles, codes, batch.data, predicted.codes, predicted.heads)
        sums = {key: value.sum() for key, value in rows.items()}
        counts = objective.counts(roles, math.prod(tiny.SIZE))
        optimizer.zero_grad()
        objective.total(sums, counts).backward()
        optimizer.step()
        losses.append(
            [float((sums[f"l2/{n}"] / counts[f"l2/{n}"]).detach()) for n in ("brightness", "price")]
        )
    first, last = np.mean(losses[:5], 0), np.mean(losses[-5:], 0)
    assert (last < first - 0.3).all(), (first, last)  # nats


def test_numbers_are_parsed_written_and_shown(denoiser, tmp_path):
    price = denoiser.modalities["price"]
    path = price.write(torch.tensor(2.5), tmp_path / "row")
    assert price.parse(path.read_text()) == np.float32(2.5)
    assert price.picture(torch.tensor([0.25, 3.0])) == ["0.25", "3"]
    for text in ("cheap", "", "nan", "inf"):
        with pytest.raises(ConfigError, match="price: got"):
            price.parse(text)


def test_what_a_row_lacks_reads_as_none_and_a_missing_column_is_named(denoiser):
    context = RowContext(tiny.SIZE, 0, 0, 0)
    assert denoiser.modalities["price"].read({"name": None}, context, {}) is None
    assert denoiser.modalities["brightness"].read({}, context, {}) is None
    kind, options = type(denoiser.modalities["price"]), denoiser.modalities["price"].options
    with pytest.raises(ConfigError, match=r"modalities\.price needs the column 'name'"):
        kind.resolve("price", options, {"other": {"kind": "text"}})
    with pytest.raises(ConfigError, match=r"modalities\.price wants a column of kind text or vector"):
        kind.resolve("price", options, {"name": {"kind": "label"}})
    with pytest.raises(ConfigError, match=r"a scalar is one number; column 'name' has 3\..*type=vector"):
        kind.resolve("price", options, {"name": {"kind": "vector", "dim": 3}})
    assert kind.resolve("price", options, tiny.COLUMNS) == options


def vector(dim: int = 3, **options) -> VectorModality:
    return VectorModality("place", VectorOptions(type="vector", dim=dim, **options), tiny.SIZE)


def test_a_scalar_reads_a_column_of_vectors_of_one(denoiser):
    context = RowContext(tiny.SIZE, 0, 0, 0)
    assert denoiser.modalities["price"].read({"name": np.ones(1)}, context, {}).shape == ()


def test_each_number_has_its_own_channel_and_scale():
    modality = vector()
    data = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 20, 0.1]) + 5
    modality.calibrate(data)
    code = modality.encode(data)
    assert code.shape == (500, 3, *tiny.SIZE) and modality.prediction_channels == 6
    torch.testing.assert_close(code.square().mean((0, 2, 3)).sqrt(), torch.ones(3))
    torch.testing.assert_close(modality.from_code(code), data, rtol=1e-4, atol=1e-4)


def test_likelihood_is_that_of_independent_normals():
    modality = vector(2)
    modality.mean, modality.scale = torch.tensor([1.0, 2]), torch.tensor([3.0, 4])
    data, prediction = torch.tensor([[4.0, 2.0]]), torch.tensor([[0.5, -1.0, 0.2, -0.3]])
    wanted = -stats.norm([0.5, -1.0], np.exp([0.2, -0.3])).logpdf([1.0, 0.0]).sum()
    assert float(modality.negative_log_likelihood(prediction, data)) == pytest.approx(wanted, rel=1e-5)


def test_vectors_are_parsed_from_text_and_files_and_shown_with_their_names(tmp_path):
    np.save(tmp_path / "v.npy", np.array([[1.5, 2, 3]]))
    for text in ("1.5, 2,3", str(tmp_path / "v.npy")):
        assert vector().parse(text).tolist() == [1.5, 2, 3]
    for text in ("1.5, 2", "1, 2, nan", "1, 2, x", str(tmp_path / "none.npy")):
        with pytest.raises(ConfigError, match=r"place: got .*, want 3 numbers separated by commas"):
            vector().parse(text)
    assert vector(names=["x", "y", "z"]).picture(torch.tensor([[1, 2.5, 3]])) == ["x 1, y 2.5, z 3"]
    assert vector(8).picture(torch.arange(8)[None].float()) == ["0, 1, 2, 3, 4, 5, …"]


def test_a_row_or_data_set_of_another_length_is_refused():
    with pytest.raises(ValueError, match="place: got 2 numbers, want 3"):
        vector().read({"place": np.ones(2)}, RowContext(tiny.SIZE, 0, 0, 0), {})
    with pytest.raises(ConfigError, match=r"place\.dim \(3\) differs from the data set's 2"):
        VectorModality.resolve("place", VectorOptions(type="vector", dim=3), tiny.COLUMNS)
    with pytest.raises(ConfigError, match=r"place\.dim \(0\) must be at least 1"):
        vector(0)


def test_samples_of_numbers_are_numbers(denoiser):
    drawn = Generator(tiny.config(plain=PLAIN), denoiser).sample({}, num=2, steps=1)
    assert all(isinstance(float(value), float) and np.shape(value) == () for value in drawn["price"])
    assert not any(isinstance(value, str) for value in drawn["price"])
