"""What of a run's records MLflow has not taken: sent at the end, counted, and kept where it is found again.

The log of a run lies in the run's folder. Where the run is kept in storage, that folder is of one machine,
which may go: what waits is brought to `records/` of the storage, and whoever sends the run's records next
takes it from there.
"""

import dataclasses
import json
import logging
import os
import secrets
import shlex
import time
from pathlib import Path

from mmdiff_ray.config import RunError, UnreachableError
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.storage.filesystem import is_uri, join
from mmdiff_ray.storage.mirror import Mirror
from mmdiff_ray.tracking.jobs import JOB_VARIABLE
from mmdiff_ray.tracking.log import Log, waiting_in
from mmdiff_ray.tracking.sender import Replayed, replay
from mmdiff_ray.tracking.sync import report
from mmdiff_ray.tracking.tracker import Say, Tracker
from mmdiff_ray.training.remote_checkpoints import STILL_S

PLACE = "records"
_log = logging.getLogger(__name__)


def root(folder: Path) -> Path:
    """Return where the log of a run lies."""
    return folder / "tracking"


def keep(folder: Path, mirror: Mirror | None) -> list[str]:
    """Bring what waits of a run's records to its storage; return what is not there then.

    What a thread is sending at this moment stays.
    """
    if mirror is None:
        return []
    name = f"{PLACE}/{time.time_ns():020d}-{secrets.token_hex(4)}"
    if not Log(root(folder)).pack(folder / name):
        return [root(folder).name, *_unsent(mirror)]
    if (folder / name).is_dir():
        mirror.send(name)
    return _unsent(mirror)


def _unsent(mirror: Mirror) -> list[str]:
    return [name for name in mirror.flush(STILL_S) if name.startswith(f"{PLACE}/")]


def take(folder: Path, mirror: Mirror | None) -> None:
    """Bring the records here that a run or a sweep has in storage, to be sent. Where that fails, they stay
    there."""
    if mirror is None:
        return
    file = next((file for name in (runs.RUN, runs.SWEEP) if (file := folder / name).is_file()), None)
    if file is None:  # it never began
        return
    facts = json.loads(file.read_text(encoding="utf8"))
    try:
        for name in sorted({file.partition("/")[0] for file in mirror.names(PLACE)}):
            mirror.take(f"{PLACE}/{name}", root(folder) / name)
    except (OSError, RunError, UnreachableError) as error:
        _log.warning("records of the run stay in %s: %s", join(mirror.uri, PLACE), error)
    Log(root(folder), {"uri": facts["tracking_uri"], "run_id": facts["run_id"]})  # absorbs them


def settle(folder: Path, say: Say) -> int:
    """Send what waits of a run, keep what cannot be sent where it is found again, and return how many records
    wait."""
    mirror, run = runs.mirror_of(folder), jobs.read_run(folder)
    take(folder, mirror)
    if waiting_in(root(folder)):
        Tracker(run["tracking_uri"], run["run_id"], root(folder)).finish(say=say)
    left = waiting_in(root(folder))
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
    report(address, done)
    return done.waiting
