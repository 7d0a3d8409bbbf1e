"""What every modality type provides: reading, encoder, decoder head, likelihood, metrics and a picture."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError, ModalityConfig, WeightsConfig


class Features(NamedTuple):
    """What a backbone returns. map: (B, F, H, W), a vector per cell; pooled: (B, P), a vector per sample."""

    map: Tensor
    pooled: Tensor


class Mean(NamedTuple):
    """A mean in two parts that add up over batches and workers: sum and count, scalars."""

    sum: float
    count: float  # type: ignore[assignment]  # tuple.count is not used


@dataclass(frozen=True)
class RowContext:
    """What a row is read under. Every draw depends on (seed, purpose, visit, row id) alone.

    size: (height, width) in cells of the diffusion space; visit: how often the data set was gone through
    before; backgrounds: "random" or "white"; flip: whether rows may be mirrored.
    """

    size: tuple[int, int]
    seed: int
    visit: int
    row_id: int
    backgrounds: str = "random"
    flip: bool = True

    def generator(self, purpose: str) -> np.random.Generator:
        """Return the row's own random generator for one purpose."""
        key = [self.seed, self.visit, self.row_id & (2**63 - 1), zlib.crc32(purpose.encode())]
        return np.random.default_rng(key)

    @cached_property
    def mirrored(self) -> bool:
        """Return whether this visit sees the row mirrored, the same for all of its modalities."""
        return self.flip and bool(self.generator("mirror").random() < 0.5)


