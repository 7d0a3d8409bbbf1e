"""The bare training loop that a training step is measured against."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiff_ray.training.parallel import clip_gradients
from mmdiff_ray.training.trainer import Trainer


class SquaredErrors(nn.Module):
    """One squared error per head of a denoiser, from prepared inputs of its backbone."""

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(dict(heads))

    def forward(self, x: Tensor, embedding: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the heads' mean squared errors. x: (B, C, H, W); embedding: (B, E)."""
        features: Any = self.backbone(x, embedding)
        own = features if isinstance(features, Mapping) else dict.fromkeys(self.heads, features)
        errors = [F.mse_loss(head(own[name]).float(), targets[name]) for name, head in self.heads.items()]
        return torch.stack(errors).sum()


class BareLoop:
    """The same backbone, heads, precision, clipping, optimizer and EMA as a trainer's, and nothing else.

    It shares the trainer's parameters, so that both fit on the device. No draw, forward process, encoder,
    embedding of time and roles, likelihood or report.
    """

    def __init__(self, trainer: Trainer, rows: int) -> None:
        self.trainer, self.config = trainer, trainer.config.train
        denoiser, device = trainer.denoiser, trainer.device
        self.losses = SquaredErrors(denoiser.backbone, denoiser.heads)
        torch.manual_seed(0)
        x = torch.randn(rows, denoiser.input_channels, *denoiser.size, device=device)
        last = self.config.channels_last and device.type == "cuda"  # as the trainer does
        self.x = x.contiguous(memory_format=torch.channels_last) if last else x
        self.embedding = torch.randn(rows, denoiser.backbone.embedding_channels, device=device)
        self.targets = self._targets()
        if self.config.compile:
            self.losses.compile()

    @torch.no_grad()
    def _targets(self) -> dict[str, Tensor]:
        """Return random targets of the heads' shapes."""
        features: Any = self.losses.backbone(self.x[:1], self.embedding[:1])
        own = features if isinstance(features, Mapping) else dict.fromkeys(self.losses.heads, features)
        shapes = {name: head(own[name]).shape[1:] for name, head in self.losses.heads.items()}
        return {
            name: torch.randn(len(self.x), *shape, device=self.x.device) for name, shape in shapes.items()
        }

    def step(self) -> None:
        """Do one optimizer step."""
        trainer = self.trainer
        trainer.optimizer.zero_grad(set_to_none=True)
        bfloat16 = self.config.precision == "bfloat16"
        with torch.autocast(trainer.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            loss = self.losses(self.x, self.embedding, self.targets)
        loss.backward()
        clip_gradients(self.losses, self.config.clip_norm)
        trainer.optimizer.step()
        trainer.ema.update(trainer.denoiser, self.config.global_batch, self.config.ema_samples)
