"""The journal of every trial, saved next to its run: values, reports, changes, outcome.

Journals exist only at the sweep's address, a folder or object storage, so all machines see the same state. If
storage is unavailable, all functions retry for minutes, then raise OutageError.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmdiff_ray.storage.filesystem import filesystem, folders_in, join, read_bytes, write_atomic
from mmdiff_ray.storage.retry import retry

TRIALS = "trials"
FILE = "trial.json"


@dataclass
class Trial:
    """One trial.

    number: from 0.
    values: swept key -> value at the start.
    reports: each with `samples` and `figures`, in order.
    changes: of population based training, each with `at`, `values` and `source`, the trial that was copied.
    outcome: None during training; then `finished`, `stopped` (by scheduler or budget), `diverged` or
    `failed`.
    why: the error message of a diverged or failed trial.
    copied: id of the checkpoints after a copy; every copy gets a new id.
    copying: `number`, `samples` and `values` of a copy in progress.
    """

    number: int
    values: dict[str, Any]
    run_id: str = ""
    reports: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    outcome: str | None = None
    why: str = ""
    copied: str = ""
    copying: dict[str, Any] | None = None

    @property
    def lineage(self) -> str:
        """Return the id that owns the trial's checkpoints and model."""
        return self.copied or self.run_id

    @property
    def samples(self) -> int:
        """Return the samples seen at the last report."""
        return self.reports[-1]["samples"] if self.reports else 0

    @property
    def figures(self) -> dict[str, float]:
        """Return the metrics of the last report."""
        return self.reports[-1]["figures"] if self.reports else {}

    @property
    def now(self) -> dict[str, Any]:
        """Return the current values of the swept keys."""
        values = dict(self.values)
        for change in self.changes:
            values |= change["values"]
        return values


def trial_address(sweep: str | Path, number: int) -> str:
    """Return the address of a trial's run."""
    return join(str(sweep), TRIALS, f"{number:04d}")


def read_trial(sweep: str | Path, number: int) -> Trial | None:
    """Return a trial, or None if it has not started."""
    text = _read(join(trial_address(sweep, number), FILE))
    return None if text is None else Trial(**json.loads(text))


def write_trial(sweep: str | Path, trial: Trial) -> None:
    """Write a trial's journal next to its run."""
    _write(join(trial_address(sweep, trial.number), FILE), asdict(trial))


def number_of(sweep: str | Path, tune_id: str, number: int) -> int:
    """Return the number of the trial with Ray Tune's id `tune_id`; `number` if the id is new.

    The id decides because Tune gives a member that copies another the other's configuration, number included.
    """
    file = join(str(sweep), "ids", tune_id)
    known = _read(file)
    if known is None:
        _write(file, number)
    return number if known is None else int(json.loads(known))


def read_trials(sweep: str | Path) -> Iterator[Trial]:
    """Yield the trials that have started, by number."""
    fs, root = filesystem(join(str(sweep), TRIALS))
    for name in retry(lambda: folders_in(fs, root), f"look into {sweep}"):
        trial = read_trial(sweep, int(name)) if name.isdigit() else None
        if trial is not None:
            yield trial


def _read(file: str) -> bytes | None:
    fs, path = filesystem(file)
    try:
        return retry(lambda: read_bytes(fs, path), f"read {file}")
    except FileNotFoundError:
        return None


def _write(file: str, value: Any) -> None:
    fs, path = filesystem(file)
    data = json.dumps(value, indent=1).encode()
    retry(lambda: write_atomic(fs, path, data), f"write {file}")
