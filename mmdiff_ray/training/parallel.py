"""Data parallelism: the only module that wraps a model.

There are two strategies. `ddp`: every worker has the whole model. `fsdp` (FSDP2): every worker has a shard of
each parameter, of its moving average and of the optimizer's moments, and gathers a layer only while it
computes. Both give the same losses. The FSDP modules take a second to import, so they are imported on first
use.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmdiff_ray.config import Config, ConfigError, TrainConfig
from mmdiff_ray.models.denoiser import Denoiser
from mmdiff_ray.training.loss import TrainingLoss


def world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def parallelize(loss: TrainingLoss, config: Config, device: torch.device) -> nn.Module:
    """Prepare the loss module for training: move it to the device, compile it, wrap it for data parallelism.

    Compiles only with `train.compile`, and wraps only if there are several workers.
    """
    trained = any(parameter.requires_grad for parameter in loss.parameters())
    sharded = dist.is_initialized() and config.workers.strategy == "fsdp"
    if sharded:
        _shard(loss, device)
    loss.to(device)
    loss.tabulate()
    if trained and config.train.compile:
        _compile(loss, layers_apart=sharded)
    if not trained or sharded or world()[1] == 1:
        return loss
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        loss, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def _shard(loss: TrainingLoss, device: torch.device) -> None:
    """Shard every parameter over the workers; the backbone is gathered layer by layer.

    Parameters and reductions stay in float32, so losses equal those of one process. Autocast works as usual.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world()[1],))
    for layer in _layers(loss.denoiser):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(loss, mesh=mesh, reshard_after_forward=True)


def check_strategy(config: Config, denoiser: Denoiser) -> None:
    """Raise ConfigError if the configured strategy cannot shard the model."""
    scalars = [name for name, parameter in denoiser.named_parameters() if parameter.ndim == 0]
    if config.workers.strategy == "fsdp" and scalars:
        raise ConfigError(
            f"workers.strategy: fsdp cannot shard scalar parameters ({', '.join(scalars)}); "
            "give them shape (1,) or use workers.strategy=ddp"
        )


def _layers(denoiser: Denoiser) -> list[nn.Module]:
    """Return the backbone's `layers`, or an empty list if it does not define them."""
    return list(getattr(denoiser.backbone, "layers", []))


def _compile(loss: TrainingLoss, layers_apart: bool) -> None:
    """Compile a loss in place, as one graph from noise to loss terms.

    layers_apart: compile each layer of the backbone separately, so that FSDP can gather layers in between.
    """
    if not layers_apart:
        loss.compile()
        return
    layers = _layers(loss.denoiser) or [loss.denoiser.backbone]
    limits: Any = torch._dynamo.config  # all layers share one code object, in several sizes
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(layers))
    for layer in layers:
        layer.forward = torch.compile(layer.forward)


def without_sync(model: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """Return a context that skips gradient synchronization, for all but the last micro-batch of a step."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(not skip)  # type: ignore[operator]
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the global gradient norm to `max_norm`; return the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if _is_part(norm) else norm  # type: ignore[attr-defined]


def is_sharded(model: nn.Module) -> bool:
    """Return whether this worker has only a shard of the model."""
    return any(_is_part(parameter) for parameter in model.parameters())


def _is_part(values: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this worker has one shard."""
    return hasattr(values, "full_tensor")


def gather(model: nn.Module) -> dict[str, Tensor]:
    """Return the full state of a sharded model on the first worker, and {} on the others. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict[str, Any](get_model_state_dict(model, options=whole))


def add_over_workers(values: Tensor) -> Tensor:
    """Return the sum of each value over all workers."""
    return _over_workers(values, dist.ReduceOp.SUM)


def largest_over_workers(values: Tensor) -> Tensor:
    """Return the maximum of each value over all workers."""
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
    """Return the configured device. `auto`: the GPU assigned to this process, else the CPU."""
    if config.device == "auto":
        return _numbered(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"train.device: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but PyTorch finds no GPU; use train.device=cpu")
    return _numbered(device)


def bfloat16_is_fast() -> bool:
    """Return whether this machine's CPU multiplies matrices in bfloat16 (AVX512_BF16 or AMX)."""
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in known if hasattr(torch.cpu, name))


def _numbered(device: torch.device) -> torch.device:
    """Add the index to a GPU device: several workers may see all GPUs of a machine, but each uses one."""
    whole = device.type != "cuda" or device.index is not None
    return device if whole else torch.device("cuda", torch.cuda.current_device())
