"""The optimizer and its learning rate over samples."""

import math

import torch
from torch import nn

from mmdiff_ray.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW; norms, biases, embeddings of roles and learned label codes are not decayed."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    kept = {
        name for name, parameter in named if parameter.ndim < 2 or "role_embedding" in name or "table" in name
    }
    matrices = [parameter for name, parameter in named if name not in kept]
    vectors = [parameter for name, parameter in named if name in kept]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(beta1, beta2), foreach=True)


def learning_rate(config: TrainConfig, samples_seen: int, total_samples: int) -> float:
    """Return the learning rate of the step that starts at samples_seen: warm-up, then the configured
    decay."""
    warmup = min(1.0, (samples_seen + config.global_batch) / max(1, config.warmup_samples))
    progress = min(1.0, samples_seen / max(1, total_samples))
    shape = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.decay]
    floor = config.final_lr_ratio if config.decay != "constant" else 0.0
    return config.learning_rate * warmup * (floor + (1 - floor) * shape)
