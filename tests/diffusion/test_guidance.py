"""Guidance: what is predicted with a condition, minus what is predicted without it, taken further."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mmdiff_ray.config import WeightsConfig
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN, Prediction
from mmdiff_ray.diffusion.samplers import guided, walk
from tests.diffusion.ideal import (
    OVERLAPPING,
    OWN,
    FiniteData,
    IdealDenoiser,
    four_points,
    make_process,
    roles_of,
)

DATA = four_points()
ROWS = 6
LAYOUTS = pytest.mark.parametrize("layout", [OWN, OVERLAPPING], ids=["own", "overlapping"])


def as_network(prediction: Prediction, data: FiniteData = DATA) -> Prediction:
    """Return an ideal prediction with a network's heads: the image's code, logits of the others' classes."""
    chances = prediction.heads["pixels"].exp()
    heads = {
        name: (chances @ one_hot(data.alike(name)).to(chances.dtype)).clamp_min(1e-25).log()
        for name in data.codes
    }
    return prediction._replace(heads=heads | {"pixels": prediction.codes["pixels"]})


def expected_codes(heads: Mapping[str, Tensor], data: FiniteData = DATA) -> dict[str, Tensor]:
    """Return the expected codes under a network's heads."""
    codes = {"pixels": heads["pixels"]}
    for name in heads.keys() - codes.keys():
        points = one_hot(data.alike(name)).argmax(0)  # of every class, the first one
        chances = heads[name].softmax(1)
        codes[name] = torch.einsum("bk,kchw->bchw", chances, data.codes[name][points].to(chances.dtype))
    return codes


def pulled(predict: "Counted", scales: dict[str, float]):
    return guided(predict, predict.process, predict.given, scales, expected_codes)


class Counted:
    """The ideal denoiser with given codes, counting how often it is asked."""

    def __init__(self, layout, given: dict[str, Tensor], kappa: float = 0.7) -> None:
        self.ideal = IdealDenoiser(make_process(layout, {"mask": WeightsConfig("linear")}, kappa), DATA)
        self.process = self.ideal.process
        self.given = given
        self.calls = 0

    def __call__(self, z: Tensor, t: Tensor, roles) -> Prediction:
        self.calls += 1
        return as_network(self.ideal(z, t, roles, self.given, {}))


def given_codes(*names: str) -> dict[str, Tensor]:
    return {name: DATA.codes[name][1:2].expand(ROWS, -1, -1, -1) for name in names}


