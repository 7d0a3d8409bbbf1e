"""A plug-in modality for the speed part: the latent of an image, as a frozen autoencoder gives it."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from mmdiff_ray.config import ModalityConfig
from mmdiff_ray.modalities.base import DenseHead, Modality
from mmdiff_ray.registry import register


@dataclass(frozen=True)
class LatentOptions(ModalityConfig):
    """code_channels: of the latent."""

    code_channels: int = 4


@register("modality", "latent")
class LatentModality(Modality):
    """Latents of unit variance. data, code and prediction: float32 (B, c, H, W). Likelihood: Gaussian."""

    Options = LatentOptions
    likelihood = "Gaussian"

    def __init__(self, name: str, options: LatentOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        self.code_channels = self.prediction_channels = options.code_channels

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (self.code_channels, *self.size)

    @property
    def data_type(self) -> type:
        return np.float32

    def encode(self, data: Tensor) -> Tensor:
        return data

    def from_code(self, code: Tensor) -> Tensor:
        return code.float()

    def make_head(self, feature_channels: int, pooled_channels: int) -> nn.Module:
        return DenseHead(feature_channels, self.prediction_channels)

    def expected_code(self, prediction: Tensor) -> Tensor:
        return prediction

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.float()

    def code_negative_log_likelihood(self, mean: Tensor, std: Tensor, data: Tensor) -> Tensor:
        """Return -log N(data; mean, std^2) in nats, (B,). mean, data: (B, c, H, W); std broadcasts."""
        nats = 0.5 * ((data - mean.float()) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)
        return nats.flatten(1).sum(1)
