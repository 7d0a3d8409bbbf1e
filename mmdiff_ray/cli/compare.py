"""`mmdiff compare`: runs side by side."""

import argparse
from pathlib import Path

from mmdiff_ray.cli.common import RUNS, Commands, command
from mmdiff_ray.config import ConfigError


def add(commands: Commands) -> None:
    """Add `compare`."""
    compare = command(
        commands,
        "compare",
        "show figures, settings and samples of several runs side by side",
        "mmdiff compare demo demo-2",
        _compare,
        _check,
    )
    compare.add_argument("models", nargs="+", metavar="RUN", help="runs' names, folders or URIs; two or more")
    compare.add_argument("--out", type=Path, help="a new folder (default: comparisons/RUN-RUN-...)")
    compare.add_argument("--no-pictures", action="store_true", help="compare figures and settings alone")
    compare.add_argument("--runs", default="runs", help=RUNS)


def _check(given: argparse.Namespace) -> None:
    if len(given.models) < 2:
        raise ConfigError(f"compare needs two runs or more, got {given.models[0]}")


def _compare(given: argparse.Namespace) -> int:
    from rich.box import SIMPLE
    from rich.table import Table

    from mmdiff_ray.distributed.display import make_console
    from mmdiff_ray.evaluation.gallery import free_folder
    from mmdiff_ray.runs.compare import cells, compare_configs, compare_figures, compare_pictures, write_page
    from mmdiff_ray.runs.find import find_run

    console = make_console()
    folders = [find_run(name, given.runs) for name in given.models]
    names = [folder.name for folder in folders]
    lines, settings = compare_figures(folders), compare_configs(folders)
    for heads, rows in (
        (
            ["figure", *names, *(f"{name} - {names[0]}" for name in names[1:])],
            [cells(line) for line in lines],
        ),
        (["key", *names], [[key, *map(str, values)] for key, values in settings.items()]),
    ):
        table = Table(*heads, box=SIMPLE)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for folder in folders:
        if not (folder / "evaluation.json").is_file():
            console.print(f"note: {folder.name} has no figures; measure it by: mmdiff evaluate {folder}")
    pictures = {} if given.no_pictures else compare_pictures(folders)
    out = given.out or free_folder(Path("comparisons") / "-".join(names))
    console.print(f"page  {write_page(out, names, lines, settings, pictures)}", soft_wrap=True)
    return 0
