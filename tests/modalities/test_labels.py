"""Sets of labels: independent Bernoullis, patterns that read back, names."""

import itertools

import pytest
import torch

from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.labels import LabelsModality, LabelsOptions
from tests.modalities import tiny

NAMES = ["red", "round", "small, flat"]


def labels(names=NAMES, size: tuple[int, int] = tiny.SIZE, **options) -> LabelsModality:
    return LabelsModality("labels", LabelsOptions(type="labels", names=names, **options), size)


def all_sets(count: int = 3) -> torch.Tensor:
    return torch.tensor(list(itertools.product((0, 1), repeat=count)), dtype=torch.uint8)


def test_likelihood_is_that_of_independent_labels_and_sums_to_one():
    logits = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).expand(8, 3)
    share = (-labels().negative_log_likelihood(logits, all_sets())).exp()
    p = logits[0].sigmoid()
    wanted = torch.where(all_sets() == 1, p, 1 - p).prod(1)
    torch.testing.assert_close(share, wanted)
    assert float(share.sum()) == pytest.approx(1, abs=1e-6) and labels().elements == 3


@pytest.mark.parametrize("options", [{}, {"pattern": "noise"}, {"pattern": "noise", "code_channels": 2}])
def test_expected_code_is_the_mean_of_the_codes_of_all_sets(options):
    modality = labels(**options)
    logits = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    share = (-modality.negative_log_likelihood(logits.expand(8, 3), all_sets())).exp()
    codes = modality.encode(all_sets())
    assert codes.shape == (8, options.get("code_channels", 1 if options else 3), *tiny.SIZE)
    torch.testing.assert_close(
        modality.expected_code(logits)[0], torch.einsum("b,bchw->chw", share, codes), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(codes.square().mean((1, 2, 3)), torch.ones(8))
    assert torch.equal(modality.from_code(codes), all_sets())


def test_forty_labels_fit_in_one_channel_of_noise():
    modality = labels([str(k) for k in range(40)], pattern="noise")
    data = torch.randint(0, 2, (500, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert modality.code_channels == 1 and torch.equal(modality.from_code(modality.encode(data)), data)


@pytest.mark.parametrize("pattern", ["constant", "noise"])
def test_a_label_at_its_usual_scale_is_as_hard_to_read_from_noise_for_any_number_of_labels(pattern):
    def read_share(count: int, side: int) -> float:
        modality = labels([str(k) for k in range(count)], (side, side), pattern=pattern)
        rng = torch.Generator().manual_seed(3)
        data = torch.randint(0, 2, (1500, count), generator=rng).to(torch.uint8)
        codes = modality.encode(data)
        noisy = codes * modality.weights.scale + torch.randn(codes.shape, generator=rng)
        return float((modality.from_code(noisy) == data).float().mean())

    wanted = float(torch.special.ndtr(torch.tensor(1.0)))
    assert read_share(2, 8) == pytest.approx(wanted, abs=0.03)
    assert read_share(10, 16) == pytest.approx(wanted, abs=0.03)


def test_names_are_parsed_and_shown_also_those_with_a_comma_and_none():
    modality = labels()
    assert modality.parse("red,round").tolist() == [1, 1, 0]
    assert modality.parse("round, red").tolist() == [1, 1, 0]
    assert modality.parse("small, flat").tolist() == [0, 0, 1]
    assert modality.parse("none").tolist() == [0, 0, 0]
    assert modality.picture(all_sets()[[0, 6]]) == ["none", "red, round"]
    with pytest.raises(ConfigError, match=r"labels: no label 'rund'; did you mean 'round'\?"):
        modality.parse("red,rund")


def test_an_empty_set_is_not_a_missing_one():
    context = RowContext(tiny.SIZE, 0, 0, 0)
    assert labels().read({"labels": []}, context, {}).tolist() == [0, 0, 0]
    assert labels().read({"labels": None}, context, {}) is None
    assert labels().stored(torch.tensor([1, 0, 1], dtype=torch.uint8)) == [0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": []}, r"labels\.names is empty"),
        ({"pattern": "stripes"}, r"labels\.pattern: got 'stripes', want constant or noise"),
        ({"code_channels": 2}, r"labels\.code_channels \(2\): pattern constant has one per label, 3"),
        ({"pattern": "noise", "code_channels": 0}, r"labels\.code_channels \(0\) holds 0 cells for 3 labels"),
        ({"pattern": "noise", "size": (1, 2)}, r"\(1\) holds 2 cells for 3 labels"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        labels(**options)
