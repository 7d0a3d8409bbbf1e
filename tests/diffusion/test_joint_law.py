"""The production samplers with the ideal denoiser of a finite data set: do they draw its law?

Bounds on total variation are what perfect samples of the same number stay under 999 times in 1,000, plus the
error that steps of this size may cost. With overlapping channels first order costs 0.03-0.04 at 20 steps and
0.007-0.02 at 50, second order 0.004-0.006 at 20; in own channels both cost less.
"""

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mmdiff_ray.config import ScheduleConfig, WeightsConfig, from_plain
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN, Prediction
from mmdiff_ray.diffusion.schedule import make_schedule
from mmdiff_ray.diffusion.weights import w_from_b
from mmdiff_ray.models.denoiser import Denoiser, build_denoiser
from mmdiff_ray.sampling.generator import sample
from tests.diffusion.ideal import (
    OVERLAPPING,
    OWN,
    FiniteData,
    IdealDenoiser,
    draw,
    four_points,
    make_process,
    total_variation,
)

ROWS = 20_000
DATA = four_points()
LAYOUTS = {"own": OWN, "overlapping": OVERLAPPING}
STEP_ERROR = {("dpm2", 20): 0.006, ("ddim", 50): 0.02, ("ancestral", 100): 0.01}


def ramp_as_step_weights() -> WeightsConfig:
    """Return the step weights, on 20 steps, that make b fall evenly from 1 to 0."""
    times = torch.arange(21, dtype=torch.float64) / 20
    a = make_schedule(ScheduleConfig(), 1).log_abar(times).diff().exp()
    return WeightsConfig("step_weights", w=w_from_b(1 - times[1:], a).tolist(), grid=20)


PROFILES = {
    "clock same": WeightsConfig(),
    "clock lead": WeightsConfig(shape=0.25),
    "clock lag": WeightsConfig(shape=4.0),
    "linear": WeightsConfig("linear"),
    "cosine": WeightsConfig("cosine"),
    "doubled": WeightsConfig("cosine", scale=2.0),
    "power": WeightsConfig("power", shape=3.0),
    "sigmoid": WeightsConfig("sigmoid", shape=8.0),
    "late": WeightsConfig("sigmoid", shape=20.0),
    "knots": WeightsConfig("knots", knots=[[0.0, 0.5], [0.3, 1.2], [0.6, 0.2], [1.0, 0.0]]),
    "step weights": ramp_as_step_weights(),
}


def sampling_error(law: Tensor, rows: int = ROWS) -> float:
    """Return the total variation that 999 in 1,000 sets of perfect samples stay under."""
    shares = law.double().numpy() / float(law.double().sum())
    counts = np.random.default_rng(0).multinomial(rows, shares, size=4000)
    return float(np.quantile(0.5 * np.abs(counts / rows - shares).sum(1), 0.999))


def law_error(ideal: IdealDenoiser, steps: int, sampler: str, rows: int = ROWS) -> float:
    return total_variation(DATA.point_of(draw(ideal, rows, steps, sampler, seed=1).codes), DATA.law())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_second_order_reaches_the_joint_law_in_20_steps_for_every_profile(layout, profile):
    weights = PROFILES[profile]
    ideal = IdealDenoiser(make_process(LAYOUTS[layout], {"label": weights, "mask": weights}), DATA)
    assert law_error(ideal, 20, "dpm2") < sampling_error(DATA.law()) + STEP_ERROR["dpm2", 20]


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 50), ("ancestral", 100)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_first_order_and_ancestral_reach_the_joint_law_for_every_profile(layout, profile, sampler, steps):
    weights = PROFILES[profile]
    ideal = IdealDenoiser(make_process(LAYOUTS[layout], {"label": weights, "mask": weights}), DATA)
    assert law_error(ideal, steps, sampler) < sampling_error(DATA.law()) + STEP_ERROR[sampler, steps]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 50), ("ancestral", 100)])
def test_first_order_and_ancestral_reach_the_joint_law_of_modalities_with_different_profiles(
    layout, sampler, steps
):
    process = make_process(LAYOUTS[layout], {"label": PROFILES["clock lead"], "mask": PROFILES["late"]})
    error = law_error(IdealDenoiser(process, DATA), steps, sampler)
    assert error < sampling_error(DATA.law()) + STEP_ERROR[sampler, steps]


