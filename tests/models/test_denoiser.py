"""The denoiser: what reaches the network and what does not, the anchor's code, layouts, priors, seeds."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import ConfigError
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN, Prediction, over_cells
from mmdiff_ray.modalities.label import LabelModality, LabelOptions
from mmdiff_ray.models.denoiser import (
    Denoiser,
    anchor_code,
    build_denoiser,
    build_modalities,
    channel_layout,
    inert_settings,
)
from mmdiff_ray.registry import register
from tests.modalities import tiny

ROWS = 24
MODES = ("in_place", "u_plus_code", "z_plus_code", "z_only")
OVERLAPPING = (
    "modalities.category.channels=pixels",
    "modalities.category.pattern=noise",
    "modalities.category.code_channels=3",
)


@register("modality", "test_random_label")
class RandomLabel(LabelModality):
    """A label with a weight that is drawn when it is made."""

    Options = LabelOptions

    def __init__(self, name: str, options: LabelOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        self.drawn = nn.Parameter(torch.randn(5))


def build(*overrides: str) -> tuple[Denoiser, Batch]:
    """Return a denoiser calibrated on a batch, and the batch."""
    denoiser = build_denoiser(tiny.config(*overrides))
    batch = tiny.rows(denoiser.modalities, ROWS)
    for name, modality in denoiser.modalities.items():
        modality.calibrate(batch.data[name])
    return denoiser, batch


def all_roles(denoiser: Denoiser, **named: int) -> dict[str, Tensor]:
    """Return the named roles in every row; what is not named is generated, or absent if it cannot be."""
    return {
        name: torch.full((ROWS,), named.get(name, ABSENT if modality.only_given else GENERATED))
        for name, modality in denoiser.modalities.items()
    }


def mixed_roles(denoiser: Denoiser) -> dict[str, Tensor]:
    """Return roles of which every instance has each that it can have, in changing combinations."""
    rng = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 2 if modality.only_given else 3, (ROWS,), generator=rng)
        for name, modality in denoiser.modalities.items()
    }


def times() -> Tensor:
    return torch.linspace(0.02, 1, ROWS, dtype=torch.float64)


def noise(denoiser: Denoiser, seed: int = 0) -> Tensor:
    shape = (ROWS, denoiser.process.channels, *tiny.SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noisy(denoiser: Denoiser, batch: Batch, roles: dict[str, Tensor]) -> Tensor:
    return denoiser.process.marginal(denoiser.encode(batch.data), roles, times()).sample(noise(denoiser))


@torch.no_grad()
def predict(denoiser: Denoiser, batch: Batch, roles: dict[str, Tensor], z_t: Tensor) -> Prediction:
    return denoiser(z_t, times(), roles, *(denoiser.encode(batch.data), denoiser.conditions(batch.data)))


def changed(denoiser: Denoiser, batch: Batch, name: str) -> Batch:
    """Return the batch with other data of one instance in every row."""
    data, modality = batch.data[name], denoiser.modalities[name]
    values = modality.prediction_channels if modality.likelihood == "categorical" else 256
    other = data.roll(1, 0) if data.is_floating_point() else ((data.long() + 1) % values).to(data.dtype)
    return dataclasses.replace(batch, data={**batch.data, name: other})


def differs(first: Prediction, second: Prediction) -> Tensor:
    """Return in which rows any predicted code is not bit for bit the same, (B,)."""
    return torch.stack(
        [(first.codes[name] != second.codes[name]).flatten(1).any(1) for name in first.codes]
    ).any(0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [(), OVERLAPPING])
def test_data_that_is_not_given_never_reaches_a_prediction(mode, layout):
    denoiser, batch = build(f"given.input={mode}", *layout)
    roles = mixed_roles(denoiser)
    z_t = noisy(denoiser, batch, roles)
    before = predict(denoiser, batch, roles, z_t)
    for name in denoiser.modalities:
        after = predict(denoiser, changed(denoiser, batch, name), roles, z_t)
        assert not differs(before, after)[roles[name] != GIVEN].any()


@pytest.mark.parametrize("mode", MODES)
def test_given_data_reaches_the_predictions_of_its_rows(mode):
    denoiser, batch = build(f"given.input={mode}")
    roles = mixed_roles(denoiser)
    before = predict(denoiser, batch, roles, noisy(denoiser, batch, roles))
    for name in denoiser.modalities:
        other = changed(denoiser, batch, name)
        # Where it is generated its data makes another z_t, which is no leak: only other rows are compared.
        after = predict(denoiser, other, roles, noisy(denoiser, other, roles))
        assert differs(before, after)[roles[name] == GIVEN].all()
        assert not differs(before, after)[roles[name] == ABSENT].any()


def test_under_z_only_a_given_code_is_heard_through_z_t_alone():
    denoiser, batch = build("given.input=z_only")
    roles = all_roles(denoiser, alpha=GIVEN)
    z_t = noisy(denoiser, batch, roles)
    before = predict(denoiser, batch, roles, z_t)
    assert not differs(before, predict(denoiser, changed(denoiser, batch, "alpha"), roles, z_t)).any()
    assert denoiser.backbone.enter.in_channels == denoiser.process.channels


def test_codes_of_instances_that_are_not_given_may_be_left_out():
    denoiser, batch = build()
    roles = all_roles(denoiser, alpha=GIVEN, masked=GIVEN)
    z_t = noisy(denoiser, batch, roles)
    given = {name: batch.data[name] for name in ("alpha", "masked")}
    with torch.no_grad():
        short = denoiser(z_t, times(), roles, denoiser.encode(given), denoiser.conditions(given))
        none = denoiser(z_t, times(), all_roles(denoiser), {}, {})
    whole = predict(denoiser, batch, roles, z_t)
    for name, code in whole.codes.items():
        torch.testing.assert_close(short.codes[name], code, atol=1e-6, rtol=0)
        assert none.codes[name].shape == code.shape


def test_kappa_changes_nothing_where_the_given_code_leaves_z_t_and_something_otherwise():
    for mode in MODES:
        predictions = []
        for kappa in (1.0, 4.0):
            settings = [f"modalities.{name}.weights.kappa={kappa}" for name in ("pixels", "alpha", "masked")]
            denoiser, batch = build(f"given.input={mode}", *settings)
            roles = mixed_roles(denoiser)
            predictions.append(predict(denoiser, batch, roles, noisy(denoiser, batch, roles)))
        pairs = [(predictions[0].codes[name], predictions[1].codes[name]) for name in predictions[0].codes]
        largest = max(float((first - second).abs().max()) for first, second in pairs)
        assert (largest < 1e-4) == (mode in ("in_place", "u_plus_code")), (mode, largest)


def test_settings_that_change_nothing_are_named_and_others_are_not():
    kappa, profile = "modalities.alpha.weights.kappa=2", "modalities.pixels.weights.shape=0.5"
    hidden = "modalities.masked.weights.family=cosine"
    assert inert_settings(tiny.config()) == []
    for override, key in (
        (kappa, "alpha.weights.kappa"),
        (profile, "pixels.weights"),
        (hidden, "masked.weights"),
    ):
        (found,) = inert_settings(tiny.config(override))
        assert found.startswith(f"modalities.{key}")
    assert inert_settings(tiny.config(kappa, "given.input=z_only")) == []
    assert inert_settings(tiny.config("modalities.alpha.weights.shape=0.5")) == []


@pytest.mark.parametrize("role", [GIVEN, ABSENT])
@pytest.mark.parametrize("mode", MODES)
def test_the_anchor_may_be_given_or_absent(mode, role):
    denoiser, batch = build(f"given.input={mode}")
    roles = all_roles(denoiser, pixels=role)
    z_t = noisy(denoiser, batch, roles)
    before = predict(denoiser, batch, roles, z_t)
    assert all(bool(code.isfinite().all()) for code in before.codes.values())
    other = changed(denoiser, batch, "pixels")
    after = predict(denoiser, other, roles, noisy(denoiser, other, roles))
    alpha_differs = (before.codes["alpha"] != after.codes["alpha"]).flatten(1).any(1)
    assert bool(alpha_differs.all()) if role == GIVEN else not bool(alpha_differs.any())
    assert differs(
        before, predict(denoiser, batch, all_roles(denoiser), z_t)
    ).all()  # roles themselves matter


def test_the_network_is_told_the_time():
    denoiser, batch = build()
    roles = all_roles(denoiser)
    z_t = noisy(denoiser, batch, roles)
    with torch.no_grad():
        first, second = (denoiser(z_t, times() * factor, roles, {}, {}) for factor in (1.0, 0.9))
    assert (first.heads["category"] != second.heads["category"]).any(1).all()


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
def test_the_anchors_code_is_exact_where_its_prediction_is(prediction):
    denoiser, _ = build()
    process, t = denoiser.process, times()
    z_0, eps = noise(denoiser, 1)[:, :3], noise(denoiser, 2)[:, :3]
    signal, sigma = (
        over_cells(value, z_0) for value in (process.schedule.abar(t).sqrt(), process.schedule.sigma(t))
    )
    y = signal * z_0 + sigma * eps
    truth = {"v": signal * eps - sigma * z_0, "eps": eps, "x0": z_0}[prediction]
    atol = 1e-3 if prediction == "eps" else 1e-5  # eps is divided by sqrt(abar), 0.003 at t = 1
    torch.testing.assert_close(anchor_code(prediction, truth, y, process, t), z_0, atol=atol, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_predicted_codes_and_noise_add_up_to_z_t_where_channels_overlap(mode):
    """eps^ that the v prediction stands for is the noise that z_t holds beside predicted and given codes."""
    denoiser, batch = build(f"given.input={mode}", *OVERLAPPING)
    assert denoiser.process.layout["category"] == denoiser.process.layout["pixels"] == slice(0, 3)
    roles = {**mixed_roles(denoiser), "pixels": torch.full((ROWS,), GENERATED)}
    z_t, raw = noisy(denoiser, batch, roles), {}
    denoiser.heads["pixels"].register_forward_hook(lambda module, inputs, out: raw.update(v=out))
    predicted = predict(denoiser, batch, roles, z_t).codes
    codes = {
        name: torch.where((roles[name] == GIVEN)[:, None, None, None], code, predicted.get(name, code))
        for name, code in denoiser.encode(batch.data).items()
    }
    betas, schedule = denoiser.process.betas(times(), roles), denoiser.process.schedule
    rest = denoiser.process.place(codes, {**betas, "pixels": torch.zeros(ROWS)})
    y = (z_t - rest)[:, :3]
    signal, sigma = (
        over_cells(value, y) for value in (schedule.abar(times()).sqrt(), schedule.sigma(times()))
    )
    eps = denoiser.process.noise(z_t, codes, roles, times())[:, :3]
    torch.testing.assert_close(eps, sigma * y + signal * raw["v"], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(signal * predicted["pixels"] + sigma * eps, y, atol=1e-4, rtol=0)


def test_own_channels_follow_each_other_and_overlapping_codes_lie_in_their_hosts():
    config = tiny.config(
        "space.anchor=photo", "modalities.photo.type=image", "modalities.category.channels=palette"
    )
    layout = channel_layout(config, build_modalities(config))
    assert layout == {
        "photo": slice(0, 3),
        "pixels": slice(3, 6),
        "alpha": slice(6, 7),
        "palette": slice(7, 10),
        "category": slice(7, 9),
        "look": slice(10, 12),
        "masked": slice(3, 6),
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["modalities.palette.channels=alpha"],
            r"modalities\.palette\.channels: 'alpha' has 1 channels, palette needs 3",
        ),
        (
            ["modalities.pixels.channels=pixels"],
            r"modalities\.pixels\.channels: the anchor needs channels of its own",
        ),
        (["modalities.alpha.channels=masked"], r"modalities\.alpha\.channels: 'masked' has no own channels"),
        (["modalities.masked.source=alfa"], r"modalities\.masked\.source: unknown 'alfa'; known: pixels"),
        (["modalities.masked.source=masked"], r"modalities\.masked\.source: unknown 'masked'"),
        (["modalities.half.type=image"], r"modalities\.half: torch keeps this name"),
        (["space.anchor=alpha"], r"space\.anchor: alpha is of a type that cannot be the anchor"),
        (
            ["modalities.alpha.weights.family=constnt"],
            r"modalities\.alpha\.weights\.family: .*did you mean 'constant'",
        ),
        (["modalities.alpha.weights.scale=.inf"], r"modalities\.alpha\.weights: scale \(inf\)"),
    ],
)
def test_configurations_that_make_no_denoiser_are_refused_with_their_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_denoiser(tiny.config(*overrides))


def test_a_profile_that_leaves_the_prior_is_refused_with_the_number_and_only_where_it_is_generated():
    constant = ["modalities.look.weights.family=constant", "modalities.look.weights.scale=0.6"]
    with pytest.raises(ConfigError, match=r"modalities\.look\.weights: at t = 1 it leaves 0\.18 nats"):
        build_denoiser(tiny.config(*constant))  # 0.5 * 0.6^2
    build_denoiser(tiny.config(*constant, "schedule.prior_limit=0.2"))
    build_denoiser(tiny.config(*constant, "tasks.joint.roles.look=given"))
    with pytest.raises(ConfigError, match=r"schedule: at t = 1 it leaves .* nats"):
        build_denoiser(tiny.config("schedule.family=linear", "schedule.end=2"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [(), OVERLAPPING])
def test_gradient_reaches_every_parameter(mode, layout):
    denoiser, batch = build(f"given.input={mode}", "modalities.category.code=learned", *layout)
    roles = mixed_roles(denoiser)
    z_t = noisy(denoiser, batch, roles)
    predicted = denoiser(z_t, times(), roles, *(denoiser.encode(batch.data), denoiser.conditions(batch.data)))
    loss = sum((code - noise(denoiser)[:, :1]).square().mean() for code in predicted.codes.values())
    for name, modality in denoiser.modalities.items():
        if name in predicted.heads:
            loss = loss + modality.negative_log_likelihood(predicted.heads[name], batch.data[name]).mean()
    loss.backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name
    for name, table in denoiser.role_embedding.items():
        used = 2 if denoiser.modalities[name].only_given else 3
        assert (table.grad[:used] != 0).any(1).all()


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = build_denoiser(tiny.config("modalities.category.type=test_random_label"))
    state = torch.random.get_rng_state()
    second = build_denoiser(tiny.config("modalities.category.type=test_random_label"))
    assert torch.equal(torch.random.get_rng_state(), state)
    other = build_denoiser(tiny.config("modalities.category.type=test_random_label", "seed=1"))
    names = [name for name, _ in first.named_parameters()]
    assert "modalities.category.drawn" in names
    assert all(torch.equal(first.state_dict()[name], second.state_dict()[name]) for name in names)
    assert not any(
        torch.equal(first.state_dict()[name], other.state_dict()[name])
        for name in ("embed.0.weight", names[0])
    )


@pytest.mark.parametrize("backbone", ["tiny_test", "unet", "dit"])
def test_height_and_width_are_those_of_z_t_where_all_codes_have_cells(backbone: str):
    preset = {"tiny_test": "any", "unet": "nano", "dit": "nano"}[backbone]
    denoiser = build_denoiser(
        tiny.config(
            "modalities.category=null",
            "modalities.look=null",
            f"model={{backbone: {backbone}, preset: {preset}}}",
        )
    )
    roles = {name: torch.full((2,), GIVEN if name == "masked" else GENERATED) for name in denoiser.modalities}
    t = torch.full((2,), 0.5, dtype=torch.float64)
    for size in (tiny.SIZE, (16, 8)):
        given = {"masked": torch.zeros(2, 4, *size, dtype=torch.uint8)}
        z_t = torch.randn(2, denoiser.process.channels, *size)
        with torch.no_grad():
            predicted = denoiser(z_t, t, roles, denoiser.encode(given), denoiser.conditions(given))
        assert {code.shape[2:] for code in predicted.codes.values()} == {torch.Size(size)}


def test_codes_are_float32_and_exact_under_autocast():
    denoiser, batch = build(*OVERLAPPING)
    roles = mixed_roles(denoiser)
    z_t = noisy(denoiser, batch, roles)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = predict(denoiser, batch, roles, z_t)
    for name, code in predicted.codes.items():
        assert code.dtype == torch.float32
        assert torch.equal(code, denoiser.modalities[name].expected_code(predicted.heads[name]))
    plain = predict(denoiser, batch, roles, z_t)
    errors = [(predicted.codes[name] - code).abs().mean() for name, code in plain.codes.items()]
    assert 0 < max(errors) < 0.05  # the network itself did run in bfloat16


def test_modalities_that_others_are_made_from_come_first():
    plain = {**tiny.PLAIN, "modalities": dict(reversed(tiny.PLAIN["modalities"].items()))}
    order = list(build_modalities(tiny.config(plain=plain)))
    assert order.index("pixels") < order.index("masked") == len(order) - 1


def test_codes_and_conditions_of_a_batch_have_the_channels_of_their_modalities():
    denoiser, batch = build("given.input=u_plus_code")
    codes, conditions = (denoiser.encode(batch.data), denoiser.conditions(batch.data))
    modalities: dict[str, Any] = dict(denoiser.modalities.items())
    assert {name: code.shape[1] for name, code in codes.items()} == {
        name: modality.code_channels for name, modality in modalities.items()
    }
    assert {name: code.shape[1] for name, code in conditions.items()} == {
        name: modality.condition_channels for name, modality in modalities.items()
    }


@pytest.mark.parametrize("mode", MODES)
def test_separate_instances_see_all_channels_that_enter_the_network(mode):
    denoiser, batch = build(
        f"given.input={mode}", "model={backbone: dit_tokens, preset: nano, options: {patch: 1}}"
    )
    roles = mixed_roles(denoiser)
    predicted = predict(denoiser, batch, roles, noisy(denoiser, batch, roles))
    assert set(predicted.codes) == set(denoiser.heads)
    seen = {channel for channels in denoiser.backbone.groups.values() for channel in channels}
    assert seen == set(range(denoiser.input_channels))
