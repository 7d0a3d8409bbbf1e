"""MLflow records of a run that are not sent yet.

The log is in the run's folder. For a run in object storage, that folder is on one machine, which may go away.
So unsent records move to `records/` in storage, and the next sender on any machine takes them from there.
"""

import dataclasses
import json
import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from mmdiff_ray.config import ConfigError, RunError, UnreachableError
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.storage.filesystem import is_uri, join
from mmdiff_ray.storage.mirror import Mirror
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.provenance import JOB_VARIABLE
from mmdiff_ray.tracking.run_life import is_local
from mmdiff_ray.tracking.sender import Replayed, replay
from mmdiff_ray.tracking.tracker import Tracker

RECORDS = "records"
_log = logging.getLogger(__name__)


def root(folder: Path) -> Path:
    """Return the folder of a run's log."""
    return folder / "tracking"


def store_unsent(folder: Path, mirror: Mirror | None) -> list[str]:
    """Move a run's unsent records to object storage; return the names of those that could not be moved.

    Does not move records while another thread or process sends them.
    """
    if mirror is None:
        return []
    name = f"{RECORDS}/{time.time_ns():020d}-{secrets.token_hex(4)}"
    is_moved = Log(root(folder)).move_unsent(folder / name)
    if (folder / name).is_dir():
        mirror.send(name)
    left = [name for name in mirror.flush() if name.startswith(f"{RECORDS}/")]
    return left if is_moved else [root(folder).name, *left]


def fetch_unsent(folder: Path, mirror: Mirror | None) -> None:
    """Move the records of a run or sweep from object storage to its local log, if storage answers."""
    file = next((file for name in (runs.RUN, runs.SWEEP) if (file := folder / name).is_file()), None)
    if mirror is None or file is None:
        return
    facts = json.loads(file.read_text(encoding="utf8"))
    try:
        for name in sorted({file.partition("/")[0] for file in mirror.files(RECORDS)}):
            mirror.take(f"{RECORDS}/{name}", root(folder) / name)
    except (OSError, RunError, UnreachableError) as error:
        _log.warning("records of the run remain in %s: %s", join(mirror.uri, RECORDS), error)
    Log(root(folder), {"uri": facts["tracking_uri"], "run_id": facts["run_id"]})  # merges them


def finish(folder: Path, say: Callable[[str], None]) -> bool:
    """Send a run's records to MLflow and its files to storage, and report anything unsent.

    Returns whether all is sent. Unsent records of a run that started without MLflow count as sent.
    """
    mirror, run = runs.mirror_of(folder), jobs.read_run(folder)
    fetch_unsent(folder, mirror)
    if not Log(root(folder)).all_sent:
        Tracker(run["tracking_uri"], run["run_id"], root(folder)).finish(say=say)
    if left := Log(root(folder)).waiting:
        store_unsent(folder, mirror)
        say(advice(folder, left))
    if unsent := mirror.flush() if mirror is not None else []:
        say(runs.not_sent(runs.address(folder), folder, unsent))
    return not unsent and (not left or is_local(run["run_id"]))


def advice(folder: Path, left: int) -> str:
    """Return the message about unsent records: how many, where, and the command that sends them."""
    address = runs.address(folder)
    place = join(address, RECORDS) if is_uri(address) else str(root(folder))
    sync = f"mmdiff sync {shlex.quote(address)}"
    elsewhere = f"; from elsewhere: mmdiff submit -- {sync.removeprefix('mmdiff ')}"
    message = f"in {place}: {left} records wait for MLflow; send them with: {sync}"
    return message + (elsewhere if os.environ.get(JOB_VARIABLE) else "")


def send(where: str) -> Replayed:
    """Send the records of the run at an address; keep what MLflow does not accept."""
    if not is_uri(where):
        return replay(root(Path(where)))
    folder = runs.open_run(where, (*runs.SMALL, runs.SWEEP))
    mirror = runs.mirror_of(folder)
    fetch_unsent(folder, mirror)
    result = replay(root(folder))
    unsent = store_unsent(folder, mirror)
    if unsent:
        print(runs.not_sent(where, folder, unsent))
    return dataclasses.replace(result, waiting=result.waiting + len(unsent))


def sync(where: str) -> int:
    """Send the records of a run, of a sweep, or of all runs at an address; return 1 if some are unsent.

    Raises ConfigError if there is no such folder or run.
    """
    if is_uri(where):
        addresses = runs.addresses(where)
    elif Path(where).is_dir():
        addresses = sorted(str(log.parent) for log in Path(where).rglob("tracking") if log.is_dir())
    else:
        raise ConfigError(f"no folder {where}; pass the folder or URI of a run or of all runs")
    waiting = 0
    for address in addresses:
        result = send(address)
        waiting += result.waiting
        if result.sent or result.waiting:
            print(f"{address}: {result}")
    print(f"unsent records are kept; retry: mmdiff sync {where}" if waiting else "all records are in MLflow")
    return 1 if waiting else 0
