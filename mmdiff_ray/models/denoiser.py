"""The denoiser: modality encoders, the shared backbone, and one decoder head per modality."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.diffusion.process import GENERATED, GIVEN, Codes, Prediction, Process, Roles, over_cells
from mmdiff_ray.diffusion.schedule import make_schedule
from mmdiff_ray.diffusion.weights import make_profile
from mmdiff_ray.modalities.base import Modality
from mmdiff_ray.models.context import context_of, context_shapes, total_shape
from mmdiff_ray.models.input_path import InputPath
from mmdiff_ray.registry import look_up


class Denoiser(nn.Module):
    """Predict every modality from the noisy code z_t.

    The anchor's head predicts v, eps or x0 of what is left of z_t when the other signals are taken away; it
    is turned into E[z_0 | z_t]. `given_input`, `exact` and `zero_unused` say how given codes reach the
    network (`GivenConfig`). Height and width are those of z_t, but codes that are the same in every cell
    (labels, embeddings) have the configured ones.
    """

    # Module dictionaries of Modality, heads and tensors; torch's types do not say of what.
    modalities: Any
    heads: Any
    role_embedding: Any

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        process: Process,
        backbone: Any,
        given_input: str,
        prediction: str,
        exact: bool = True,
        zero_unused: bool = False,
    ) -> None:
        super().__init__()
        self.modalities = nn.ModuleDict(dict(modalities))
        self.process = process
        self.backbone = backbone
        self.path = InputPath.of(given_input, modalities, process, exact, zero_unused)
        self.prediction = prediction
        self.contexts = {} if given_input == "z_only" else context_shapes(modalities)
        width = backbone.embedding_channels
        heads = {
            name: modality.make_head(backbone.feature_channels, backbone.pooled_channels)
            for name, modality in modalities.items()
            if not modality.only_given
        }
        self.heads = nn.ModuleDict(heads)
        roles = {name: torch.randn(3, width) * 0.5 for name in modalities}
        self.role_embedding = nn.ParameterDict(roles)
        self.width = width
        self.embed = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    @property
    def anchor(self) -> str:
        """Return the instance whose code is z_0."""
        return self.process.anchor

    @property
    def size(self) -> tuple[int, int]:
        """Return the configured height and width in cells."""
        return next(iter(self.modalities.values())).size

    @property
    def input_channels(self) -> int:
        """Return how many channels the network sees: those of z_t, and of the conditions behind it."""
        return self.path.width

    def encode(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the codes of the modalities in data, instance -> (B, c, H, W) float32."""
        return {name: self.modalities[name].encode(value) for name, value in data.items()}

    def conditions(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what given data tells the network beside its code, instance -> (B, k, H, W) of its input
        (`InputPath`), or (B, N, D), the tokens that it attends to."""
        found = {
            name: self.modalities[name].tokens(value)
            if name in self.contexts
            else self.path.condition(name, value, self.modalities)
            for name, value in data.items()
        }
        return {name: condition for name, condition in found.items() if condition is not None}

    def known_cells(self, data: Mapping[str, Tensor], roles: Roles) -> Tensor | None:
        """Return the cells of a generated anchor that given masked images show exactly, bool (B, H, W), or
        None where the input path knows none."""
        known: Tensor | None = None
        for name in sorted(self.path.exact & data.keys()):
            seen = self.modalities[name].visible(data[name]) & (roles[name] == GIVEN)[:, None, None]
            known = seen if known is None else known | seen
        return None if known is None else known & (roles[self.anchor] == GENERATED)[:, None, None]

    def void_cells(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the cells whose data are unknown, instance -> bool (B, H, W), of instances that have any."""
        found = {name: self.modalities[name].void(value) for name, value in data.items()}
        return {name: cells for name, cells in found.items() if cells is not None}

    def with_known(
        self, prediction: Prediction, roles: Roles, conditions: Mapping[str, Tensor]
    ) -> Prediction:
        """Return a prediction with the anchor's known cells in place of predicted ones."""
        known = self.path.known(roles, conditions)
        if known is None:
            return prediction
        code = torch.where(known[0], known[1], prediction.codes[self.anchor])
        return Prediction({**prediction.codes, self.anchor: code}, {**prediction.heads, self.anchor: code})

    def forward(
        self, z_t: Tensor, t: Tensor, roles: Roles, codes: Codes, conditions: Mapping[str, Tensor]
    ) -> Prediction:
        """Return the prediction at times t, in float32 under autocast too.

        z_t: (B, C, H, W) float32; t: (B,) in (0, 1], float64; roles: instance -> (B,); codes, conditions: of
        given instances at least (the others' are never looked at).
        """
        known = {name: self.process.kappas[name] * (roles[name] == GIVEN) for name in codes}
        u_t = z_t - self.process.place(codes, known) if codes else z_t
        x = self.path.network_input(z_t, u_t, roles, codes, conditions)  # (B, C + conditions, H, W)
        if z_t.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)  # which sums and concatenations lose
        tokens = (context_of(conditions, roles, self.contexts),) if self.contexts else ()
        features = self.backbone(x, self._embedding(t, roles), *tokens)
        own = features if isinstance(features, Mapping) else dict.fromkeys(self.heads, features)
        heads = {name: head(own[name]).float() for name, head in self.heads.items()}
        with torch.autocast(z_t.device.type, enabled=False):
            predicted = {
                name: self.modalities[name].expected_code(value)
                for name, value in heads.items()
                if name != self.anchor
            }
            heads[self.anchor] = self._anchor_code(heads[self.anchor], u_t, t, predicted, roles)
        prediction = Prediction({**predicted, self.anchor: heads[self.anchor]}, heads)
        return self.with_known(prediction, roles, conditions)

    def _embedding(self, t: Tensor, roles: Roles) -> Tensor:
        """Return the embedding of time and roles, (B, E)."""
        width = self.width
        frequencies = torch.exp(
            torch.arange(width // 2, device=t.device) * (-math.log(10_000) / (width // 2))
        )
        angles = (1000 * t).float()[:, None] * frequencies
        role = torch.stack([table[roles[name]] for name, table in self.role_embedding.items()]).sum(0)
        return self.embed(torch.cat([angles.sin(), angles.cos(), role], dim=1))

    def _anchor_code(self, raw: Tensor, u_t: Tensor, t: Tensor, others: Codes, roles: Roles) -> Tensor:
        """Return E[z_0 | z_t] from the anchor head's v, eps or x0."""
        where = self.process.layout[self.anchor]
        sharing = [
            name
            for name in others
            if self.process.layout[name].start < where.stop and self.process.layout[name].stop > where.start
        ]
        y = u_t
        if sharing:
            weights = self.process.generated_betas(t, {name: roles[name] for name in sharing})
            y = u_t - self.process.place({name: others[name] for name in sharing}, weights)
        return anchor_code(self.prediction, raw, y[:, where], self.process, t)


def anchor_code(prediction: str, raw: Tensor, y: Tensor, process: Process, t: Tensor) -> Tensor:
    """Return z_0 of y = sqrt(abar) z_0 + sigma eps from a prediction of v, eps or x0 (z_0 itself).

    v = sqrt(abar) eps - sigma z_0. Source: Salimans and Ho, 2022, for v.
    """
    signal, sigma = over_cells(process.schedule.abar(t).sqrt(), y), over_cells(process.schedule.sigma(t), y)
    if prediction == "v":
        return signal * y - sigma * raw
    if prediction == "eps":
        return (y - sigma * raw) / signal.clamp_min(1e-3)
    return raw


def build_modalities(config: Config) -> dict[str, Modality]:
    """Return the configured modality instances, those that others are made from first.

    Raises ConfigError for options that contradict each other.
    """
    size = (config.space.height, config.space.width)
    made: dict[str, Modality] = {}
    for name, options in config.modalities.items():
        if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
            raise ConfigError(f"modalities.{name}: torch keeps this name for itself; choose another")
        made[name] = look_up("modality", options.type)(name, options, size)
    for name, modality in made.items():
        source = modality.made_from
        if source is not None and (source not in made or made[source].made_from is not None):
            known = ", ".join(other for other in made if made[other].made_from is None)
            raise ConfigError(f"modalities.{name}.source: unknown {source!r}; known: {known}")
    return dict(sorted(made.items(), key=lambda item: item[1].made_from is not None))


def channel_layout(config: Config, modalities: Mapping[str, Modality]) -> dict[str, slice]:
    """Return which channels of the diffusion space every instance's code takes.

    Own channels follow each other, the anchor's first; an overlapping code lies in the first channels of its
    host. Raises ConfigError where it does not fit in there.
    """
    anchor = config.space.anchor
    if config.modalities[anchor].channels != "own":
        raise ConfigError(
            f"modalities.{anchor}.channels: the anchor needs channels of its own; leave the key out"
        )
    order = sorted(modalities, key=lambda name: name != anchor)
    own = [name for name in order if config.modalities[name].channels == "own"]
    stops = torch.tensor([modalities[name].code_channels for name in own]).cumsum(0).tolist()
    layout = {
        name: slice(stop - modalities[name].code_channels, stop)
        for name, stop in zip(own, stops, strict=True)
    }
    for name in modalities:
        if name in layout:
            continue
        host, channels = config.modalities[name].channels, modalities[name].code_channels
        if host not in own or channels > modalities[host].code_channels:
            has = modalities[host].code_channels if host in own else "no own"
            raise ConfigError(
                f"modalities.{name}.channels: {host!r} has {has} channels, {name} needs {channels}"
            )
        layout[name] = slice(layout[host].start, layout[host].start + channels)
    return {name: layout[name] for name in modalities}


def build_process(config: Config, modalities: Mapping[str, Modality]) -> Process:
    """Return the forward process of a configuration.

    Raises ConfigError for a generated modality's profile that leaves the prior, with the number.
    """
    if not hasattr(modalities[config.space.anchor], "code_negative_log_likelihood"):
        raise ConfigError(
            f"space.anchor: {config.space.anchor} is of a type that cannot be the anchor; use an image or "
            "latents"
        )
    layout = channel_layout(config, modalities)
    schedule = make_schedule(config.schedule, len(modalities))
    weights = {name: modality.weights for name, modality in modalities.items()}
    process = Process(
        schedule=schedule,
        profiles={name: make_profile(name, weights[name], schedule) for name in modalities},
        kappas={name: weights[name].kappa for name in modalities},
        layout=layout,
        anchor=config.space.anchor,
        channels=max(where.stop for where in layout.values()),
    )
    for name, modality in modalities.items():
        if not modality.only_given and is_generated(config, name):
            _check_prior(config, process, name)
    return process


def is_generated(config: Config, name: str) -> bool:
    return any(task.can_be(name, "generated") for task in config.tasks.values())


def _check_prior(config: Config, process: Process, name: str) -> None:
    nats = process.prior_nats(name)
    if not nats <= config.schedule.prior_limit:
        key = f"modalities.{name}.weights" if name != process.anchor else "schedule"
        raise ConfigError(
            f"{key}: at t = 1 it leaves {nats:.3g} nats per dimension between the noisy code and the prior "
            f"N(0, I) (schedule.prior_limit {config.schedule.prior_limit:g}): samples could not start from "
            "noise. Choose a profile that decays to 0, or a schedule that ends in more noise"
        )


def inert_settings(config: Config) -> list[str]:
    """Return what in a configuration changes nothing, one sentence each, beginning with the key."""
    found = []
    for name, options in config.modalities.items():
        weights, default = options.weights, type(options.weights)()
        if config.given.input in ("u_plus_code", "in_place") and weights.kappa != default.kappa:
            found.append(
                f"modalities.{name}.weights.kappa changes nothing under given.input {config.given.input}: "
                "the given code is taken out of z_t again"
            )
        if dataclasses.replace(weights, kappa=default.kappa) == default:
            continue
        if name == config.space.anchor:
            found.append(
                f"modalities.{name}.weights: the anchor's profile is sqrt(abar), the schedule's; only kappa "
                "is used"
            )
        elif not is_generated(config, name):
            found.append(f"modalities.{name}.weights: no task generates {name}; only kappa is used")
    return found


def build_denoiser(config: Config) -> Denoiser:
    """Return the denoiser of a configuration, its weights drawn from the configuration's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        modalities = build_modalities(config)
        process = build_process(config, modalities)
        given = config.given
        path = InputPath.of(given.input, modalities, process, given.exact, given.zero_unused)
        backbone = look_up("backbone", config.model.backbone)
        options = {key: value for key, value in config.model.options.items() if value is not None}
        if given.input != "z_only" and (contexts := context_shapes(modalities)):
            options["token_channels"] = total_shape(contexts)[1]
        made = backbone(
            path.groups() if getattr(backbone, "separate", False) else path.width,
            size=(config.space.height, config.space.width),
            preset=config.model.preset,
            **options,
        )
        return Denoiser(
            modalities, process, made, given.input, config.loss.prediction, given.exact, given.zero_unused
        )
