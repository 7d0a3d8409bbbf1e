"""What a sweep keeps of every trial beside its run: values, reports, changes on the way, how it ended.

A sweep lies where its address says, in a folder or in storage; the journals are read and written there and
nowhere else, so that all machines see the same. Where storage does not answer, it is asked again for minutes,
and then all functions raise OutageError.
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

    number: from 0. values: swept key -> value, as it began. reports: `samples` and `figures`, in order.
    changes: `at`, `values` and `source`, the trial that the state before was copied from (population based
    training). outcome: None while it trains; finished, with all its samples; stopped, by the scheduler or the
    budget; diverged, not finite; failed. why: in words, where it went wrong. copied: whose the checkpoints
    are since it copied another, a new name for every copy. copying: `number`, `samples` and `values` of what
    a copy is made of, until it is there whole.
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
        """Return whose checkpoints and model are the trial's."""
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
        """Return the swept values in force."""
        values = dict(self.values)
        for change in self.changes:
            values |= change["values"]
        return values


def trial_address(sweep: str | Path, number: int) -> str:
    """Return where a trial lies, which is where its run does."""
    return join(str(sweep), TRIALS, f"{number:04d}")


def read_trial(sweep: str | Path, number: int) -> Trial | None:
    """Return a trial, or None where it has not begun."""
    text = _read(join(trial_address(sweep, number), FILE))
    return None if text is None else Trial(**json.loads(text))


def write_trial(sweep: str | Path, trial: Trial) -> None:
    """Write a trial beside its run."""
    _write(join(trial_address(sweep, trial.number), FILE), asdict(trial))


def number_of(sweep: str | Path, tune_id: str, number: int) -> int:
    """Return the number of the trial that Ray Tune calls `tune_id`; the one given counts where it is new.

    A member of a population that copies another is told the other's configuration, number and all.
    """
    file = join(str(sweep), "ids", tune_id)
    known = _read(file)
    if known is None:
        _write(file, number)
    return number if known is None else int(json.loads(known))


def read_trials(sweep: str | Path) -> Iterator[Trial]:
    """Yield the trials that have begun, by number."""
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
