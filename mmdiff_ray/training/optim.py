"""The optimizer and its learning rate over samples."""

import math

import torch
from torch import nn

from mmdiff_ray.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW. Norms, biases, role embeddings and learned label codes have no weight decay."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or _is_embedding(name) else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(beta1, beta2), fused=True)


def _is_embedding(name: str) -> bool:
    """Return whether a parameter is a role embedding or a learned label code, by its dotted name."""
    parts = name.split(".")
    return parts[-1] == "table" or "role_embedding" in parts[:-1]


def learning_rate(config: TrainConfig, samples_seen: int, total_samples: int) -> float:
    """Return the learning rate of the step that starts at samples_seen: warm-up, then the configured decay.

    With `train.decay_samples`, the rate is constant until that many samples before the end ("warm-up, stable,
    decay"; Hu et al., 2024). Otherwise it decays from the end of the warm-up.
    """
    warmup = min(1.0, (samples_seen + config.global_batch) / max(1, config.warmup_samples))
    length = max(1, min(config.decay_samples or total_samples, total_samples))  # of the decay
    progress = min(1.0, max(0, samples_seen - (total_samples - length)) / length)
    shape = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.decay]
    floor = config.final_lr_ratio if config.decay != "constant" else 0.0
    return config.learning_rate * warmup * (floor + (1 - floor) * shape)
