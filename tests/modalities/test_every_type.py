"""Claims that hold for every modality type."""

import numpy as np
import pytest
import torch

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.schema import make_column
from mmdiff_ray.modalities.base import Features, Modality, RowContext
from mmdiff_ray.modalities.vector import VectorModality
from tests.modalities import tiny

NAMES = list(tiny.EVERY["modalities"])
GENERATED = [name for name in NAMES if name != "masked"]


@pytest.fixture(scope="module")
def modalities() -> dict[str, Modality]:
    made = tiny.instances(plain=tiny.EVERY)
    batch = tiny.rows(made, 64)
    for name, modality in made.items():
        modality.calibrate(batch.data[name])
    return made


@pytest.fixture(scope="module")
def data(modalities):
    return tiny.rows(modalities, 64).data


def prediction_of(modality: Modality, data: torch.Tensor) -> torch.Tensor:
    """Return a prediction that is sure of the data, in the type's own shape."""
    if modality.likelihood == "categorical":
        return torch.nn.functional.one_hot(data.long(), modality.prediction_channels).movedim(-1, 1) * 50.0
    if modality.likelihood == "Bernoulli":
        return (data.float() * 2 - 1) * 50
    if isinstance(modality, VectorModality):
        values = modality.standardise(data)
        return torch.cat([values, torch.full_like(values, -3)], 1)
    if hasattr(modality, "standardise"):
        return modality.standardise(data)
    return modality.encode(data)


@pytest.mark.parametrize("name", NAMES)
def test_code_has_unit_rms_per_channel_after_calibration(modalities, data, name):
    code = modalities[name].encode(data[name])
    assert code.shape == (64, modalities[name].code_channels, *tiny.SIZE)
    assert code.dtype == torch.float32
    rms = code.double().square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_condition_has_the_channels_it_says(modalities, data, name):
    condition = modalities[name].condition(data[name])
    assert condition.shape == (64, modalities[name].condition_channels, *tiny.SIZE)


@pytest.mark.parametrize("name", ["pixels", "alpha", "palette", "category", "attributes", "caption"])
def test_discrete_data_survives_the_code_exactly(modalities, data, name):
    decoded = modalities[name].from_code(modalities[name].encode(data[name]))
    assert decoded.dtype == data[name].dtype
    assert torch.equal(decoded, data[name])


@pytest.mark.parametrize("name", ["pixels", "alpha", "palette", "category", "attributes", "caption"])
def test_discrete_data_survives_small_noise_on_its_code(modalities, data, name):
    code = modalities[name].encode(data[name])
    noisy = modalities[name].from_code(code + 0.001 * torch.randn(code.shape, generator=seeded(1)))
    assert torch.equal(noisy, data[name])


def test_embedding_code_is_its_leading_components_and_reads_back_as_the_vector_they_span(modalities, data):
    look = modalities["look"]
    components = torch.randn(50, look.code_channels, generator=seeded(2))
    spanned = look.mean + look.scale * components @ torch.linalg.pinv(look.basis).T
    torch.testing.assert_close(look.encode(spanned)[:, :, 3, 5], components, atol=1e-5, rtol=0)
    back = look.from_code(look.broadcast(components))
    torch.testing.assert_close(back, torch.nn.functional.normalize(spanned, dim=1), atol=1e-5, rtol=0)


def test_embedding_code_tells_more_than_the_mean_embedding(modalities, data):
    look, similar = modalities["look"], torch.nn.functional.cosine_similarity
    decoded = similar(look.from_code(look.encode(data["look"])), data["look"]).mean()
    assert decoded > similar(look.mean[None], data["look"]).mean() + 0.05


