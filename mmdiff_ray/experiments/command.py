"""The command that runs an experiment, with what it prints."""

from collections.abc import Sequence
from pathlib import Path

from mmdiff_ray.distributed.display import make_console
from mmdiff_ray.experiments.files import result_of
from mmdiff_ray.experiments.runner import restore, run_experiment, write_result
from mmdiff_ray.experiments.spec import Experiment


def run(
    experiment: Experiment, runs: Path, out: Path | None, table: bool, only: Sequence[str] = ("*",)
) -> int:
    """Run an experiment, or only write its table again, and say where it is.

    out: the place of the result, or its table or page. only: patterns of the cells to run (`ours-*`, `*-0`);
    the table is of all that are there.
    """
    console = make_console()
    preset = experiment.preset.name
    default = {"small": Path("results") / experiment.name, "smoke": runs / experiment.name}
    target = result_of(out) if out else default.get(preset, Path("results") / f"{experiment.name}-{preset}")

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    if table:
        restore(experiment, runs, target, say)
        page = write_result(experiment, runs, target, say)[0]
    else:
        cells = experiment.matching(only)
        say(f"{experiment.title}: {len(experiment.methods)} methods, {len(cells)} models to train")
        page = run_experiment(experiment, runs, target, say, cells)
    console.print(page.read_text(encoding="utf8"), soft_wrap=True)
    return 0
