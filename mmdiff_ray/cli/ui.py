"""`mmdiff ui` and `mmdiff sync`: MLflow on the runs of a folder, and records that it has not got yet."""

import argparse
from pathlib import Path

from mmdiff_ray.cli.common import RUNS, Commands, command


def add(commands: Commands) -> None:
    """Add `ui` and `sync`."""
    ui = command(commands, "ui", "open MLflow on the runs of this folder", "mmdiff ui --port 5000", _ui)
    ui.add_argument("--runs", default="runs", help=RUNS)
    ui.add_argument("--host", default="127.0.0.1")
    ui.add_argument("--port", type=int, default=5000)
    sync = command(
        commands, "sync", "send what runs recorded while MLflow was away", "mmdiff sync runs/demo", _sync
    )
    sync.add_argument(
        "folder", nargs="?", default="runs", help="a run's, or that of all runs, or a URI of either (runs)"
    )


def _ui(given: argparse.Namespace) -> int:
    from mmdiff_ray.tracking.ui import serve

    return serve(given.runs, given.host, given.port)


def _sync(given: argparse.Namespace) -> int:
    if "://" in given.folder:
        from mmdiff_ray.runs import records

        return records.sync(given.folder)
    from mmdiff_ray.tracking.sync import sync

    return sync(Path(given.folder))
