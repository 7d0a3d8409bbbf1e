"""One model on one process, or on many: the only place that wraps a model for data parallelism.

Workers share a model by one of two strategies. ddp: each holds all of it. fsdp: each holds a part of every
parameter, of its average and of the optimizer's moments, and the rest of a layer only while that computes
(FSDP2). Both train to the same losses. What only fsdp needs of PyTorch takes a second to import, and is
imported where it is used.
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
    """Return (rank, number of processes); (0, 1) where nothing is distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def parallelize(loss: TrainingLoss, config: Config, device: torch.device) -> nn.Module:
    """Return the loss as the training step calls it: on the device, compiled where asked for, the model
    shared out by the configured strategy where there are workers. A model that is not trained is never
    compiled."""
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
    """Leave every worker a part of each parameter, on its device; the backbone is gathered layer by layer.

    Arithmetic stays in the parameters' float32 (under autocast as ever), so losses are those of one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world()[1],))
    for layer in _layers(loss.denoiser):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(loss, mesh=mesh, reshard_after_forward=True)


def check_strategy(config: Config, denoiser: Denoiser) -> None:
    """Raise ConfigError for a model that the configured strategy cannot share out."""
    scalars = [name for name, parameter in denoiser.named_parameters() if parameter.ndim == 0]
    if config.workers.strategy == "fsdp" and scalars:
        raise ConfigError(
            f"workers.strategy: fsdp cannot share out parameters without a dimension ({', '.join(scalars)}); "
            "give them one, of size 1, or use workers.strategy=ddp"
        )


def _layers(denoiser: Denoiser) -> list[nn.Module]:
    """Return the layers that the backbone names; none where it names none."""
    return list(getattr(denoiser.backbone, "layers", []))


def _compile(loss: TrainingLoss, layers_apart: bool) -> None:
    """Compile a loss in place as one graph, from noise to terms; or each layer of its backbone (else the
    backbone) for itself, so that what gathers a layer stays between them."""
    if not layers_apart:
        loss.compile()
        return
    layers = _layers(loss.denoiser) or [loss.denoiser.backbone]
    limits: Any = torch._dynamo.config  # one code serves layers of several sizes
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(layers))
    for layer in layers:
        layer.forward = torch.compile(layer.forward)


def without_sync(model: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """Return a context in which gradients stay local, for all micro-batches of a step but the last."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2's
        model.set_requires_gradient_sync(not skip)  # type: ignore[operator]
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale the gradients down to a norm of at most `most`, and return what it was, over all workers."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), most)
    return norm.full_tensor() if _is_part(norm) else norm  # type: ignore[attr-defined]


def is_sharded(model: nn.Module) -> bool:
    """Return whether this worker holds only a part of the model."""
    return any(_is_part(parameter) for parameter in model.parameters())


def _is_part(values: Tensor) -> bool:
    """Return whether a tensor is PyTorch's DTensor, of which this worker holds a part."""
    return hasattr(values, "full_tensor")


def gather(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole state of a sharded model in the first worker's memory, nothing on the others. All
    call it together."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict[str, Any](get_model_state_dict(model, options=whole))


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
    """Return the configured device; `auto` is the GPU that this process was given (by itself the first),
    else the CPU."""
    if config.device == "auto":
        return _numbered(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"train.device: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but torch sees no GPU here; use train.device=cpu")
    return _numbered(device)


def bfloat16_is_fast() -> bool:
    """Return whether this machine's CPU multiplies matrices in bfloat16 (AVX512_BF16 or AMX)."""
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in known if hasattr(torch.cpu, name))


def _numbered(device: torch.device) -> torch.device:
    """Return a GPU with its number: several workers of one machine see all of its GPUs, each has its own."""
    whole = device.type != "cuda" or device.index is not None
    return device if whole else torch.device("cuda", torch.cuda.current_device())