class Modality(nn.Module):
    """One modality instance: a named kind of data with its encoder and its decoder head.

    Shapes: data (B, *data_shape) in the type's own format; code (B, code_channels, H, W), unit RMS per
    channel; condition (B, condition_channels, H, W), what the network sees of a given instance; prediction:
    the head's output, whose shape is the type's own. `size` is (H, W).
    """

    Options: ClassVar[type] = ModalityConfig
    likelihood: str = ""
    only_given: ClassVar[bool] = False
    """True for a type that is made from another instance and so can never be generated."""
    shows_source: ClassVar[bool] = False
    """True for a type whose data hold cells of the instance that it is made from (`visible`)."""

    visible_share: float = 0.0
    """The share of the source's cells that the data of such a type show, in the mean over rows."""

    context_shape: tuple[int, int] | None = None
    """The number and the channels of the tokens that the network attends to where the instance is given."""

    code_channels: int
    prediction_channels: int

    def __init__(self, name: str, options: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.name = name
        self.options = options
        self.size = size

    # --- the data side: numpy, one row at a time, in data workers -------------------------------------

    @classmethod
    def resolve(cls, name: str, options: Any, columns: Mapping[str, Mapping[str, Any]]) -> Any:
        """Return the options with what only the data set knows filled in (classes, dimensions, names).

        columns: column -> what the manifest says of it. Raises ConfigError for a missing or unfit column.
        """
        return options

    @property
    def column(self) -> str:
        """Return the Parquet column that holds the data."""
        return getattr(self.options, "column", None) or self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the Parquet columns that `read` needs."""
        return (self.column,)

    @property
    def made_from(self) -> str | None:
        """Return the instance that `read` makes this one from, or None."""
        return None

    def entry(self) -> dict[str, Any]:
        """Return what a manifest says of a column that holds this modality's data, as `stored` gives it."""
        raise TypeError(f"{self.name} has no column of its own")

    def stored(self, data: Tensor) -> Any:
        """Return one row's data, (*data_shape), as a column of a data set holds it."""
        raise TypeError(f"{self.name} has no column of its own")

    def visible(self, data: Tensor) -> Tensor | None:
        """Return which cells of the instance it is made from the data show unchanged, bool (B, H, W), or
        None for a type that shows none. What they show are the first channels of the data."""
        return None

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Return the shape of one row's data."""
        raise NotImplementedError

    @property
    def data_type(self) -> type:
        """Return the numpy type of the data."""
        raise NotImplementedError

    def read(self, row: Mapping[str, Any], context: RowContext, done: Mapping[str, Any]) -> np.ndarray | None:
        """Return one row's data, or None where the row lacks it. done: instance -> data already read.

        A type overrides `decode` and `augment`, or this where the data come from other instances.
        """
        decoded = self.decode(row)
        return None if decoded is None else self.augment(decoded, context)

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        """Return what a row holds before any random choice, or None where it lacks it.

        Readers keep it in memory (`data.cache_mb`); nothing may change it.
        """
        raise NotImplementedError

    def augment(self, decoded: np.ndarray, context: RowContext) -> np.ndarray:
        """Return one row's data from what was decoded."""
        return decoded

    # --- the code side --------------------------------------------------------------------------------

    @property
    def condition_channels(self) -> int:
        """Return how many channels `condition` has."""
        return self.code_channels

    def calibrate(self, data: Tensor) -> None:
        """Fix the code's scale from a sample of the data so that it has unit RMS per channel."""

    def encode(self, data: Tensor) -> Tensor:
        """Return the code (B, code_channels, H, W) of data."""
        raise NotImplementedError

    def condition(self, data: Tensor) -> Tensor:
        """Return what the network sees of given data, (B, condition_channels, H, W): the code."""
        return self.encode(data)

    def tokens(self, data: Tensor) -> Tensor:
        """Return what the network attends to where the data are given, (B, *context_shape)."""
        raise NotImplementedError

    def from_code(self, code: Tensor) -> Tensor:
        """Return the data nearest to a code."""
        raise NotImplementedError

    @property
    def usual_scale(self) -> float:
        """Return the profile's scale where the configuration has none: how loud the code is in the noise.

        n elements that say one thing can be read together from noise that hides each alone, and where a code
        can be read there is nothing to learn about what it goes with. A type whose code does that has a scale
        of about 1 / sqrt(n), which says the thing as loudly as an image says a pixel.
        """
        return 1.0

    @property
    def scale_of_one_thing(self) -> float:
        """Return the usual scale of a type whose whole code says one thing."""
        return 1 / math.sqrt(self.code_channels * math.prod(self.size))

    @property
    def scale_of_regions(self) -> float:
        """Return the usual scale of a type of which a region, about a sixteenth of the cells, says one
        thing."""
        return 4 / math.sqrt(math.prod(self.size))

    @property
    def weights(self) -> WeightsConfig:
        """Return the configured weights, with a scale: 1 where knots or step weights state the profile."""
        weights = self.options.weights
        if weights.scale is None:
            stated = weights.knots is not None or weights.w is not None
            weights = dataclasses.replace(weights, scale=1.0 if stated else self.usual_scale)
        return weights

    # --- the head side --------------------------------------------------------------------------------

    def make_head(self, feature_channels: int, pooled_channels: int) -> nn.Module:
        """Return the decoder head: a module from Features to the prediction."""
        raise NotImplementedError

    def expected_code(self, prediction: Tensor) -> Tensor:
        """Return E[code | z_t] under the prediction, (B, code_channels, H, W)."""
        raise NotImplementedError

    def answer(self, prediction: Tensor) -> Tensor:
        """Return the data that the prediction stands for."""
        raise NotImplementedError

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        """Return -log p(data | prediction) in nats, summed over a row's elements, (B,)."""
        raise NotImplementedError

    @property
    def elements(self) -> int:
        """Return how many elements of a row without void ones the likelihood sums over."""
        return math.prod(self.data_shape)

    def void(self, data: Tensor) -> Tensor | None:
        """Return the cells with unknown data, bool (B, H, W): they are in no loss. None: there are none."""
        return None

    # --- for people -----------------------------------------------------------------------------------

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        """Return the type's own figures of an answer against the truth."""
        return {}

    def picture(self, data: Tensor) -> np.ndarray | list[str]:
        """Return data as RGB pictures, uint8 (B, h, w, 3), or as one text per row."""
        raise NotImplementedError

    def pixels(self, data: Tensor) -> Tensor | None:
        """Return data as RGB images, uint8 (B, 3, h, w), or None for a type that is no image."""
        return None

    def wav(self, data: Tensor) -> bytes | None:
        """Return one row's data as a .wav file; None for a type that is no sound."""
        return None

    def parse(self, text: str) -> np.ndarray:
        """Return one row's data from what a person typed (a name, a number, a file). Raises ConfigError."""
        raise NotImplementedError

    def write(self, data: Tensor, stem: Path) -> Path:
        """Write one row's data to a file named from the stem, and return its path."""
        raise NotImplementedError

    # --- shared by types ------------------------------------------------------------------------------

    def broadcast(self, vector: Tensor) -> Tensor:
        """Return a vector (B, c) repeated over the cells, (B, c, H, W)."""
        return vector[:, :, None, None].expand(-1, -1, *self.size)


class DenseHead(nn.Module):
    """A convolutional decoder head: one prediction per cell.

    The linear bypass lets what the features hold of the input through as it is: given pixels are copied, not
    learned.
    """

    def __init__(self, feature_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, feature_channels), feature_channels)
        self.conv = nn.Conv2d(feature_channels, out_channels, 3, padding=1)
        self.bypass = nn.Conv2d(feature_channels, out_channels, 1, bias=False)

    def forward(self, features: Features) -> Tensor:
        shaped = self.conv(nn.functional.silu(self.norm(features.map)))  # (B, F, H, W) -> (B, out, H, W)
        return shaped + self.bypass(features.map)