@pytest.mark.parametrize("name", GENERATED)
def test_expected_code_of_a_sure_prediction_is_the_code(modalities, data, name):
    modality = modalities[name]
    expected = modality.expected_code(prediction_of(modality, data[name]))
    torch.testing.assert_close(expected, modality.encode(data[name]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GENERATED)
def test_answer_of_a_sure_prediction_is_the_data(modalities, data, name):
    modality = modalities[name]
    answer = modality.answer(prediction_of(modality, data[name]))
    torch.testing.assert_close(answer, data[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["alpha", "palette", "category"])
def test_expected_code_is_the_mean_of_the_codes_under_the_probabilities(modalities, name):
    modality = modalities[name]
    cells = () if name == "category" else tiny.SIZE
    share = torch.rand(3, modality.prediction_channels, *cells, generator=seeded(3)) + 0.1
    share = share / share.sum(1, keepdim=True)
    expected = torch.zeros(3, modality.code_channels, *tiny.SIZE)
    for k in range(modality.prediction_channels):
        whole = torch.full((3, *cells), k, dtype=torch.int64)
        weight = share[:, k].reshape(3, 1, *(cells or (1, 1)))
        expected += weight * modality.encode(whole)
    torch.testing.assert_close(modality.expected_code(share.log()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["pixels", "look", "depth", "sound"])
def test_expected_code_of_a_mean_prediction_is_the_mean_of_the_codes(modalities, data, name):
    modality = modalities[name]
    predictions = prediction_of(modality, data[name])
    mean = modality.expected_code(predictions.mean(0, keepdim=True))
    torch.testing.assert_close(mean, modality.encode(data[name]).mean(0, keepdim=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GENERATED)
def test_likelihood_prefers_the_truth_and_gives_one_number_per_row(modalities, data, name):
    modality = modalities[name]
    prediction = prediction_of(modality, data[name])
    right = modality.negative_log_likelihood(prediction, data[name])
    wrong = modality.negative_log_likelihood(prediction, data[name].roll(1, 0))
    assert right.shape == (64,)
    assert bool((right <= wrong + 1e-4).all()) and right.mean() < wrong.mean() - 0.5


@pytest.mark.parametrize("name", GENERATED)
def test_head_output_fits_the_likelihood_and_passes_gradients(modalities, data, name):
    modality = modalities[name]
    head = modality.make_head(24, 16)
    features = Features(
        torch.randn(64, 24, *tiny.SIZE, generator=seeded(4)), torch.randn(64, 16, generator=seeded(5))
    )
    prediction = head(features)
    nats = modality.negative_log_likelihood(prediction, data[name])
    assert modality.expected_code(prediction).shape == modality.encode(data[name]).shape
    assert modality.answer(prediction).shape == data[name].shape
    nats.mean().backward()
    gradients = [parameter.grad for parameter in head.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def test_metrics_of_the_truth_are_perfect_and_add_up(modalities, data):
    for name in GENERATED:
        value = 0.0 if name in ("pixels", "depth", "normals", "place", "sound") else 1.0
        (mean,) = modalities[name].metrics(data[name], data[name]).values()
        assert mean.sum / mean.count == pytest.approx(value, abs=1e-6)
        (first,) = modalities[name].metrics(data[name][:10].flip(0), data[name][:10]).values()
        (rest,) = modalities[name].metrics(data[name][10:].flip(0), data[name][10:]).values()
        both = torch.cat([data[name][:10].flip(0), data[name][10:].flip(0)])
        (whole,) = modalities[name].metrics(both, data[name]).values()
        assert first.sum + rest.sum == pytest.approx(whole.sum, rel=1e-5)
        assert first.count + rest.count == whole.count


@pytest.mark.parametrize("name", NAMES)
def test_picture_is_rgb_bytes_or_one_text_per_row(modalities, data, name):
    shown = modalities[name].picture(data[name])
    if name == "category":
        assert shown == [tiny.NAMES[index] for index in data[name].tolist()]
    elif isinstance(shown, list):
        assert len(shown) == 64 and all(isinstance(text, str) for text in shown)
    else:
        assert shown.shape[0] == 64 and shown.shape[3] == 3 and shown.dtype == np.uint8


@pytest.mark.parametrize("name", NAMES)
def test_written_data_is_parsed_back_the_same(modalities, data, name, tmp_path):
    path = modalities[name].write(data[name][3], tmp_path / "out.3")
    assert path.parent == tmp_path and path.name.startswith("out.3.")
    text = path.read_text().strip() if path.suffix == ".txt" else str(path)
    parsed = modalities[name].parse(text)
    assert parsed.shape == modalities[name].data_shape and parsed.dtype == modalities[name].data_type
    np.testing.assert_allclose(parsed, data[name][3].numpy(), atol=1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "caption"])  # any text is a text
def test_what_cannot_be_parsed_is_a_config_error_that_names_the_instance(modalities, name, tmp_path):
    (tmp_path / "broken").write_text("no picture, no vector")
    for text in (str(tmp_path / "missing"), str(tmp_path / "broken"), str(tmp_path), ""):
        with pytest.raises(ConfigError, match=name):
            modalities[name].parse(text)


@pytest.mark.parametrize("name", GENERATED)
def test_what_a_type_stores_fits_its_column_and_is_read_back_the_same(modalities, data, name):
    modality = modalities[name]
    stored, _ = make_column(modality.column, modality.entry()).accept(modality.stored(data[name][3]))
    context = RowContext(tiny.SIZE, 0, 0, 0, flip=False)
    again = modality.read({modality.column: stored}, context, {})
    np.testing.assert_allclose(again, data[name][3].numpy(), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_lacks_the_data_reads_as_none(modalities, name):
    row = dict.fromkeys(tiny.raw_row(0), None)
    assert modalities[name].read(row, RowContext(tiny.SIZE, 0, 0, 0), {}) is None


def test_the_same_seed_visit_and_row_read_the_same_bytes_and_another_visit_does_not(modalities):
    first, again = tiny.rows(modalities, 8, visit=1), tiny.rows(modalities, 8, visit=1)
    other, elsewhere = tiny.rows(modalities, 8, visit=2), tiny.rows(modalities, 8, seed=1, visit=1)
    for name in modalities:
        assert torch.equal(first.data[name], again.data[name])
    for different in (other, elsewhere):
        assert not torch.equal(first.data["pixels"], different.data["pixels"])
        assert not torch.equal(first.data["masked"][:, 3], different.data["masked"][:, 3])
        assert torch.equal(first.data["category"], different.data["category"])


@pytest.mark.parametrize(("name", "kind"), [(n, n) for n in tiny.COLUMNS if n != "name"])
def test_a_column_that_is_missing_or_of_another_kind_is_named(modalities, name, kind):
    modality = modalities[name]
    with pytest.raises(ConfigError, match=rf"modalities\.{name}.*lacks.*name.*{name}=null"):
        type(modality).resolve(name, type(modality).Options(type="x"), {"name": {"kind": "text"}})
    other = "image" if name == "caption" else "text"
    with pytest.raises(ConfigError, match=rf"modalities\.{name} wants a column of kind"):
        type(modality).resolve(name, type(modality).Options(type="x"), {name: {"kind": other}})


@pytest.mark.parametrize("name", NAMES)
def test_resolve_takes_what_the_manifest_knows(modalities, name):
    kind = type(modalities[name])
    given = {"look": {"code_channels": 2}, "caption": {"length": 12}}.get(name, {})
    options = kind.resolve(name, kind.Options(type="x", **given), tiny.COLUMNS)
    made = kind(name, options, tiny.SIZE)
    assert made.data_shape == modalities[name].data_shape
    assert made.prediction_channels == modalities[name].prediction_channels


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