def noisy(predict: Counted, roles, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return z_t of the first point with the given codes in it, and t."""
    codes = {name: code[:1].expand(ROWS, -1, -1, -1) for name, code in DATA.codes.items()} | predict.given
    t = torch.full((ROWS,), 0.6, dtype=torch.float64)
    marginal = predict.process.marginal(codes, roles, t)
    return marginal.sample(torch.randn(marginal.mean.shape, generator=torch.Generator().manual_seed(seed))), t


@LAYOUTS
def test_heads_are_extrapolated_from_absent_to_given_and_codes_follow_them(layout):
    """h + (g - 1) (h - h with the label absent), with the label's code taken out of z_t for the latter."""
    predict, roles = Counted(layout, given_codes("label")), roles_of(ROWS, label=GIVEN)
    z, t = noisy(predict, roles)
    found = pulled(predict, {"label": 3.0})(z, t, roles)
    full = predict(z, t, roles)
    without = z.clone()
    without[:, layout["label"]] -= 0.7 * predict.given["label"]
    lone = predict(without, t, {**roles, "label": torch.full((ROWS,), ABSENT)})
    for name in OWN:
        torch.testing.assert_close(found.heads[name], 3 * full.heads[name] - 2 * lone.heads[name])
        torch.testing.assert_close(found.codes[name], expected_codes(found.heads)[name])
    assert all(found.codes[name].abs().max() <= 1 for name in ("label", "mask"))  # as far out as codes lie
    assert (found.codes["pixels"] - full.codes["pixels"]).abs().max() > 0.1


@LAYOUTS
def test_every_guided_instance_adds_its_own_difference(layout):
    predict, roles = Counted(layout, given_codes("label", "mask")), roles_of(ROWS, label=GIVEN, mask=GIVEN)
    z, t = noisy(predict, roles)
    scales = {"label": 2.0, "mask": 0.5}
    found = pulled(predict, scales)(z, t, roles).heads["pixels"]
    want = full = predict(z, t, roles).heads["pixels"]
    for name, scale in scales.items():
        want = want + pulled(predict, {name: scale})(z, t, roles).heads["pixels"] - full
    torch.testing.assert_close(found, want)


def test_guidance_costs_one_prediction_per_guided_instance_and_none_at_scale_one():
    for scales, calls in (
        ({"label": 1.0, "mask": 1.0}, 1),
        ({"label": 2.0, "mask": 1.0}, 2),
        ({"label": 2.0, "mask": 3.0}, 3),
        ({"pixels": 2.0}, 1),
    ):
        predict = Counted(OWN, given_codes("label", "mask"))
        roles = roles_of(ROWS, label=GIVEN, mask=GIVEN)
        pulled(predict, scales)(*noisy(predict, roles), roles)
        assert predict.calls == calls


def test_scale_zero_predicts_as_if_the_instance_were_absent():
    predict, roles = Counted(OWN, given_codes("label")), roles_of(ROWS, label=GIVEN)
    z, t = noisy(predict, roles)
    found = pulled(predict, {"label": 0.0})(z, t, roles).codes
    z[:, OWN["label"]] -= 0.7 * predict.given["label"]
    want = predict(z, t, {**roles, "label": torch.full((ROWS,), ABSENT)}).codes
    torch.testing.assert_close(found, want)


def test_guidance_leaves_rows_alone_where_the_instance_is_not_given():
    """A batch may mix rows: in these the label is given, generated and absent in turn."""
    predict = Counted(OVERLAPPING, given_codes("label"))
    roles = roles_of(ROWS, label=torch.tensor([GIVEN, GENERATED, ABSENT]).repeat(2))
    z, t = noisy(predict, roles)
    found = pulled(predict, {"label": 4.0})(z, t, roles)
    full = predict(z, t, roles)
    changed = (found.codes["pixels"] != full.codes["pixels"]).flatten(1).any(1)
    assert changed.tolist() == [True, False, False] * 2


@LAYOUTS
def test_given_codes_come_back_unchanged_from_a_guided_walk(layout):
    predict, roles = Counted(layout, given_codes("label")), roles_of(ROWS, label=GIVEN)
    shape, generator = (ROWS, predict.process.channels, 1, 2), torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    last, _ = walk(
        predict.process, pulled(predict, {"label": 3.0}), lambda purpose: noise, predict.given, roles, 5
    )
    assert torch.equal(last.codes["label"], predict.given["label"])
    assert predict.calls == 2 * 5


def standard_normal(shape: tuple[int, ...], generator: torch.Generator, purpose: str) -> Tensor:
    return torch.randn(shape, generator=generator)


def test_stronger_guidance_draws_more_of_what_the_condition_makes_likelier():
    """The label makes the dark picture three times as likely as the bright one; without it they are alike."""
    codes = {"pixels": torch.tensor([-1.0, 1.0, -1.0, 1.0]), "label": torch.tensor([1.0, 1.0, -1.0, -1.0])}
    data = FiniteData(
        {name: code.reshape(4, 1, 1, 1).expand(4, 1, 1, 2) for name, code in codes.items()},
        torch.tensor([0.375, 0.125, 0.125, 0.375]),
    )
    rows, process = 4000, make_process({"pixels": slice(0, 1), "label": slice(1, 2)})
    ideal, given = IdealDenoiser(process, data), {"label": data.codes["label"][:1].expand(rows, 1, 1, 2)}
    roles = {"pixels": torch.full((rows,), GENERATED), "label": torch.full((rows,), GIVEN)}
    shares = []
    for scale in (0.0, 1.0, 4.0):
        noise = partial(standard_normal, (rows, 2, 1, 2), torch.Generator().manual_seed(0))
        predict = guided(
            lambda z, t, r: as_network(ideal(z, t, r, given, {}), data),
            process,
            given,
            {"label": scale},
            partial(expected_codes, data=data),
        )
        last, _ = walk(process, predict, noise, given, roles, 20)
        shares.append(float((last.codes["pixels"].mean((1, 2, 3)) < 0).float().mean()))
    assert shares[:2] == pytest.approx([0.5, 0.75], abs=5 * (0.25 / rows) ** 0.5)
    assert shares[2] > 0.85