class DenseModality(Modality):
    """A modality of C real numbers per cell, whose prediction is the code's mean: data (B, C, H, W)."""

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (self.code_channels, *self.size)

    def make_head(self, feature_channels: int, pooled_channels: int) -> nn.Module:
        return DenseHead(feature_channels, self.prediction_channels)

    def expected_code(self, prediction: Tensor) -> Tensor:
        return prediction

    def answer(self, prediction: Tensor) -> Tensor:
        return self.from_code(prediction)


class PooledHead(nn.Module):
    """A two-layer perceptron on pooled features: one prediction per sample."""

    def __init__(self, pooled_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(pooled_channels),
            nn.Linear(pooled_channels, 2 * pooled_channels),
            nn.SiLU(),
            nn.Linear(2 * pooled_channels, out_channels),
        )

    def forward(self, features: Features) -> Tensor:
        return self.layers(features.pooled)  # (B, P) -> (B, out)


def class_codes(classes: int, channels: int | None = None, key: str = "code_channels") -> Tensor:
    """Return one code of +1 and -1 per class, (classes, channels), all different.

    channels: at least ceil(log2 classes), the default. Codes are chosen one by one, each as far as possible
    from those before (two classes: -1 and +1): of all codes, or, where these are over 4096 and over 8 a
    class, of random ones and their opposites. The idea of binary codes for classes: Chen et al., "Analog
    Bits", 2022. Raises ConfigError, naming the key, if there are too few channels to tell the classes apart.
    """
    least = max(1, math.ceil(math.log2(classes)))
    channels = least if channels is None else channels
    if channels < least:
        raise ConfigError(f"{key} ({channels}) cannot tell {classes} classes apart; at least {least}")
    pool = _code_pool(classes, channels)
    chosen = [pool[0]]
    overlap = pool @ pool[0]
    for _ in range(classes - 1):
        index = int(overlap.argmin())
        chosen.append(pool[index])
        overlap = torch.maximum(overlap, pool @ pool[index])
    return torch.stack(chosen)


def _code_pool(classes: int, channels: int) -> Tensor:
    """Return the codes to choose from, (n, channels), all different, n >= classes."""
    if 2**channels <= max(4096, 8 * classes):
        bits = torch.arange(2**channels)[:, None] >> torch.arange(channels) & 1
        return bits * 2.0 - 1.0
    drawn = torch.randint(0, 2, (4 * classes, channels), generator=torch.Generator().manual_seed(0))
    return torch.unique(torch.cat([drawn, 1 - drawn]) * 2.0 - 1.0, dim=0)


def need_column(
    name: str, column: str, columns: Mapping[str, Mapping[str, Any]], kinds: tuple[str, ...]
) -> Mapping[str, Any]:
    """Return what the manifest says of a column. Raises ConfigError if it is missing or of another kind."""
    if column not in columns:
        raise ConfigError(
            f"modalities.{name} needs the column {column!r}, which the data set lacks; it has: "
            f"{', '.join(columns)}. Name another with modalities.{name}.column, or drop the modality with "
            f"modalities.{name}=null"
        )
    entry = columns[column]
    if entry["kind"] not in kinds:
        raise ConfigError(
            f"modalities.{name} wants a column of kind {' or '.join(kinds)}; {column!r} is {entry['kind']}"
        )
    return entry
