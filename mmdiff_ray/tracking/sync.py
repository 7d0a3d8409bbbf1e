"""Send what runs have recorded while MLflow was away."""

from pathlib import Path

from mmdiff_ray.config import ConfigError
from mmdiff_ray.tracking.sender import replay


def sync(folder: Path) -> int:
    """Send all that waits in a run's folder, or in the runs of a folder; return 1 if some still waits.

    What a running process records is left to that process. Raises ConfigError where there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; give that of a run, or of all runs")
    kept = 0
    for root in sorted({lock.parents[1] for lock in folder.rglob("tracking/[0-9]*/lock")}):
        done = replay(root)
        kept += done.waiting
        why = f", {done.waiting} wait: {done.error}" if done.waiting else ""
        print(f"{root.parent}: {done.sent} records sent{why}")
    print("nothing waits any more" if not kept else "what waits is safe; try again: mmdiff sync")
    return 1 if kept else 0
