"""What a sweep keeps of every trial beside its run: values, reports, changes on the way, how it ended."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmdiff_ray.training.checkpoint import write_json


@dataclass
class Trial:
    """One trial.

    number: from 0. values: swept key -> value, as it began. reports: `samples` and `figures`, in order.
    changes: `at`, `values` and `source`, the trial that the state before was copied from (population based
    training). outcome: None while it trains; finished, with all its samples; stopped, by the scheduler or the
    budget; diverged, not finite; failed. why: in words, where it went wrong.
    """

    number: int
    values: dict[str, Any]
    run_id: str = ""
    reports: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    outcome: str | None = None
    why: str = ""

    @property
    def samples(self) -> int:
        """Return the samples seen at the last report."""
        return self.reports[-1]["samples"] if self.reports else 0

    @property
    def now(self) -> dict[str, Any]:
        """Return the swept values in force."""
        values = dict(self.values)
        for change in self.changes:
            values |= change["values"]
        return values


def trial_folder(sweep: Path, number: int) -> Path:
    """Return the folder of a trial, which is that of its run."""
    return sweep / "trials" / f"{number:04d}"


def read_trial(sweep: Path, number: int) -> Trial | None:
    """Return a trial, or None where it has not begun."""
    file = trial_folder(sweep, number) / "trial.json"
    return Trial(**json.loads(file.read_text(encoding="utf8"))) if file.is_file() else None


def write_trial(sweep: Path, trial: Trial) -> None:
    """Write a trial beside its run."""
    write_json(trial_folder(sweep, trial.number) / "trial.json", asdict(trial))


def number_of(sweep: Path, tune_id: str, number: int) -> int:
    """Return the number of the trial that Ray Tune calls `tune_id`; the one given counts where it is new.

    A member of a population that copies another is told the other's configuration, number and all.
    """
    file = sweep / "ids" / tune_id
    if not file.is_file():
        write_json(file, number)
    return int(json.loads(file.read_text(encoding="utf8")))


def read_trials(sweep: Path) -> Iterator[Trial]:
    """Yield the trials that have begun, by number."""
    for file in sorted(sweep.glob("trials/*/trial.json")):
        yield Trial(**json.loads(file.read_text(encoding="utf8")))
