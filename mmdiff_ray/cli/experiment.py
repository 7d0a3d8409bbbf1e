"""`mmdiff experiment`: train, measure and compare the methods of a table."""

import argparse
import dataclasses
from pathlib import Path

from mmdiff_ray.cli.common import Commands, command
from mmdiff_ray.config import ConfigError


def add(commands: Commands) -> None:
    """Add `experiment`."""
    experiment = command(
        commands,
        "experiment",
        "train, measure and compare all methods of a table; run again to resume",
        "mmdiff experiment masked_image --preset smoke",
        _run,
        _check,
    )
    experiment.add_argument("name", help="a name in pipelines/configs/experiments, or a YAML file")
    experiment.add_argument("--preset", default="small", help="size: smoke, small or gpu")
    experiment.add_argument("--runs", default="runs/experiments", help="folder of the cells")
    experiment.add_argument(
        "--out",
        type=Path,
        help="write OUT.md, OUT.json and more (default: results/NAME; in --runs for smoke)",
    )
    experiment.add_argument(
        "--cells",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="run only these, for example ours-* or *-0",
    )
    experiment.add_argument("--table", action="store_true", help="only write the result of finished cells")


def _check(given: argparse.Namespace) -> None:
    from mmdiff_ray.experiments.loading import load_experiment

    if "://" in given.runs:
        raise ConfigError(f"--runs ({given.runs}): must be a folder on a disk that all nodes share")
    load_experiment(given.name, given.preset).select(given.cells)


def _run(given: argparse.Namespace) -> int:
    from mmdiff_ray.datasets.build import build_missing
    from mmdiff_ray.distributed.display import make_console
    from mmdiff_ray.experiments.archive import result_path
    from mmdiff_ray.experiments.loading import load_experiment
    from mmdiff_ray.experiments.runner import restore, run_experiment, write_result

    experiment, runs, console = load_experiment(given.name, given.preset), Path(given.runs), make_console()
    preset = experiment.preset.name
    default = {"small": Path("results") / experiment.name, "smoke": runs / experiment.name}
    out = default.get(preset, Path("results") / f"{experiment.name}-{preset}")
    target = result_path(given.out) if given.out else out

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    if given.table:
        restore(experiment, runs, target, say)
        page = write_result(experiment, runs, target, say)[0]
    else:
        for data in experiment.data_sets():
            build_missing(dataclasses.asdict(data))
        cells = experiment.select(given.cells)
        say(f"{experiment.title}: {len(experiment.methods)} methods, {len(cells)} models to train")
        page = run_experiment(experiment, runs, target, say, cells)
    say(page.read_text(encoding="utf8"))
    return 0
