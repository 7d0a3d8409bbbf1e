"""Measure the models that part 3 brought back, on this machine: LPIPS inside the holes, IoU of masks.

    .venv/bin/python -m benchmarks.gpu.measure OUT [CELL ...] [--rows N] [--to FOLDER]

OUT: the results of run.sh. Prints a table and writes FOLDER/measured.json (by default in OUT).
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from benchmarks.gpu.cells import CELLS, Cell
from benchmarks.gpu.shared import read_config
from mmdiff_ray.config import Config
from mmdiff_ray.distributed.evaluate import measure, plain
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.experiments.parts import Measure
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.sampling.export import save_export
from mmdiff_ray.training.checkpoint import write_json

MEASURES = {
    "masked_image": ("blocks 30 %", "blocks 50 %"),
    "image_mask": ("masks from images", "masks from images, one pass"),
}
SHOWN = (
    "lpips_hole",
    "lpips_hole_likely",
    "alpha/iou",
    "alpha/iou_likely",
    "palette/miou",
    "palette/miou_likely",
)


def export(tensors: dict[str, Tensor], config: Config, folder: Path) -> None:
    """Write a cell's model as a run's export."""
    denoiser = build_denoiser(config)
    whole = denoiser.state_dict()
    denoiser.load_state_dict({name: value.to(whole[name].dtype) for name, value in tensors.items()})
    save_export(folder / "export", config, denoiser, {})


def measure_cell(cell: Cell, tensors: dict[str, Tensor], rows: int | None, tiny: bool) -> list[dict]:
    """Return the figures of a cell under its experiment's measures."""
    config = read_config(cell.config, tiny)
    name = cell.experiment or cell.table
    experiment = load_experiment(name, "small")
    method = experiment.methods[cell.method]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        export(tensors, config, Path(folder))
        for wanted in measures(experiment.measures_of(method), MEASURES[name]):
            evaluated = experiment.evaluation_config(config, method, wanted)
            if rows is not None:
                evaluated = dataclasses.replace(
                    evaluated, evaluate=dataclasses.replace(evaluated.evaluate, rows=rows)
                )
            for figure in measure(Path(folder), evaluated).figures:
                found.append({"cell": cell.name, "measure": wanted.name, **plain(figure)})
    return found


def measures(of_method: Sequence[Measure], wanted: Sequence[str]) -> list[Measure]:
    """Return the wanted ones of a method's measures."""
    return [measure for measure in of_method if measure.name in wanted]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure cells and print what matters most."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("cells", nargs="*", help=", ".join(CELLS))
    parser.add_argument("--rows", type=int, help="held-out rows, at most")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--tiny", action="store_true", help="the results are of a tiny run")
    given = parser.parse_args(arguments)
    found = []
    with safe_open(str(given.out / "exports.safetensors"), "pt") as exports:
        samples = json.loads(exports.metadata()["samples"])
        keys = list(exports.keys())
        for cell in CELLS.values():
            own = [key for key in keys if key.startswith(f"{cell.name}/")]
            if not own or (given.cells and cell.name not in given.cells):
                continue
            tensors = {key.removeprefix(f"{cell.name}/"): exports.get_tensor(key) for key in own}
            figures = measure_cell(cell, tensors, given.rows, given.tiny)
            for figure in figures:
                if figure["key"].endswith(SHOWN):
                    place = f"{cell.name:30}{samples[cell.table]:>10,}  {figure['measure']:30}"
                    print(f"{place}{figure['key']:32}{figure['value']:.4f}")
            found += figures
    write_json((given.to or given.out) / "measured.json", {"samples": samples, "figures": found})


if __name__ == "__main__":
    main()
