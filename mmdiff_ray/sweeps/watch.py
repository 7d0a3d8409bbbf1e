"""What a person sees of a sweep's trials, and what is done with each that ends."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback

from mmdiff_ray.distributed.display import duration
from mmdiff_ray.sweeps.journal import Trial, number_of, read_trial, read_trials
from mmdiff_ray.sweeps.searcher import SpaceSearcher
from mmdiff_ray.sweeps.spec import Sweep
from mmdiff_ray.sweeps.trial import SCORE, give_up, interrupt

Say = Callable[[str], None]


class Watch(Callback):
    """Says what happens to trials, closes their journals and runs, and tells the searcher."""

    def __init__(
        self, sweep: Sweep, where: str, searcher: SpaceSearcher, say: Say, stopped: Callable[[], bool]
    ) -> None:
        self.sweep, self.where, self.searcher, self.say = sweep, where, searcher, say
        self.stopped = stopped
        self.begun = time.monotonic()
        sign = 1 if sweep.metrics[sweep.main] == "max" else -1
        known = [report["figures"] for trial in read_trials(where) for report in trial.reports]
        self.best = max((sign * figures[sweep.main] for figures in known), default=None)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy that nothing is ever restored from: the journals are

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        """Be told of a report by Ray Tune."""
        self.reported(result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Be told by Ray Tune that a trial ended, or was ended."""
        self.ended(self._number(trial), None, trial.config["values"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Be told by Ray Tune that a trial failed for the last time."""
        self.ended(self._number(trial), str(trial.error_file or "its process died"), trial.config["values"])

    def _number(self, trial: Any) -> int:
        return number_of(self.where, trial.trial_id, trial.config["number"])

    def reported(self, result: Mapping[str, Any]) -> None:
        """Say what a trial reported."""
        if SCORE not in result:
            return
        sign = 1 if self.sweep.metrics[self.sweep.main] == "max" else -1
        value = result[SCORE]
        best = self.best is None or value > self.best
        self.best = value if best else self.best
        self.say(
            f"trial {result['number']}: {self.sweep.main} {sign * value:.4g} at {result['samples_seen']:,} "
            f"samples{', the best so far' if best else ''}"
        )

    def ended(self, number: int, error: str | None, values: Mapping[str, Any]) -> None:
        """Close a trial that Tune is done with. values: as it was to begin, should it have died before."""
        trial = read_trial(self.where, number)
        if trial is None:
            trial = Trial(number, dict(values), why="it died before it began")
        if trial.outcome is None and error is None and self.stopped():
            return  # `close` says so
        if trial.outcome is None:
            if error is None:
                give_up(self.where, trial, "stopped")
            else:
                give_up(self.where, trial, "failed", _last_line(error))
        self.searcher.note(trial)
        why = f": {trial.why}" if trial.why else ""
        self.say(f"trial {number}: {trial.outcome} at {trial.samples:,} samples{why}")

    def close(self) -> None:
        """Close the runs of trials that were cut short, and say how it went."""
        trials = list(read_trials(self.where))
        for trial in trials:
            if trial.outcome is None:
                interrupt(self.where, trial)
                self.say(f"trial {trial.number}: interrupted at {trial.samples:,} samples")
        ended = [trial.outcome or "interrupted" for trial in trials]
        counts = ", ".join(f"{ended.count(kind)} {kind}" for kind in dict.fromkeys(ended))
        self.say(f"{len(ended)} trials in {duration(time.monotonic() - self.begun)}: {counts}")


def _last_line(error: str) -> str:
    file = Path(error)
    if file.is_file():
        lines = [line for line in file.read_text(encoding="utf8").splitlines() if line.strip()]
        return lines[-1] if lines else "its process died"
    return error
