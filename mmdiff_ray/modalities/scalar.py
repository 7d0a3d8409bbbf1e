"""Scalars: one real number per row, from a text column or of an image."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError, ModalityConfig
from mmdiff_ray.modalities.base import Mean, Modality, PooledHead, RowContext, need_column
from mmdiff_ray.registry import register


@dataclass(frozen=True)
class ScalarOptions(ModalityConfig):
    """The keys of a scalar.

    source: image modality whose mean level it is, from 0 to 1; null: the number is in a column.
    column: Parquet column of texts that are numbers; null: the modality's name.
    """

    source: str | None = None
    column: str | None = None


@register("modality", "scalar")
class ScalarModality(Modality):
    """Real numbers. data: float32 (B,); code: (B, 1, H, W), the standardised number in every cell.

    prediction: (B, 2), the standardised number's mean and logarithm of its deviation. Likelihood: Gaussian.
    """

    Options = ScalarOptions
    likelihood = "Gaussian"
    usual_scale = Modality.scale_of_one_thing
    code_channels = 1
    prediction_channels = 2
    mean: Tensor
    scale: Tensor

    def __init__(self, name: str, options: ScalarOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    # What is read. No column holds numbers as such, so they come from an image or out of a text.

    @classmethod
    def resolve(
        cls, name: str, options: ScalarOptions, columns: Mapping[str, Mapping[str, Any]]
    ) -> ScalarOptions:
        if options.source is None:
            need_column(name, options.column or name, columns, ("text",))
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

    @property
    def data_type(self) -> type:
        return np.float32

    def read(self, row: Mapping[str, Any], context: RowContext, done: Mapping[str, Any]) -> np.ndarray | None:
        if self.options.source:
            image = done.get(self.options.source)
            return None if image is None else np.asarray(image.mean() / 255, dtype=np.float32)
        text = row[self.column]
        return None if text is None else self.parse(text)

    # The code: of unit RMS, and linear in the number, so that the expected code is the code of the mean.

    def calibrate(self, data: Tensor) -> None:
        self.mean.copy_(data.double().mean())
        self.scale.copy_(data.double().std(correction=0).clamp_min(1e-6))

    def standardise(self, data: Tensor) -> Tensor:
        """Return numbers with mean 0 and standard deviation 1 over the data set, (B,)."""
        return (data - self.mean) / self.scale

    def encode(self, data: Tensor) -> Tensor:
        return self.broadcast(self.standardise(data)[:, None])

    def from_code(self, code: Tensor) -> Tensor:
        return code.float().mean((1, 2, 3)) * self.scale + self.mean

    # The head's side.

    def make_head(self, feature_channels: int, pooled_channels: int) -> nn.Module:
        return PooledHead(pooled_channels, self.prediction_channels)

    def expected_code(self, prediction: Tensor) -> Tensor:
        return self.broadcast(prediction.float()[:, :1])

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.float()[:, 0] * self.scale + self.mean

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        mean, log_deviation = prediction.float().unbind(1)
        log_deviation = log_deviation.clamp(-5, 5)  # a number known exactly would have an infinite density
        distance = (self.standardise(data) - mean) / log_deviation.exp()
        return 0.5 * distance.square() + log_deviation + 0.5 * math.log(2 * math.pi)

    # What people see and type.

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        return {"absolute_error": Mean(float((answer - data).abs().sum()), len(data))}

    def picture(self, data: Tensor) -> list[str]:
        return [f"{value:.4g}" for value in data.tolist()]

    def parse(self, text: str) -> np.ndarray:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"{self.name}: got {text!r}, want a number")
        return np.asarray(value, dtype=np.float32)

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.txt")
        path.write_text(f"{float(data)!r}\n", encoding="utf8")
        return path
