"""The space of a sweep: its dimensions and corners, and which of them have no effect or break the prior."""

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.config.checks import unknown
from mmdiff_ray.diffusion.objective import Objective
from mmdiff_ray.models.denoiser import build_denoiser, build_modalities, build_process, is_generated

KINDS = ("uniform", "loguniform", "randint", "choice", "grid")
Make = Callable[[Mapping[str, Any]], Config]
"""Values of swept keys -> the checked configuration of a trial."""
MOST_CORNERS = 128
INSIDE = 32
"""Random points that are checked besides the corners."""


@dataclass(frozen=True)
class Dimension:
    """One swept key.

    kind: uniform, loguniform (both from low to high), randint (low to high, both included), choice or grid
    (of values). when: key -> values of another choice, for which alone this one exists.
    """

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    values: list[Any] = field(default_factory=list)
    when: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def ends(self) -> list[Any]:
        """Return the values at the corners: both ends, or all of a list."""
        if self.values:
            return list(self.values)
        return [int(self.low), int(self.high)] if self.kind == "randint" else [self.low, self.high]

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Return whether this dimension exists beside the values of those before it."""
        return all(values.get(key) in allowed for key, allowed in self.when.items())

    def draw(self, rng: random.Random) -> Any:
        """Return a random value."""
        if self.values:
            return rng.choice(self.values)
        if self.kind == "randint":
            return rng.randint(int(self.low), int(self.high))
        if self.kind == "loguniform":
            return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return rng.uniform(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.kind} {self.values or f'{self.low:g} to {self.high:g}'}"

    def clip(self, value: float) -> Any:
        """Return a number moved into the dimension's range."""
        held = min(max(value, self.low), self.high)
        return round(held) if self.kind == "randint" else held


def make_space(plain: Mapping[str, Any]) -> dict[str, Dimension]:
    """Return the dimensions of a YAML section, in its order. Raises ConfigError naming the key."""
    space: dict[str, Dimension] = {}
    for key, entry in plain.items():
        space[key] = _dimension(key, entry)
        for other, allowed in space[key].when.items():
            if other not in space or not space[other].values:
                raise ConfigError(f"space.{key}.when: {other} must be a choice that stands before it")
            for value in allowed:
                if value not in space[other].values:
                    raise ConfigError(unknown(f"space.{key}.when.{other}", value, space[other].values))
    return space


def _dimension(key: str, entry: Any) -> Dimension:
    kinds = [name for name in entry if name != "when"] if isinstance(entry, Mapping) else []
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise ConfigError(
            f"space.{key}: got {entry!r}, want one of {', '.join(KINDS)}, as {{uniform: [0, 1]}}"
        )
    kind, value = kinds[0], entry[kinds[0]]
    conditions = entry.get("when") or {}
    if not isinstance(conditions, Mapping):
        raise ConfigError(f"space.{key}.when: got {conditions!r}, want a section of names and values")
    when = {
        other: list(allowed) if isinstance(allowed, list) else [allowed]
        for other, allowed in conditions.items()
    }
    if not isinstance(value, list):
        raise ConfigError(f"space.{key}.{kind}: got {value!r}, want a list")
    if kind in ("choice", "grid"):
        if not value:
            raise ConfigError(f"space.{key}.{kind}: the list is empty")
        return Dimension(key, kind, values=value, when=when)
    if len(value) != 2 or not all(map(_is_finite, value)) or not value[0] < value[1]:
        raise ConfigError(f"space.{key}.{kind}: got {value!r}, want [low, high] with low below high")
    if kind == "randint" and any(end % 1 for end in value):
        raise ConfigError(f"space.{key}.randint: got {value!r}, want whole numbers")
    if kind == "loguniform" and value[0] <= 0:
        raise ConfigError(f"space.{key}.loguniform: low ({value[0]:g}) must be above 0")
    return Dimension(key, kind, low=value[0], high=value[1], when=when)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def corners(space: Mapping[str, Dimension], most: int = MOST_CORNERS) -> list[dict[str, Any]]:
    """Return the space's corners; where there are more than `most`, a random choice of them."""
    rng = random.Random(0)
    found: list[dict[str, Any]] = [{}]
    for dimension in space.values():
        found = [point for values in found for point in _extended(values, dimension, dimension.ends)]
        found = found if len(found) <= 8 * most else rng.sample(found, 8 * most)
    return found if len(found) <= most else rng.sample(found, most)


def combinations(space: Mapping[str, Dimension]) -> list[dict[str, Any]]:
    """Return every combination of the values of a space of lists, in order."""
    return corners(space, sys.maxsize)


