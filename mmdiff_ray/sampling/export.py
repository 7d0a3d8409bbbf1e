"""Write a trained model for use, and load it."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.models.denoiser import Denoiser, build_denoiser
from mmdiff_ray.sampling.generator import Generator
from mmdiff_ray.storage.filesystem import is_uri
from mmdiff_ray.storage.mirror import fetched

WEIGHTS = "model.safetensors"


def save_export(folder: Path, config: Config, denoiser: Denoiser, facts: Mapping[str, Any]) -> None:
    """Write a model for use: `model.safetensors`, `config.yaml` and `facts.json`. The folder appears
    complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in denoiser.state_dict().items()}
    save_file(tensors, str(partial / "model.safetensors"))
    (partial / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf8")
    (partial / "facts.json").write_text(json.dumps(dict(facts), indent=1), encoding="utf8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def tensors_in(file: str) -> dict[str, Tensor]:
    """Return the tensors of a model's file, at a path or URI. Raises ConfigError if it cannot be read."""
    with _opened(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def shapes_in(file: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a model's file, without reading them. Raises as `tensors_in`."""
    with _opened(file) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    path = fetched(file.rpartition("/")[0]) / WEIGHTS if is_uri(file) else Path(file)
    try:
        with safe_open(str(path), framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read a model from {file}: {error}") from None


def load_export(folder: str | Path, device: str = "cpu", config: Config | None = None) -> Generator:
    """Return the model in an export folder, or at the URI of one. Raises ConfigError if it is none.

    config: in place of its own, one that differs in nothing that the weights depend on.
    """
    folder = fetched(str(folder))
    if not (folder / "model.safetensors").is_file() or not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} holds no exported model (model.safetensors and config.yaml)")
    config = config or configuration.load_saved(folder / "config.yaml")
    denoiser = build_denoiser(config)
    denoiser.load_state_dict(tensors_in(str(folder / WEIGHTS)))
    return Generator(config, denoiser.to(device))
