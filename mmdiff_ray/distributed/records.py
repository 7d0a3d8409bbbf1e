"""What of a run's records MLflow has not taken: sent at the end, counted, and kept where it is found again.

A spool that nobody sends lies in the run's folder. Where the run is kept in storage, its folder is of one
machine, which may go: the spool is brought to `records/` of the storage, and whoever sends the run's records
next takes it from there.
"""

import dataclasses
import json
import logging
import os
import shlex
from pathlib import Path

from mmdiff_ray.config import RunError, UnreachableError
from mmdiff_ray.data.mirror import Mirror
from mmdiff_ray.data.storage import is_uri, join
from mmdiff_ray.distributed import job as jobs
from mmdiff_ray.distributed import runs
from mmdiff_ray.tracking.jobs import JOB_VARIABLE
from mmdiff_ray.tracking.sender import Replayed, replay
from mmdiff_ray.tracking.spool import Spool, is_held, left_in, waiting
from mmdiff_ray.tracking.tracker import Say, Tracker
from mmdiff_ray.training.remote import STILL_S

PLACE = "records"
TARGET = "target.json"
_log = logging.getLogger(__name__)


def root(folder: Path) -> Path:
    """Return where the spools of a run lie."""
    return folder / "tracking"


def keep(folder: Path, mirror: Mirror | None) -> list[str]:
    """Bring the spools that nobody sends to the storage of a run; return what is not there then.

    A spool that a thread of this process still sends stays.
    """
    if mirror is None:
        return []
    busy = []
    for place in waiting(root(folder)):
        spool = Spool.adopt(place)
        if spool is None:
            busy += [place.relative_to(folder).as_posix()] if is_held(place) else []
            continue
        if len(spool):
            kept = folder / PLACE / place.name
            kept.parent.mkdir(exist_ok=True)
            place.rename(kept)
            mirror.send(f"{PLACE}/{place.name}")
        spool.close()
    return [*busy, *(name for name in mirror.flush(STILL_S) if name.startswith(f"{PLACE}/"))]


def take(folder: Path, mirror: Mirror | None) -> None:
    """Bring the spools here that a run or a sweep has in storage, to be sent. Where that fails, they stay
    there."""
    if mirror is None:
        return
    file = next((file for name in (runs.RUN, runs.SWEEP) if (file := folder / name).is_file()), None)
    if file is None:  # it never began
        return
    uri = json.loads(file.read_text(encoding="utf8"))["tracking_uri"]
    try:
        for name in sorted({file.partition("/")[0] for file in mirror.names(PLACE)}):
            place = root(folder) / name
            if mirror.take(f"{PLACE}/{name}", place):
                target = json.loads((place / TARGET).read_text())
                (place / TARGET).write_text(json.dumps({**target, "uri": uri}))
    except (OSError, RunError, UnreachableError) as error:
        _log.warning("records of the run stay in %s: %s", join(mirror.uri, PLACE), error)


def settle(folder: Path, say: Say) -> int:
    """Send what waits of a run, keep what cannot be sent where it is found again, and return how many records
    wait."""
    mirror, run = runs.mirror_of(folder), jobs.read_run(folder)
    take(folder, mirror)
    if left_in(root(folder)):
        Tracker(run["tracking_uri"], run["run_id"], root(folder)).finish(say=say)
    left = left_in(root(folder))
    if left:
        keep(folder, mirror)
        say(advice(folder, left))
    return left


def advice(folder: Path, left: int) -> str:
    """Return the sentence about records that wait: how many, where, and what sends them."""
    address = runs.address(folder)
    place = join(address, PLACE) if is_uri(address) else str(root(folder))
    words = f"in {place}: {left} records wait for MLflow; send them with: mmdiff sync {shlex.quote(address)}"
    if os.environ.get(JOB_VARIABLE):
        words += f"; from elsewhere: mmdiff submit -- sync {shlex.quote(address)}"
    return words


def sync(where: str) -> int:
    """Send all that waits of a run or a sweep in storage, or of all runs there; return 1 if some still waits.

    Raises ConfigError where there is no such run.
    """
    kept = sum(_sync_run(address) for address in runs.addresses(where))
    print("nothing waits any more" if not kept else f"what waits is safe; try again: mmdiff sync {where}")
    return 1 if kept else 0


def send(where: str) -> Replayed:
    """Send what waits of a run at an address; what still waits of one in storage is kept there."""
    if not is_uri(where):
        return replay(root(Path(where)))
    folder = runs.open_run(where, (*runs.SMALL, runs.SWEEP))
    mirror = runs.mirror_of(folder)
    take(folder, mirror)
    done = replay(root(folder))
    unsent = keep(folder, mirror)
    if unsent:
        print(runs.not_sent(where, folder, unsent))
    return dataclasses.replace(done, waiting=done.waiting + len(unsent))


def _sync_run(address: str) -> int:
    """Send what waits of a run in storage; return how many records still wait."""
    done = send(address)
    if done.sent or done.waiting:
        why = f", {done.waiting} wait: {done.error}" if done.waiting else ""
        print(f"{address}: {done.sent} records sent{why}")
    return done.waiting