def _extended(values: dict[str, Any], dimension: Dimension, choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a point once per choice of one more dimension; once as it is if the dimension does not apply."""
    return [{**values, dimension.key: one} for one in choices] if dimension.applies(values) else [values]


def drawn(space: Mapping[str, Dimension], rng: random.Random) -> dict[str, Any]:
    """Return a random point of the space."""
    values: dict[str, Any] = {}
    for dimension in space.values():
        (values,) = _extended(values, dimension, [dimension.draw(rng)])
    return values


@dataclass(frozen=True)
class SpaceCheck:
    """The result of checking a space.

    tried: number of points; refused: error -> number of points; good: a valid point; inert: messages about
    dimensions that change nothing at any point.
    """

    tried: int
    refused: dict[str, int]
    good: dict[str, Any] | None
    inert: list[str]


def check_space(space: Mapping[str, Dimension], make: Make) -> SpaceCheck:
    """Check the corners of a space and random points inside.

    make: values -> the configuration. Raises ConfigError with the most frequent error if no point is valid.
    """
    refused: dict[str, int] = {}
    good: list[dict[str, Any]] = []
    network = sizes_network(space)
    rng = random.Random(0)
    points = [*corners(space), *(drawn(space, rng) for _ in range(INSIDE))]
    for values in points:
        try:
            check_point(make(values), network)
            good.append(values)
        except ConfigError as error:
            refused[str(error)] = refused.get(str(error), 0) + 1
    if not good:
        why = max(refused, key=lambda error: refused[error])
        raise ConfigError(f"space: every one of {len(points)} points is refused; most often: {why}")
    return SpaceCheck(len(points), refused, good[0], inert(space, make, good))


def sizes_network(space: Mapping[str, Dimension]) -> bool:
    """Return whether a space holds keys that the network's size depends on."""
    return any(key.startswith(("model.", "space.")) for key in space)


def check_point(config: Config, network: bool = False) -> None:
    """Raise ConfigError for a configuration whose modalities contradict each other, whose profile leaves the
    prior or, if asked, whose network cannot be built."""
    if network:
        build_denoiser(config)
    else:
        build_process(config, build_modalities(config))


def inert(space: Mapping[str, Dimension], make: Make, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for every dimension that changes nothing, beginning with its key."""
    found = []
    for key, dimension in space.items():
        if not key.startswith(("loss.", "modalities.")):
            continue
        where = [values for values in points if key in values][:12]
        if where and not any(_changes(dimension, values, make) for values in where):
            found.append(f"space.{key}: no value of it changes anything in this configuration")
    return found


def _changes(dimension: Dimension, values: Mapping[str, Any], make: Make) -> bool:
    """Return whether two values of a dimension give different training, or one is refused."""
    seen = set()
    for end in dimension.ends:
        try:
            seen.add(effect(make({**values, dimension.key: end})))
        except ConfigError as error:
            seen.add(str(error))
        if len(seen) > 1:
            return True
    return False


def effect(config: Config) -> str:
    """Return what training depends on, as text: two configurations of the same text train the same model.

    Of weights: b(t) where some task generates the modality, kappa where it is given and heard. Of the loss:
    the factor of every term that has a gradient. Of all else: what the configuration says.
    """
    modalities = build_modalities(config)
    process = build_process(config, modalities)
    t = torch.linspace(0.01, 1, 12, dtype=torch.float64)
    parts: list[Any] = []
    for name, options in config.modalities.items():
        plain = {key: value for key, value in vars(options).items() if key != "weights"}
        generated = not modalities[name].only_given and is_generated(config, name)
        curve = process.profiles[name](t).tolist() if generated and name != process.anchor else None
        heard = config.given.input in ("z_only", "z_plus_code") and options.weights.kappa
        parts.append((name, plain, curve and [round(value, 9) for value in curve], heard))
    objective = Objective(process, config.loss, modalities)
    weights = config.loss.coefficients
    for name in objective.decoded:
        if is_generated(config, name):
            parts.append((name, weights.l2 * config.loss.modalities.get(name, 1.0)))
    for name in objective.owners:
        if is_generated(config, name):
            parts.append((name, weights.l1 * config.loss.channels.get(name, 1.0)))
    gamma = config.loss.gamma if config.loss.weighting == "min_snr" else None
    cap = config.loss.channel_cap if len(objective.owners) > 1 else None
    loss = [config.loss.prediction, config.loss.weighting, gamma, cap]
    parts.append((weights.l3, loss, config.schedule, config.given, config.tasks, config.train))
    return repr(parts)
