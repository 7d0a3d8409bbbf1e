"""What the parts share: configurations, tiny sizes for the CPU, random batches."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mmdiff_ray import config as configuration
from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config
from mmdiff_ray.models.denoiser import Denoiser
from mmdiff_ray.training.parallel import choose_device

HERE = Path(__file__).parent
CONFIGS = HERE / "configs"
TINY_MODELS = {
    "unet": {"width": 8, "multipliers": [1, 2], "blocks": [1, 1], "attention": [1], "embedding_channels": 16},
    "dit": {"width": 32, "depth": 2, "head_channels": 16, "feature_channels": 8, "embedding_channels": 16},
}


def read_config(name: str, tiny: bool = False) -> Config:
    """Return the configuration `configs/NAME.json`; tiny: the same at the smallest sizes, on the CPU."""
    config = configuration.read_json(CONFIGS / f"{name}.json")
    if not tiny:
        return config
    plain = configuration.to_plain(config)
    plain["space"] |= {"height": 8, "width": 8}
    plain["model"] |= {"preset": "nano", "options": TINY_MODELS[config.model.backbone]}
    plain["train"] |= {"global_batch": 8, "warmup_samples": 8, "log_every_samples": 16, "device": "cpu"}
    for options in plain["modalities"].values():
        options["weights"]["scale"] = None
    return configuration.from_plain(plain)


def device_of(config: Config) -> torch.device:
    """Return the device that a configuration trains on."""
    return choose_device(config.train)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_batch(denoiser: Denoiser, rows: int, device: torch.device) -> Batch:
    """Return a batch of random data in every modality's own format, on the device."""
    torch.manual_seed(0)
    data = {}
    for name, modality in denoiser.modalities.items():
        if modality.only_given:  # made from an image: pixels, and 255 where they are visible
            visible = torch.rand(rows, 1, *modality.size) > 0.3
            pixels = torch.randint(0, 256, (rows, *modality.data_shape))
            pixels[:, -1:] = 255
            data[name] = (pixels * visible).to(torch.uint8)
        else:
            code = torch.randn(rows, modality.code_channels, *modality.size)
            with torch.no_grad():
                data[name] = modality.to("cpu").from_code(code)
    here = torch.ones(rows, dtype=torch.bool)
    ids = torch.arange(rows)
    return Batch(ids, torch.zeros_like(ids), here, data, dict.fromkeys(data, here)).to(device)


@contextmanager
def turn(folder: Path, alone: bool) -> Iterator[None]:
    """Hold the device: shared with other processes that compile, or alone once none of them compiles."""
    with (folder / "gpu.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def until(deadline: float) -> float:
    """Return the seconds left until a deadline (`time.time()`), at least 0."""
    return max(0.0, deadline - time.time())
