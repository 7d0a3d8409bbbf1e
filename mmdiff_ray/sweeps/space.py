"""The search space of a sweep: its dimensions and corners, and checks for invalid or ineffective values."""

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
"""Number of random points to check in addition to the corners."""


@dataclass(frozen=True)
class Dimension:
    """One swept key.

    kind: `uniform` or `loguniform` from low to high, `randint` from low to high inclusive, `choice` or `grid`
    of values. when: key of an earlier choice -> the values for which this dimension applies.
    """

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    values: list[Any] = field(default_factory=list)
    when: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def ends(self) -> list[Any]:
        """Return the values at the corners: low and high, or all values of a list."""
        if self.values:
            return list(self.values)
        return [int(self.low), int(self.high)] if self.kind == "randint" else [self.low, self.high]

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Return whether this dimension applies, given the values of earlier dimensions."""
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
        """Clamp a number to the dimension's range."""
        held = min(max(value, self.low), self.high)
        return round(held) if self.kind == "randint" else held


def make_space(plain: Mapping[str, Any]) -> dict[str, Dimension]:
    """Return the dimensions of a YAML section, in its order. Raises ConfigError naming the key."""
    space: dict[str, Dimension] = {}
    for key, entry in plain.items():
        space[key] = _dimension(key, entry)
        for other, allowed in space[key].when.items():
            if other not in space or not space[other].values:
                raise ConfigError(f"space.{key}.when: {other} must be a choice listed before it")
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
    """Return the corners of the space, or a random selection if there are more than `most`."""
    rng = random.Random(0)
    found: list[dict[str, Any]] = [{}]
    for dimension in space.values():
        found = [point for values in found for point in _extended(values, dimension, dimension.ends)]
        found = found if len(found) <= 8 * most else rng.sample(found, 8 * most)
    return found if len(found) <= most else rng.sample(found, most)


def combinations(space: Mapping[str, Dimension]) -> list[dict[str, Any]]:
    """Return the Cartesian product of the values, in order; every dimension must have a list."""
    return corners(space, sys.maxsize)


def _extended(values: dict[str, Any], dimension: Dimension, choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Extend a point by each value of one more dimension; return it unchanged if that does not apply."""
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
    dimensions without any effect.
    """

    tried: int
    refused: dict[str, int]
    good: dict[str, Any] | None
    inert: list[str]


def check_space(space: Mapping[str, Dimension], make: Make) -> SpaceCheck:
    """Check the corners of a space and random points inside it.

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
        raise ConfigError(f"space: all {len(points)} tested points are invalid; most frequent error: {why}")
    return SpaceCheck(len(points), refused, good[0], inert(space, make, good))


def sizes_network(space: Mapping[str, Dimension]) -> bool:
    """Return whether a swept key changes the size of the network."""
    return any(key.startswith(("model.", "space.")) for key in space)


def check_point(config: Config, network: bool = False) -> None:
    """Raise ConfigError if modalities contradict each other or a profile breaks the prior.

    network: also build the network.
    """
    if network:
        build_denoiser(config)
    else:
        build_process(config, build_modalities(config))


def inert(space: Mapping[str, Dimension], make: Make, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a message for every dimension without any effect."""
    found = []
    for key, dimension in space.items():
        if not key.startswith(("loss.", "modalities.")):
            continue
        where = [values for values in points if key in values][:12]
        if where and not any(_changes(dimension, values, make) for values in where):
            found.append(f"space.{key}: has no effect in this configuration")
    return found


def _changes(dimension: Dimension, values: Mapping[str, Any], make: Make) -> bool:
    """Return whether two values of a dimension train different models, or one is invalid."""
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
    """Return a text that is equal for two configurations that train the same model.

    It has b(t) of modalities that a task generates, kappa of modalities that are given and enter the process,
    the factor of every loss term with a gradient, and all other settings unchanged.
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
