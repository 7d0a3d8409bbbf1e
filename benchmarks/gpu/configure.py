"""Make the resolved configurations in `configs/` (JSON), which need neither omegaconf nor a data set to load.

    .venv/bin/python -m benchmarks.gpu.configure

Run it from the repository root after the experiments or the configuration's keys have changed, and commit the
result. SCIENCE below holds the overrides of all cells.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import CELLS
from benchmarks.gpu.shared import CONFIGS, HERE
from mmdiff_ray import config as configuration
from mmdiff_ray import registry
from mmdiff_ray.config import Config
from mmdiff_ray.data.check import read_sources
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.experiments.spec import Cell as ExperimentCell
from mmdiff_ray.runs.job import fit

ROWS = HERE.relative_to(Path.cwd()) / "rows"
SCIENCE = (
    "given.input=in_place",
    "loss.normalize=expected",
    f"data.sources=[{{uri: {ROWS}}}]",
    "space.height=32",
    "space.width=32",
    "train.samples=100000000",  # the time limit ends a cell, after a whole number of milestones
    "train.global_batch=256",
    "train.learning_rate=3e-3",
    "train.decay=constant",
    "train.warmup_samples=25600",
    "train.ema_samples=10000000",  # the half-life is then a tenth of the samples seen
    "train.log_every_samples=25600",
    "train.precision=bfloat16",
    "train.compile=true",
    "workers.threads=null",
    "evaluate.evaluators=[]",
)
UNET = (
    "train.precision=bfloat16",
    "train.compile=true",
    "evaluate.evaluators=[]",
    "workers.count=0",
    "train.samples=100000000",
)
EMBEDDINGS = {"look": {"kind": "embedding", "dim": 1280}, "caption": {"kind": "embedding", "dim": 384}}
"""What the manifest of the whole OpenMoji data set says of the columns that `rows/` lacks."""
LATENT = {
    "name": "latent",
    "space": {"height": 32, "width": 32, "anchor": "latent"},
    "modalities": {
        "latent": {"type": "latent", "mean": [0.0] * 4, "deviation": [1.0] * 4},
        "kind": {"type": "label", "classes": 1000},
    },
    "tasks": {"draw": {"roles": {"kind": "given", "latent": "generated"}, "drop": 0.1}},
    "train": {
        "samples": 100_000_000,
        "global_batch": 128,
        "learning_rate": 1e-4,
        "precision": "bfloat16",
        "compile": True,
    },
}
"""Class-conditional diffusion of the latents of 256-pixel images."""


def main() -> None:
    """Write all configurations."""
    for name, config in {**speed(), "correctness": correctness(), **science()}.items():
        text = json.dumps(configuration.to_plain(config), indent=1)
        (CONFIGS / f"{name}.json").write_text(text + "\n", encoding="utf8")


def speed() -> dict[str, Config]:
    """Return the configurations of the speed part."""
    made = {}
    for size, batch in (("small", 128), ("base", 64)):
        file = "pipelines/configs/openmoji_gpu.yaml"
        overrides = [
            *UNET,
            f"model.preset={size}",
            f"train.global_batch={batch}",
            f"data.sources=[{{uri: {ROWS}}}]",
        ]
        made[f"unet_{size}"] = with_columns(configuration.load([file], overrides))
    for preset in ("base", "xlarge"):
        model = {"model": {"backbone": "dit", "preset": preset}}
        made[f"dit_{preset}"] = configuration.load(base={**LATENT, **model})
    return made


def with_columns(config: Config) -> Config:
    """Return a configuration with what the OpenMoji data set says of its columns."""
    columns: Mapping[str, Mapping[str, Any]] = {**read_sources(config)[0].columns, **EMBEDDINGS}
    modalities = {
        name: registry.look_up("modality", options.type).resolve(name, options, columns)
        for name, options in config.modalities.items()
    }
    return dataclasses.replace(config, modalities=modalities)


def correctness() -> Config:
    """Return the configuration whose losses are compared: images, masks, categories and masked images."""
    file = "pipelines/configs/openmoji_gpu.yaml"
    overrides = [
        *SCIENCE,
        *(
            "modalities.look=null",
            "modalities.caption=null",
            "modalities.masked.ratio=[0.1, 0.9]",
            "train.precision=float32",
            "train.compile=false",
        ),
        *("model.preset=tiny", "train.global_batch=64", "train.warmup_samples=64"),
        *("workers.count=0", "train.learning_rate=1e-3"),
    ]
    config = configuration.load([file], overrides)
    return fit(config, read_sources(config))[0]


def science() -> dict[str, Config]:
    """Return the configurations of the cells."""
    made = {}
    for cell in CELLS.values():
        experiment = load_experiment(cell.experiment or cell.table, "small")
        plain = configuration.to_plain(
            experiment.config(ExperimentCell(experiment.methods[cell.method], 0), Path("runs"))
        )
        config = configuration.load(base=plain, overrides=SCIENCE)
        made[cell.config] = fit(config, read_sources(config))[0]
    return made


if __name__ == "__main__":
    main()
