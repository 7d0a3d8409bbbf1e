"""Labels: codes that stay of unit RMS while they learn, noise patterns on an image, names."""

import pytest
import torch
from torch import Tensor

from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.label import LabelModality, LabelOptions
from tests.modalities import tiny

CONTEXT = RowContext(tiny.SIZE, seed=0, visit=0, row_id=0)


def label(classes: int = 4, size: tuple[int, int] = tiny.SIZE, **options) -> LabelModality:
    return LabelModality("category", LabelOptions(type="label", classes=classes, **options), size)


@pytest.mark.parametrize("pattern", ["constant", "noise"])
def test_learned_codes_keep_unit_rms_and_move_under_an_optimizer(pattern):
    modality = label(code="learned", pattern=pattern, code_channels=3)
    target = torch.randn(4, 3, *tiny.SIZE, generator=torch.Generator().manual_seed(0)) * 5
    before = modality.codes.detach().clone()
    optimizer = torch.optim.SGD(modality.parameters(), lr=30.0)
    for _ in range(20):
        optimizer.zero_grad()
        (modality.encode(torch.arange(4)) - target).square().mean().backward()
        optimizer.step()
    after = modality.codes.detach()
    rms = after.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.ones(4), atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(modality.from_code(after), torch.arange(4))


def test_fixed_codes_have_no_parameters():
    assert list(label().parameters()) == []


def smooth_images(count: int, size: int) -> Tensor:
    """Return smooth images of unit RMS per channel, (count, 3, size, size)."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return fine / fine.square().mean((0, 2, 3), keepdim=True).sqrt()


def decoded_share(modality: LabelModality, b: float, abar: float) -> float:
    """Return how often a class is read out of z_t, where its code at weight b lies on an image."""
    rng = torch.Generator().manual_seed(2)
    labels = torch.randint(0, modality.prediction_channels, (200,), generator=rng)
    images = smooth_images(200, modality.size[0])
    noise = torch.randn(images.shape, generator=rng)
    z_t = abar**0.5 * images + (1 - abar) ** 0.5 * noise
    z_t[:, : modality.code_channels] += b * modality.encode(labels)
    return float((modality.from_code(z_t[:, : modality.code_channels]) == labels).float().mean())


def test_noise_patterns_of_1000_classes_are_told_apart_on_an_image_and_constant_ones_are_not():
    noise = label(1000, (64, 64), pattern="noise", code_channels=3)
    assert decoded_share(noise, b=0.05, abar=0.3) > 0.95
    assert decoded_share(noise, b=0.0, abar=0.3) < 0.05
    constant = label(8, (64, 64), code_channels=3)  # even so few
    assert decoded_share(constant, b=0.05, abar=0.3) < 0.5


def test_noise_patterns_are_fixed_and_of_any_number_of_channels():
    first, again = label(pattern="noise"), label(pattern="noise")
    assert first.code_channels == 1 and torch.equal(first.codes, again.codes)
    assert label(pattern="noise", code_channels=7).codes.shape == (4, 7, *tiny.SIZE)


def test_likelihood_sums_to_one():
    prediction = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    nats = [label().negative_log_likelihood(prediction, torch.full((3,), k)) for k in range(4)]
    torch.testing.assert_close(torch.stack([(-value).exp() for value in nats]).sum(0), torch.ones(3))
    assert label().elements == 1


def test_a_class_out_of_range_is_an_error():
    for value in (-1, 4):
        with pytest.raises(ValueError, match=f"category: got class {value}, want 0 to 3"):
            label().read({"category": value}, CONTEXT, {})
    assert label().read({"category": 0}, CONTEXT, {}) == 0


def test_names_and_numbers_are_parsed_and_names_come_first():
    named = label(names=["3", "two", "one", "zero"])
    assert named.parse("3") == 0 and named.parse("one") == 2 and named.parse("1") == 1
    assert label().parse("2") == 2
    assert named.picture(torch.tensor([3, 1])) == ["zero", "two"]
    assert label().picture(torch.tensor([3])) == ["3"]


@pytest.mark.parametrize("text", ["twoo", "4", "-1", "²", "1.0"])
def test_an_unknown_name_gets_a_hint(text):
    with pytest.raises(ConfigError, match="category: no label") as error:
        label(names=["zero", "one", "two", "three"]).parse(text)
    if text == "twoo":
        assert "did you mean 'two'?" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, r"category\.classes \(1\)"),
        ({"code": "free"}, r"category: code is fixed or learned, got 'free'"),
        ({"pattern": "stripes"}, r"pattern is constant or noise, got 'stripes'"),
        ({"classes": 9, "code_channels": 3}, r"category\.code_channels \(3\) cannot tell 9 .* at least 4"),
        ({"pattern": "noise", "code_channels": 0}, r"category\.code_channels \(0\)"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        label(**options)


def test_a_number_of_classes_that_differs_from_the_data_set_is_refused():
    with pytest.raises(ConfigError, match=r"category\.classes \(5\) differs from the data set's 4"):
        LabelModality.resolve("category", LabelOptions(type="label", classes=5), tiny.COLUMNS)


@pytest.mark.parametrize("pattern", ["constant", "noise"])
def test_a_label_at_its_usual_scale_is_as_hard_to_read_from_noise_at_any_size(pattern):
    usual = [read_from_noise(label(size=(side, side), pattern=pattern, code_channels=2)) for side in (8, 32)]
    assert usual[0] == pytest.approx(usual[1], abs=0.05)
    assert 0.4 < usual[0] < 0.8
    assert read_from_noise(label(size=(8, 8), pattern=pattern, code_channels=2), scale=1.0) == 1.0


def read_from_noise(modality: LabelModality, scale: float | None = None, rows: int = 2000) -> float:
    """Return how often a class is read out of its code in unit noise."""
    rng = torch.Generator().manual_seed(3)
    labels = torch.randint(0, modality.prediction_channels, (rows,), generator=rng)
    codes = modality.encode(labels)
    noisy = codes * (scale or modality.weights.scale) + torch.randn(codes.shape, generator=rng)
    return float((modality.from_code(noisy) == labels).float().mean())


def test_an_index_is_no_name_where_names_are_numbers():
    named = label(names=["01", "02", "03", "04"])
    assert named.parse("01") == 0
    with pytest.raises(ConfigError, match=r"no label '1'; did you mean '01'\?$"):
        named.parse("1")