def test_first_order_error_shrinks_with_more_steps_and_second_order_needs_fewer():
    ideal = IdealDenoiser(make_process(OVERLAPPING), DATA)
    coarse, medium, fine = (law_error(ideal, steps, "ddim") for steps in (5, 20, 80))
    assert coarse > 2 * medium > 3 * fine
    assert law_error(ideal, 20, "dpm2") < medium / 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_code_of_the_likeliest_class_biases_the_joint_law_and_more_steps_do_not_help(layout, sampler):
    """S_t of a generated modality needs the expected code: four times the steps leave the arg-max's error."""
    process = make_process(LAYOUTS[layout])
    likeliest = IdealDenoiser(process, DATA, likeliest=("label", "mask"))
    few, many = (law_error(likeliest, steps, sampler, 4000) for steps in (30, 120))
    expected = law_error(IdealDenoiser(process, DATA), 120, sampler, 4000)
    assert expected < sampling_error(DATA.law(), 4000) + 0.01
    assert min(few, many) > 0.06
    assert many > 0.6 * few


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_of_the_likeliest_code_is_still_there_at_a_thousand_steps(layout):
    process = make_process(LAYOUTS[layout])
    likeliest = IdealDenoiser(process, DATA, likeliest=("label", "mask"))
    assert law_error(likeliest, 1000, "ancestral", 4000) > 0.06
    error = law_error(IdealDenoiser(process, DATA), 1000, "ancestral", 4000)
    assert error < sampling_error(DATA.law(), 4000) + 0.002


CONDITIONS = {
    "label given": {"label": GIVEN},
    "mask given": {"mask": GIVEN},
    "anchor given": {"pixels": GIVEN},
    "label given, mask absent": {"label": GIVEN, "mask": ABSENT},
    "mask given, anchor absent": {"mask": GIVEN, "pixels": ABSENT},
    "anchor absent": {"pixels": ABSENT},
}


