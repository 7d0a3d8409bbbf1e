"""`mmdiff export`: a trained model as a folder for others, with a model card."""

import argparse
from pathlib import Path

from mmdiff_ray.cli.common import MODEL, RUNS, Commands, command


def add(commands: Commands) -> None:
    """Add `export`."""
    export = command(
        commands,
        "export",
        "write a trained model as a folder for others: weights, config.json and a model card",
        "mmdiff export demo --out models/demo --license cc-by-4.0",
        _export,
    )
    export.add_argument("model", metavar="RUN", help=MODEL)
    export.add_argument(
        "--format",
        choices=("safetensors", "diffusers"),
        default="safetensors",
        help="diffusers: also for DiffusionPipeline.from_pretrained",
    )
    export.add_argument("--out", type=Path, required=True, help="a new folder")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    export.add_argument("--license", default="", help="of the weights, an SPDX name, for the model card")
    export.add_argument("--runs", default="runs", help=RUNS)


def _export(given: argparse.Namespace) -> int:
    from mmdiff_ray.runs.find import find_model
    from mmdiff_ray.runs.publish import publish

    model = find_model(given.model, given.runs)
    out = publish(model, given.out, given.format, given.dtype, given.license)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {given.format}, {given.dtype}, {size / 1e6:.1f} MB")
    print(f"card     {out / 'README.md'}")
    print(f"next     mmdiff sample {out} --num 16")
    return 0
