"""Embeddings: whitening that fails aloud, the Gaussian likelihood, reading."""

import io
import math

import numpy as np
import pytest
import torch

from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.embedding import EmbeddingModality, EmbeddingOptions
from tests.modalities import tiny

CONTEXT = RowContext(tiny.SIZE, seed=0, visit=0, row_id=0)


def embedding(dim: int = 6, **options) -> EmbeddingModality:
    options = {"code_channels": 2, **options}
    return EmbeddingModality("look", EmbeddingOptions(type="embedding", dim=dim, **options), tiny.SIZE)


def vectors(count: int, dim: int = 6, rank: int = 6, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, rank, generator=rng) @ torch.randn(rank, dim, generator=rng)
    return torch.nn.functional.normalize(mixed + 1, dim=1)


def test_code_channels_are_uncorrelated_after_calibration():
    look, data = embedding(code_channels=4), vectors(500)
    look.calibrate(data)
    code = look.encode(data)[:, :, 0, 0].double()
    torch.testing.assert_close(code.T @ code / 500, torch.eye(4).double(), atol=1e-3, rtol=0)
    assert code.mean(0).abs().max() < 1e-4


def test_standardised_embeddings_have_mean_0_and_rms_1():
    look, data = embedding(), vectors(500)
    look.calibrate(data)
    standard = look.standardise(data)
    assert standard.mean(0).abs().max() < 1e-4
    assert float(standard.square().mean()) == pytest.approx(1, abs=1e-3)


def test_calibration_does_not_depend_on_the_order_of_rows():
    first, second, data = embedding(), embedding(), vectors(300)
    first.calibrate(data)
    second.calibrate(data.flip(0))
    torch.testing.assert_close(first.basis, second.basis, atol=1e-4, rtol=0)


def test_components_point_where_their_largest_number_is_positive():
    """A decomposition leaves signs open; a sum that may be 0 would not settle them on every machine."""
    for seed in range(10):
        look = embedding(code_channels=4)
        look.calibrate(vectors(200, seed=seed))
        assert (look.basis.gather(1, look.basis.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("count", "rank"), [(3, 6), (200, 1), (1, 6)])
def test_embeddings_that_vary_too_little_for_the_code_are_refused_with_the_number(count, rank):
    look = embedding(code_channels=4)
    with pytest.raises(ConfigError, match=r"modalities\.look\.code_channels \(4\).*want at most [0-3]$"):
        look.calibrate(vectors(count, rank=rank))


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_likelihood_integrates_to_one_over_the_standardised_embedding(sigma):
    look = embedding(2, code_channels=1, sigma=sigma)
    look.mean.copy_(torch.tensor([0.3, -0.2]))
    look.scale.fill_(0.4)
    axis = torch.linspace(-7, 7, 281)
    standard = torch.cartesian_prod(axis, axis)
    prediction = torch.tensor([[0.5, -1.0]]).expand(len(standard), 2)
    nats = look.negative_log_likelihood(prediction, standard * look.scale + look.mean)
    total = float((-nats.double()).exp().sum() * (axis[1] - axis[0]) ** 2)
    assert total == pytest.approx(1, abs=1e-3)
    assert look.elements == 2


def test_vectors_are_normalised_when_read_and_bad_ones_are_errors():
    look = embedding()
    read = look.read({"look": [2.0, 0, 0, 0, 0, 0]}, CONTEXT, {})
    assert np.array_equal(read, [1, 0, 0, 0, 0, 0])
    for bad in ([0.0] * 6, [1.0] * 5, [math.nan] * 6, [math.inf] + [0.0] * 5):
        with pytest.raises(ValueError, match="embedding look"):
            look.read({"look": bad}, CONTEXT, {})


def test_a_vector_of_another_dimension_is_no_answer(tmp_path):
    np.save(tmp_path / "v.npy", np.ones(5, np.float32))
    with pytest.raises(ConfigError, match=r"look: .*v\.npy holds shape \(5,\), want \(6,\)"):
        embedding().parse(str(tmp_path / "v.npy"))
    np.save(tmp_path / "nan.npy", np.full(6, np.nan))
    with pytest.raises(ConfigError, match="look"):
        embedding().parse(str(tmp_path / "nan.npy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": None}, r"look\.code_channels \(2\) must be between 1 and dim \(None\)"),
        ({"code_channels": 7}, r"look\.code_channels \(7\) must be between 1 and dim \(6\)"),
        ({"code_channels": 0}, r"look\.code_channels \(0\)"),
        ({"sigma": -1.0}, r"look\.sigma \(-1\.0\)"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        embedding(**options)


def test_a_dimension_that_differs_from_the_data_set_is_refused():
    with pytest.raises(ConfigError, match=r"look\.dim \(5\) differs from the data set's 6"):
        EmbeddingModality.resolve("look", EmbeddingOptions(type="embedding", dim=5), tiny.COLUMNS)


@pytest.mark.parametrize(
    ("options", "without", "told"),
    [
        ({}, ["look"], True),
        ({"column": "name"}, [], True),
        ({"column": "name"}, ["look"], True),
        ({}, [], False),
        ({}, ["look", "name"], False),
    ],
)
def test_how_a_text_becomes_an_embedding_is_told_where_that_is_what_lacks(options, without, told):
    columns = {name: entry for name, entry in tiny.COLUMNS.items() if name not in (*without, "caption")}
    with pytest.raises(ConfigError, match=r"modalities\.caption (needs|wants)") as raised:
        EmbeddingModality.resolve("caption", EmbeddingOptions(type="embedding", **options), columns)
    assert ("Model the text" in str(raised.value)) == told
    assert ("makes the column 'caption' with embed_captions=on" in str(raised.value)) == told


def npy(value: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, value)
    return sink.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        npy(np.ones(6))[:40],
        npy(np.ones(6)).replace(b"{'descr'", b"{{descr'"),
        npy(np.ones(6)).replace(b"(6,), }            ", b"(9999999999999,), }"),
        npy(np.ones(6, complex)),
        npy(np.full(6, np.inf)),
        npy(np.full(6, np.nan)),
        npy(np.array(["1"] * 6)),
    ],
)
def test_a_file_that_holds_no_vector_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ConfigError, match=r"look: .*x\.npy"):
        embedding().parse(str(tmp_path / "x.npy"))
