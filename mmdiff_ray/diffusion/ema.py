"""The exponential moving average of a model's parameters."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """Keep a moving average whose half-life is counted in samples.

    Early in training, the half-life is a tenth of the samples seen, so that the average forgets the
    initial weights (Karras et al., 2022, "EDM", appendix F).
    """

    def __init__(self, model: Model, half_life_samples: int) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.half_life_samples = half_life_samples

    @torch.no_grad()
    def update(self, model: nn.Module, batch_samples: int, samples_seen: int) -> None:
        """Update the average after an optimizer step on batch_samples that ended at samples_seen."""
        half_life = min(self.half_life_samples, max(samples_seen / 10, 1))
        keep = 0.5 ** (batch_samples / half_life)
        averages = [average.detach() for average in self.model.parameters()]
        torch._foreach_lerp_(averages, [value.detach() for value in model.parameters()], 1 - keep)
