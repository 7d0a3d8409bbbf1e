"""Publish a trained model: a folder for others, with a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmdiff_ray import __version__
from mmdiff_ray import config as configuration
from mmdiff_ray.config import Config, ConfigError, UnreachableError
from mmdiff_ray.data.manifest import Manifest, read_manifest
from mmdiff_ray.evaluation.context import Figure
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.runs.card import model_card
from mmdiff_ray.runs.find import Model
from mmdiff_ray.sampling.export import (
    LAYOUTS,
    complete_folder,
    need_export,
    read_config,
    tensors_in,
)

FORMATS = ("safetensors", "diffusers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRIVATE = ("runs", "data", "checkpoint", "workers", "tracking")
"""Sections of a configuration that say where a run was trained, not what the model is."""
CODE = {
    name: f"from mmdiff_ray.sampling.diffusers_pipeline import {cls}  # noqa: F401\n"
    for name, cls in (("pipeline.py", "MMDiffPipeline"), ("denoiser/modeling.py", "MMDiffDenoiser"))
}
"""What `DiffusionPipeline.from_pretrained` imports from a folder in the format `diffusers`."""


def publish(
    model: Model, out: Path, form: str = "safetensors", dtype: str = "float32", licence: str = ""
) -> Path:
    """Write a model as a folder for others and return it: config.json, weights and a model card, README.md.

    It loads without Ray, MLflow or the data. form: one of FORMATS; dtype: of the parameters in the file, one
    of DTYPES; licence: of the weights, an SPDX name. Raises ConfigError where the folder is not empty.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; use a new folder")
    config, manifests = read_config(model.where), _manifests(model)
    denoiser = build_denoiser(config)
    names = {name for name, _ in denoiser.named_parameters()}
    tensors = {
        name: value.to(DTYPES[dtype]) if name in names else value
        for name, value in tensors_in(str(need_export(model.where)[1])).items()
    }
    about: dict[str, Any] = {
        "mmdiff_ray": __version__,
        "name": model.name,
        "samples_seen": model.samples_seen,
        "data": [
            {"name": one.name, "description": one.description, "credit": one.credit, "digest": one.digest}
            for one in manifests
        ],
        "config": _public(config),
    }
    card = model_card(
        config, about, sum(tensors[name].numel() for name in names), _figures(model), out.name, form, licence
    )
    with complete_folder(out) as partial:
        saved, weights = (partial / name for name in LAYOUTS[2 if form == "diffusers" else 1])
        saved.parent.mkdir(exist_ok=True)
        if form == "diffusers":
            index = {
                "_class_name": ["pipeline", "MMDiffPipeline"],
                "_diffusers_version": "0.30.0",
                "denoiser": ["modeling", "MMDiffDenoiser"],
            }
            (partial / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf8")
            for name, code in CODE.items():
                (partial / name).write_text(code, encoding="utf8")
            about = {"_class_name": "MMDiffDenoiser", **about}
        save_file(tensors, str(weights), {"format": "pt"})
        for name, options in config.modalities.items():
            for key in filter(lambda key: getattr(options, key), options.folders):
                about["config"]["modalities"][name][key] = f"{name}_{key}"
                (saved.parent / f"{name}_{key}").mkdir()
                for file in options.folders[key]:
                    shutil.copyfile(Path(getattr(options, key)) / file, saved.parent / f"{name}_{key}" / file)
        saved.write_text(json.dumps(about, indent=1), encoding="utf8")
        (partial / "README.md").write_text(card, encoding="utf8")
    return out


def _manifests(model: Model) -> list[Manifest]:
    """Return the manifests of a run's data; none where they are out of reach."""
    try:
        return [read_manifest(source.uri) for source in read_config(model.where).data.sources]
    except (ConfigError, UnreachableError):
        return []


def _figures(model: Model) -> list[Figure]:
    """Return the figures that a run has of its model."""
    file = model.run and model.run / "evaluation.json"
    if file is None or not file.is_file():
        return []
    return [Figure(**values) for values in json.loads(file.read_text(encoding="utf8"))["figures"]]


def _public(config: Config) -> dict[str, Any]:
    """Return the plain values of a configuration without addresses of this machine."""
    plain = configuration.to_plain(config)
    plain["train"]["init"] = plain["evaluate"]["judge"] = None
    return {key: value for key, value in plain.items() if key not in PRIVATE}