@pytest.mark.parametrize("kappa", [0.0, 3.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditional_law_is_reached_for_any_kappa(layout, condition, kappa):
    """What is given is that of the second point; the law is that of what is generated, given it."""
    roles = CONDITIONS[condition]
    weights = {"label": WeightsConfig(shape=0.5), "mask": WeightsConfig("linear")}
    process = make_process(LAYOUTS[layout], weights, kappa)
    given = {
        name: DATA.codes[name][1:2].expand(ROWS, -1, -1, -1) for name, role in roles.items() if role == GIVEN
    }
    codes = draw(IdealDenoiser(process, DATA), ROWS, 20, "dpm2", given, seed=2, **roles).codes
    for name, code in given.items():
        assert torch.equal(codes[name], code)
    law = DATA.law(**{name: int(DATA.alike(name)[1]) for name in given})
    wanted = [name for name in OWN if roles.get(name, GENERATED) == GENERATED]
    law = DATA.merged(law, wanted)
    error = total_variation(DATA.point_of({name: codes[name] for name in wanted}), law)
    assert error < sampling_error(law) + STEP_ERROR["dpm2", 20]


def test_rows_of_one_batch_may_have_different_roles():
    """A third each: label given, nothing given, label absent; each reaches its own law."""
    process = make_process(OVERLAPPING, kappa=0.5)
    label = torch.tensor([GIVEN, GENERATED, ABSENT]).repeat(ROWS)
    given = {"label": DATA.codes["label"][:1].expand(3 * ROWS, -1, -1, -1)}
    codes = draw(IdealDenoiser(process, DATA), 3 * ROWS, 20, "dpm2", given, label=label).codes
    images = DATA.point_of({"pixels": codes["pixels"], "mask": codes["mask"]})
    for role, law in (
        (GIVEN, DATA.law(label=int(DATA.alike("label")[0]))),
        (GENERATED, DATA.law()),
        (ABSENT, DATA.law()),
    ):
        assert total_variation(images[label == role], law) < sampling_error(law) + STEP_ERROR["dpm2", 20]


def test_kappa_is_how_clearly_a_condition_is_heard_through_z_alone():
    """At kappa 0 the label is not heard, at 3 the law is the conditional one."""
    given = {"label": DATA.codes["label"][:1].expand(ROWS, -1, -1, -1)}
    law = DATA.law(label=int(DATA.alike("label")[0]))
    errors = []
    for kappa in (0.0, 0.3, 1.0, 3.0):
        ideal = IdealDenoiser(make_process(OWN, kappa=kappa), DATA, hears_codes=False)
        codes = draw(ideal, ROWS, 20, "dpm2", given, label=GIVEN).codes
        errors.append(total_variation(DATA.point_of({"pixels": codes["pixels"], "mask": codes["mask"]}), law))
    assert errors[0] == pytest.approx(1 - float(DATA.shares[:2].sum()), abs=0.02)
    assert errors[0] > errors[1] + 0.05 > errors[2] + 0.05
    assert errors[3] < sampling_error(law) + STEP_ERROR["dpm2", 20]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_literal_fraction_reaches_the_joint_law_on_a_grid_that_is_as_short_as_it_needs(layout):
    """1 / (N + 1) per step leaves nothing after some ten steps: with T = 10 they are spread over all of t."""
    literal = ScheduleConfig(steps=10, paper_fraction=True)
    ideal = IdealDenoiser(make_process(LAYOUTS[layout], schedule=literal), DATA)
    assert law_error(ideal, 50, "dpm2") < sampling_error(DATA.law()) + 0.02


class IdealModel(Denoiser):
    """A production denoiser whose network is replaced by the ideal one of some rows of data."""

    def know(self, data: dict[str, Tensor], shares: Tensor) -> "IdealModel":
        self.data = data
        self.ideal = IdealDenoiser(self.process, FiniteData(self.encode(data), shares))
        return self

    def forward(self, z_t, t, roles, codes, conditions) -> Prediction:
        chances = self.ideal.chances(z_t, t, roles, codes)
        label = chances @ one_hot(self.data["label"]).float()
        mask = torch.einsum("bp,phwk->bkhw", chances, one_hot(self.data["mask"].long()).float())
        pixels = self.ideal(z_t, t, roles, codes, conditions).codes["pixels"]
        heads = {"label": label.clamp_min(1e-20).log(), "mask": mask.clamp_min(1e-20).log(), "pixels": pixels}
        expected = {name: self.modalities[name].expected_code(head) for name, head in heads.items()}
        return Prediction(expected, heads)


def ideal_model(channels: str) -> IdealModel:
    """Return the ideal model of four rows of 4x4 pixels; channels: where label and mask lie."""
    config = from_plain(
        {
            "space": {"height": 4, "width": 4},
            "model": {"preset": "nano"},
            "modalities": {
                "pixels": {"type": "image"},
                "label": {"type": "label", "classes": 2, "channels": channels, "weights": {"shape": 0.5}},
                "mask": {"type": "mask", "classes": 2, "channels": channels},
            },
            "tasks": {"joint": {"roles": {"pixels": "generated", "label": "generated", "mask": "generated"}}},
        }
    )
    built = build_denoiser(config)
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(90, 166, (1, 3, 4, 4), generator=generator)
    data = {
        "pixels": (base + torch.tensor([0, 12, 24, 36])[:, None, None, None]).to(torch.uint8),
        "label": torch.tensor([0, 0, 1, 1]),
        "mask": torch.randint(0, 2, (4, 4, 4), generator=generator).to(torch.uint8),
    }
    model = IdealModel(built.modalities, built.process, built.backbone, "u_plus_code", "v")
    return model.know(data, DATA.shares)


@pytest.mark.parametrize("channels", ["own", "pixels"])
@pytest.mark.parametrize("given", [[], ["label"]])
def test_production_sampling_with_the_ideal_network_draws_rows_of_the_data(channels, given):
    """From modalities, codes and heads to data again: whole rows in their shares, what is given unchanged."""
    rows, model = 4000, ideal_model(channels)
    roles = {name: torch.full((rows,), GIVEN if name in given else GENERATED) for name in OWN}
    condition = {name: model.data[name][3:].expand(rows) for name in given}
    drawn = sample(model, roles, condition, ids=torch.arange(rows), seed=0, steps=25, sampler="dpm2").data
    assert all(torch.equal(drawn[name], condition[name]) for name in given)
    found = torch.ones(rows, 4, dtype=torch.bool)
    for name, tolerance in {
        "label": 0,
        "mask": 0,
        "pixels": 5,
    }.items():  # the pictures differ by 12 grey levels
        drawn_rows, data_rows = (
            drawn[name].reshape(rows, 1, -1).int(),
            model.data[name].reshape(1, 4, -1).int(),
        )
        found &= (drawn_rows - data_rows).abs().amax(2) <= tolerance
    law = DATA.law(label=int(DATA.alike("label")[3])) if given else DATA.law()
    point = torch.where(found.any(1), found.int().argmax(1), 4)
    assert total_variation(point, law) < sampling_error(law, rows) + STEP_ERROR["dpm2", 20]


def test_ideal_denoiser_is_called_like_the_production_denoiser():
    assert list(inspect.signature(IdealDenoiser.__call__).parameters) == list(
        inspect.signature(Denoiser.forward).parameters
    )
