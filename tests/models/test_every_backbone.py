"""What every registered backbone must do, in its smallest preset."""

import pytest
import torch
from torch import Tensor, nn

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.base import Features

IN_CHANNELS = 5
SHIPPED = [
    name
    for name in registry.names("backbone")
    if registry.look_up("backbone", name).__module__.startswith("mmdiff_ray.")  # and not the tests' own
]
pytestmark = pytest.mark.parametrize("name", SHIPPED)


class Alone(nn.Module):
    """A backbone of separate modalities with one modality alone, which then is as any other."""

    def __init__(self, backbone: type[nn.Module], *rest: object, **options: object) -> None:
        super().__init__()
        self.backbone = backbone({"all": range(IN_CHANNELS)}, *rest, **options)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.backbone, name)

    def forward(self, *given: Tensor) -> Features:
        return self.backbone(*given)["all"]


def build(
    name: str, seed: int = 0, size: tuple[int, int] = (8, 8), preset: str = "nano", **options: object
) -> nn.Module:
    torch.manual_seed(seed)
    backbone = registry.look_up("backbone", name)
    if getattr(backbone, "separate", False):
        return Alone(backbone, size, preset, **options)
    return backbone(IN_CHANNELS, size, preset, **options)


def awake(backbone: nn.Module) -> nn.Module:
    """Return the backbone as if it had been trained: nothing in it is zero any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return backbone


def inputs(
    backbone: nn.Module, batch: int = 4, size: tuple[int, int] = (8, 8), seed: int = 2
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, IN_CHANNELS, *size, generator=generator)
    return x, torch.randn(batch, backbone.embedding_channels, generator=generator)


def close(first: Features, second: Features, tolerance: float) -> bool:
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 24), (32, 16)])
def test_features_have_the_announced_sizes_at_any_height_and_width(name, size):
    backbone = build(name)
    features = backbone(*inputs(backbone, 2, size))
    assert features.map.shape == (2, backbone.feature_channels, *size)
    assert features.pooled.shape == (2, backbone.pooled_channels)


def test_a_sample_does_not_see_the_other_samples_of_its_batch(name):
    backbone = awake(build(name))
    x, embedding = inputs(backbone)
    others_x, others_embedding = inputs(backbone, seed=3)
    whole = backbone(x, embedding)
    alone = backbone(x[:1], embedding[:1])
    among_others = backbone(
        torch.cat([x[:1], others_x[1:]]), torch.cat([embedding[:1], others_embedding[1:]])
    )
    assert close(Features(*(part[:1] for part in whole)), alone, 1e-5)
    assert close(Features(*(part[:1] for part in among_others)), alone, 1e-5)


def test_training_and_evaluation_mode_give_the_same_features(name):
    backbone = awake(build(name))
    given = inputs(backbone)
    assert close(backbone.train()(*given), backbone.eval()(*given), 0)


def test_every_parameter_learns_from_its_start(name):
    backbone = build(name, token_channels=6)
    x, embedding = inputs(backbone)
    tokens = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(4))
    before = {key: weight.detach().clone() for key, weight in backbone.named_parameters()}
    optimizer = torch.optim.Adam(backbone.parameters(), lr=1e-3)
    for _ in range(4):
        features = backbone(x, embedding, tokens)
        (features.map.square().mean() + features.pooled.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    still = [key for key, weight in backbone.named_parameters() if torch.equal(weight, before[key])]
    assert still == []


def test_the_embedding_changes_nothing_at_first_and_something_later(name):
    backbone = build(name)
    x, embedding = inputs(backbone)
    assert close(backbone(x, embedding), backbone(x, -embedding), 0)
    backbone = awake(backbone)
    assert not close(backbone(x, embedding), backbone(x, -embedding), 1e-2)


def test_a_trivial_regression_is_learned_in_a_few_steps(name):
    backbone = build(name)
    x, embedding = inputs(backbone)
    target = x[:, :1].roll(1, dims=3) * embedding[:, :1, None, None].sign()
    optimizer = torch.optim.Adam(backbone.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        features = backbone(x, embedding)
        loss = (features.map[:, :1] - target).square().mean() + (features.pooled[:, 0] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_bfloat16_autocast_stays_finite_and_near_float32(name):
    backbone = awake(build(name))
    given = inputs(backbone)
    exact = backbone(*given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = backbone(*given)
        sum(part.float().square().mean() for part in rough).backward()
    assert all(torch.isfinite(weight.grad).all() for weight in backbone.parameters())
    for part, true in zip(rough, exact, strict=True):
        assert (part.float() - true).square().mean() < 1e-3 * true.square().mean()


def test_channels_last_input_gives_the_same_features_with_contiguous_weights(name):
    backbone = awake(build(name))
    x, embedding = inputs(backbone)
    assert close(
        backbone(x.contiguous(memory_format=torch.channels_last), embedding), backbone(x, embedding), 1e-5
    )
    assert all(weight.is_contiguous() for weight in backbone.parameters())


def test_it_is_traced_as_one_graph(name):
    backbone = awake(build(name))
    given = inputs(backbone)
    traced = torch.compile(backbone, backend="eager", fullgraph=True)
    assert close(traced(*given), backbone(*given), 1e-5)


def test_the_same_seed_gives_the_same_weights(name):
    weights = [
        torch.cat([weight.flatten() for weight in build(name, seed).parameters()]) for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_tokens_reach_the_features_only_where_they_are_asked_for(name):
    backbone = awake(build(name, token_channels=6))
    tokens = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(4))
    given = inputs(backbone)
    assert not close(backbone(*given, tokens), backbone(*given, -tokens), 1e-3)
    with pytest.raises(ValueError, match="token_channels is 6"):
        backbone(*given)
    with pytest.raises(ValueError, match="tokens have 6 channels"):
        build(name)(*given, tokens)


def test_a_size_off_the_stride_is_refused_when_built_and_when_called(name):
    with pytest.raises(ConfigError, match=r"9 x 8\) must be multiples"):
        build(name, size=(9, 8))
    backbone = build(name)
    with pytest.raises(ValueError, match=r"8 x 9\) must be multiples"):
        backbone(*inputs(backbone, size=(8, 9)))


def test_unknown_presets_and_options_are_named_beside_the_known(name):
    with pytest.raises(ConfigError, match=r"model.preset: unknown 'nanno'; known: nano"):
        build(name, preset="nanno")
    with pytest.raises(ConfigError, match=r"model.options.widht.*width"):
        build(name, widht=3)
    with pytest.raises(ConfigError, match=r"model.options.width"):
        build(name, width="wide")


def test_options_replace_single_sizes_of_the_preset(name):
    assert build(name, embedding_channels=24).embedding_channels == 24
