"""`mmdiff export`: a trained model as a folder for others, with a model card."""

import argparse
from pathlib import Path

from mmdiff_ray.cli.common import Commands, add_model, command, model_of


def add(commands: Commands) -> None:
    """Add `export`."""
    export = command(
        commands,
        "export",
        "write a trained model as a folder for others: weights, config.json and a model card",
        "mmdiff export demo --out models/demo --license cc-by-4.0",
        _export,
    )
    add_model(export)
    export.add_argument(
        "--format",
        choices=("safetensors", "diffusers"),
        default="safetensors",
        help="diffusers: also for DiffusionPipeline.from_pretrained",
    )
    export.add_argument("--out", type=Path, required=True, help="a new folder")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    export.add_argument("--license", default="", help="of the weights, an SPDX name, for the model card")


def _export(given: argparse.Namespace) -> int:
    from mmdiff_ray.runs.publish import publish

    out = publish(model_of(given), given.out, given.format, given.dtype, given.license)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {given.format}, {given.dtype}, {size / 1e6:.1f} MB")
    print(f"card     {out / 'README.md'}")
    print(f"next     mmdiff sample {out} --num 16")
    return 0
