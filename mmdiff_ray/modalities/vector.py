"""Vectors of real numbers, and scalars, which are vectors of one: from a column or of an image."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError, ModalityConfig, decoding
from mmdiff_ray.modalities.base import Mean, Modality, PooledHead, RowContext, need_column
from mmdiff_ray.registry import register

MOST_SHOWN = 6
"""Numbers of a vector that its text shows."""


@dataclass(frozen=True)
class VectorOptions(ModalityConfig):
    """The keys of a vector.

    column: Parquet column; null: the modality's name.
    dim: how many numbers; null: the data set's.
    names: the numbers' names; null: the data set's.
    """

    column: str | None = None
    dim: int | None = None
    names: list[str] | None = None


@register("modality", "vector")
class VectorModality(Modality):
    """Vectors of D numbers. data: float32 (B, D); code: (B, D, H, W), each number, standardised, in every
    cell of its channel.

    prediction: (B, 2 D), the standardised numbers' means, then the logarithms of their deviations.
    Likelihood: Gaussian.
    """

    Options: ClassVar[type] = VectorOptions
    likelihood = "Gaussian"
    mean: Tensor
    scale: Tensor

    def __init__(self, name: str, options: Any, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        if not self.dim or self.dim < 1:
            raise ConfigError(f"modalities.{name}.dim ({self.dim}) must be at least 1")
        self.code_channels, self.prediction_channels = self.dim, 2 * self.dim
        self.register_buffer("mean", torch.zeros(self.data_shape))
        self.register_buffer("scale", torch.ones(self.data_shape))

    @property
    def dim(self) -> int:
        """Return how many numbers a row has."""
        return self.options.dim

    @property
    def names(self) -> list[str] | None:
        """Return the numbers' names, if they have any."""
        return self.options.names

    # What is read.

    @classmethod
    def resolve(cls, name: str, options: Any, columns: Mapping[str, Mapping[str, Any]]) -> Any:
        column = options.column or name
        entry = need_column(name, column, columns, ("vector", "embedding"))
        if options.dim not in (None, entry["dim"]):
            raise ConfigError(
                f"modalities.{name}.dim ({options.dim}) differs from the data set's {entry['dim']} in column "
                f"{column!r}; leave it out to take the data set's"
            )
        names = options.names or entry.get("names")
        return dataclasses.replace(options, column=column, dim=entry["dim"], names=names)

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (self.dim,)

    @property
    def data_type(self) -> type:
        return np.float32

    @property
    def usual_scale(self) -> float:
        return 1 / math.sqrt(math.prod(self.size))  # each channel says one thing

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        value = row[self.column]
        if value is None or isinstance(value, str):
            return None if value is None else self.parse(value)
        if len(value) != self.dim:
            raise ValueError(f"{self.name}: got {len(value)} numbers, want {self.dim}")
        return np.asarray(value, dtype=np.float32).reshape(self.data_shape)

    # The code: of unit RMS, and linear in the numbers, so that the expected code is the code of the mean.

    def calibrate(self, data: Tensor) -> None:
        self.mean.copy_(data.double().mean(0))
        self.scale.copy_(data.double().std(0, correction=0).clamp_min(1e-6))

    def standardise(self, data: Tensor) -> Tensor:
        """Return numbers with mean 0 and standard deviation 1 over the data set, (B, D)."""
        return ((data - self.mean) / self.scale).reshape(-1, self.dim)

    def _from_standard(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *self.data_shape) * self.scale + self.mean

    def encode(self, data: Tensor) -> Tensor:
        return self.broadcast(self.standardise(data))

    def from_code(self, code: Tensor) -> Tensor:
        return self._from_standard(code.float().mean((2, 3)))

    # The head's side.

    def make_head(self, feature_channels: int, pooled_channels: int) -> nn.Module:
        return PooledHead(pooled_channels, self.prediction_channels)

    def expected_code(self, prediction: Tensor) -> Tensor:
        return self.broadcast(prediction.float()[:, : self.dim])

    def answer(self, prediction: Tensor) -> Tensor:
        return self._from_standard(prediction.float()[:, : self.dim])

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        mean, log_deviation = prediction.float().chunk(2, dim=1)
        log_deviation = log_deviation.clamp(-5, 5)  # a number known exactly would have an infinite density
        distance = (self.standardise(data) - mean) / log_deviation.exp()
        return (0.5 * distance.square() + log_deviation + 0.5 * math.log(2 * math.pi)).sum(1)

    # What people see and type.

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        return {"absolute_error": Mean(float((answer - data).abs().sum()), data.numel())}

    def picture(self, data: Tensor) -> list[str]:
        return [as_text(row, self.names) for row in data.reshape(-1, self.dim).tolist()]

    def entry(self) -> dict[str, Any]:
        return {"kind": "vector", "dim": self.dim, **({"names": self.names} if self.names else {})}

    def stored(self, data: Tensor) -> np.ndarray:
        return data.float().cpu().numpy().reshape(-1)

    def parse(self, text: str) -> np.ndarray:
        """Return numbers from a text of them, separated by commas, or a .npy file. Raises ConfigError."""
        try:
            with decoding():
                words = np.load(text).reshape(-1) if text.endswith(".npy") else text.split(",")
                values = [float(word) for word in words]
        except (ValueError, OSError):
            values = []
        if len(values) != self.dim or not all(map(math.isfinite, values)):
            many = f"{self.dim} numbers separated by commas, or a .npy file of them"
            raise ConfigError(f"{self.name}: got {text!r}, want {'a number' if self.dim == 1 else many}")
        return np.asarray(values, dtype=np.float32).reshape(self.data_shape)

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.txt")
        path.write_text(", ".join(map(repr, data.reshape(-1).tolist())) + "\n", encoding="utf8")
        return path


@dataclass(frozen=True)
class ScalarOptions(ModalityConfig):
    """The keys of a scalar.

    source: image modality whose mean level it is, from 0 to 1; null: the number is in a column.
    column: Parquet column of texts that are numbers, or of vectors of one; null: the modality's name.
    """

    source: str | None = None
    column: str | None = None


@register("modality", "scalar")
class ScalarModality(VectorModality):
    """Real numbers: vectors of one, but data are (B,)."""

    Options = ScalarOptions
    dim = 1
    names = None

    @classmethod
    def resolve(cls, name: str, options: Any, columns: Mapping[str, Mapping[str, Any]]) -> Any:
        if options.source is None:
            column = options.column or name
            entry = need_column(name, column, columns, ("text", "vector"))
            if entry.get("dim", 1) != 1:
                raise ConfigError(
                    f"modalities.{name}: a scalar is one number; column {column!r} has {entry['dim']}. Take "
                    f"modalities.{name}.type=vector"
                )
        return options

    @property
    def made_from(self) -> str | None:
        return self.options.source

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.options.source else (self.column,)

    @property
    def data_shape(self) -> tuple[int, ...]:
        return ()

    def read(self, row: Mapping[str, Any], context: RowContext, done: Mapping[str, Any]) -> np.ndarray | None:
        if not self.options.source:
            return super().read(row, context, done)
        image = done.get(self.options.source)
        return None if image is None else np.asarray(image.mean() / 255, dtype=np.float32)


def as_text(values: Sequence[float], names: Sequence[str] | None = None) -> str:
    """Return the first numbers of a vector, with their names if they have any."""
    shown = [f"{value:.4g}" for value in values[:MOST_SHOWN]]
    if names:
        shown = [f"{name} {number}" for name, number in zip(names, shown, strict=False)]
    return ", ".join([*shown, *(["…"] if len(values) > MOST_SHOWN else [])])
