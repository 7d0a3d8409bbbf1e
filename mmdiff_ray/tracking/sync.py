"""Send what runs have recorded while MLflow was away."""

from pathlib import Path

from mmdiff_ray.config import ConfigError
from mmdiff_ray.tracking.sender import Replayed, replay


def sync(folder: Path) -> int:
    """Send all that waits in a run's folder, or in the runs of a folder; return 1 if some still waits.

    Raises ConfigError where there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; give that of a run, or of all runs")
    kept = 0
    for root in sorted(path for path in folder.rglob("tracking") if path.is_dir()):
        if any(root.glob("log.jsonl")) or any(root.glob("[0-9]*-*/")):
            done = replay(root)
            kept += done.waiting
            report(str(root.parent), done)
    print("nothing waits any more" if not kept else "what waits is safe; try again: mmdiff sync")
    return 1 if kept else 0


def report(run: str, done: Replayed) -> None:
    """Print what was done for a run, if there was anything to do."""
    if done.sent or done.waiting:
        waiting = (
            f", {done.waiting} wait: {done.error or 'another process is sending'}" if done.waiting else ""
        )
        aside = f", {done.refused} of them refused, see {done.root}/refused.jsonl" if done.refused else ""
        print(f"{run}: {done.sent} records sent{aside}{waiting}")
