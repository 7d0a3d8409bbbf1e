"""Write a trained model for use, and load it."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
LAYOUTS = (
    ("config.yaml", WEIGHTS),
    ("config.json", WEIGHTS),
    ("denoiser/config.json", "denoiser/diffusion_pytorch_model.safetensors"),
)
"""Configuration and weights of a run's export, and of a published model in either format."""
PRETRAINED = "pretrained:"
SHIPPED_VARIABLE = "MMDIFF_PRETRAINED"


def save_export(folder: Path, config: Config, denoiser: Denoiser, facts: Mapping[str, Any]) -> None:
    """Write a model for use: `model.safetensors`, `config.yaml` and `facts.json`. The folder appears
    complete."""
    with complete_folder(folder) as partial:
        tensors = {name: value.detach().cpu().contiguous() for name, value in denoiser.state_dict().items()}
        save_file(tensors, str(partial / WEIGHTS))
        (partial / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf8")
        (partial / "facts.json").write_text(json.dumps(dict(facts), indent=1), encoding="utf8")


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` once it is filled."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def export_files(where: str | Path) -> tuple[Path, Path] | None:
    """Return the configuration and the weights of the exported model at a path, a URI or `pretrained:NAME`;
    None where there is none. Raises ConfigError for an unknown name."""
    folder = fetched(_shipped(str(where)))
    for config, weights in LAYOUTS:
        if (folder / config).is_file() and (folder / weights).is_file():
            return folder / config, folder / weights
    return None


def need_export(where: str | Path) -> tuple[Path, Path]:
    """Return what `export_files` finds. Raises ConfigError where there is no exported model."""
    if (found := export_files(where)) is None:
        raise ConfigError(f"{where} holds no exported model (model.safetensors and config.yaml)")
    return found


def shipped_models() -> list[str]:
    """Return the names of the models in `MMDIFF_PRETRAINED`, by default those that ship with the package."""
    return sorted(path.name for path in _shipped_folder().glob("*") if path.is_dir() and export_files(path))


def _shipped_folder() -> Path:
    named = os.environ.get(SHIPPED_VARIABLE)
    return Path(named) if named else Path(__file__).parents[1] / "pretrained"


def _shipped(where: str) -> str:
    """Return the folder of a shipped model for `pretrained:NAME`, any other text unchanged."""
    name = where.removeprefix(PRETRAINED)
    if name == where:
        return where
    if name not in (known := shipped_models()):
        raise ConfigError(f"no shipped model {name!r}; there are: {', '.join(known) or 'none'}")
    return str(_shipped_folder() / name)


def weights_digest(where: str | Path) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of an exported model's weights."""
    with need_export(where)[1].open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


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
    path = Path(file)
    if file.startswith(PRETRAINED):
        path = need_export(file)[1]
    elif is_uri(file):
        path = fetched(file.rpartition("/")[0]) / WEIGHTS
    try:
        with safe_open(str(path), framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read a model from {file}: {error}") from None


def read_config(where: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of an exported model, with overrides. Raises ConfigError if there is none."""
    file = need_export(where)[0]
    config, modalities = configuration.load_saved(file, overrides), {}
    for name, options in config.modalities.items():  # published models hold the folders that they need
        held = {key: getattr(options, key) for key in options.folders if getattr(options, key)}
        found = {key: str(file.parent / folder) for key, folder in held.items()}
        modalities[name] = dataclasses.replace(options, **found)
    return dataclasses.replace(config, modalities=modalities)


def load_export(folder: str | Path, device: str = "cpu", config: Config | None = None) -> Generator:
    """Return the exported model in a folder, at a URI, or `pretrained:NAME`, a shipped one.

    config: in place of its own, one that differs in nothing that the weights depend on. Raises ConfigError
    where there is no exported model.
    """
    config = config or read_config(folder)
    denoiser = build_denoiser(config)
    denoiser.load_state_dict(tensors_in(str(need_export(folder)[1])))
    return Generator(config, denoiser.to(device))
