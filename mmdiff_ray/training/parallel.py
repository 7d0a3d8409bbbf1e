"""One model on one process, or on many: the only place that wraps a model for data parallelism."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmdiff_ray.config import ConfigError, TrainConfig


def world() -> tuple[int, int]:
    """Return (rank, number of processes); (0, 1) where nothing is distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def parallelize(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """Return the model as the training step calls it: compiled where asked for, wrapped where there are
    workers."""
    wrapped: Any = torch.compile(model) if config.compile else model
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return wrapped
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        wrapped, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def without_sync(model: nn.Module, skip: bool) -> AbstractContextManager:
    """Return a context in which gradients stay local, for all micro-batches of a step but the last."""
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


def add_over_workers(values: Tensor) -> Tensor:
    """Return values summed over all workers."""
    return _over_workers(values, dist.ReduceOp.SUM)


def largest_over_workers(values: Tensor) -> Tensor:
    """Return the largest of every value over all workers."""
    return _over_workers(values, dist.ReduceOp.MAX)


def _over_workers(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, operation)
    return values


def same_everywhere(value: float) -> float:
    """Return the first worker's value on every worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return float(shared)


def choose_device(config: TrainConfig) -> torch.device:
    """Return the configured device; `auto` is the first visible GPU, else the CPU."""
    if config.device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"train.device: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but torch sees no GPU here; use train.device=cpu")
    return device
