"""A Ray Tune callback that shows the progress of trials and closes those that end."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback

from mmdiff_ray.distributed.display import duration
from mmdiff_ray.distributed.tune.searcher import SpaceSearcher
from mmdiff_ray.distributed.tune.trial import SCORE, close_run, end_early
from mmdiff_ray.sweeps.journal import Trial, number_of, read_trial, read_trials
from mmdiff_ray.sweeps.spec import Sweep

Say = Callable[[str], None]


class ProgressCallback(Callback):
    """Show the progress of trials, close their journals and runs, and update the searcher."""

    def __init__(
        self, sweep: Sweep, where: str, searcher: SpaceSearcher, say: Say, stopped: Callable[[], bool]
    ) -> None:
        self.sweep, self.where, self.searcher, self.say = sweep, where, searcher, say
        self.stopped = stopped
        self.started = time.monotonic()
        known = [report["figures"] for trial in read_trials(where) for report in trial.reports]
        self.best = max((sweep.sign * figures[sweep.main] for figures in known), default=None)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves a copy, but a sweep resumes from its journals

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        """Print a trial's report."""
        if SCORE not in result:
            return
        value = result[SCORE]
        best = self.best is None or value > self.best
        self.best = value if best else self.best
        self.say(
            f"trial {result['number']}: {self.sweep.main} {self.sweep.sign * value:.4g} at "
            f"{result['samples_seen']:,} samples{', the best so far' if best else ''}"
        )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Close a trial that ended or was stopped."""
        self._end(trial, None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Close a trial that failed for the last time."""
        self._end(trial, str(trial.error_file or "its process died"))

    def _end(self, tune_trial: Any, error: str | None) -> None:
        config = tune_trial.config
        number = number_of(self.where, tune_trial.trial_id, config["number"])
        trial = read_trial(self.where, number)
        if trial is None:
            trial = Trial(number, dict(config["values"]), why="it died before it started")
        if trial.outcome is None and error is None and self.stopped():
            return  # `close` reports it as interrupted
        if trial.outcome is None:
            end_early(self.where, trial, "failed" if error else "stopped", _last_line(error or ""))
        self.searcher.note(trial)
        reason = f": {trial.why}" if trial.why else ""
        self.say(f"trial {number}: {trial.outcome} at {trial.samples:,} samples{reason}")

    def close(self) -> None:
        """Close the runs of interrupted trials and show a summary."""
        trials = list(read_trials(self.where))
        for trial in trials:
            if trial.outcome is None:
                close_run(self.where, trial, "stopped")
                self.say(f"trial {trial.number}: interrupted at {trial.samples:,} samples")
        ended = [trial.outcome or "interrupted" for trial in trials]
        counts = ", ".join(f"{ended.count(kind)} {kind}" for kind in dict.fromkeys(ended))
        self.say(f"{len(ended)} trials in {duration(time.monotonic() - self.started)}: {counts}")


def _last_line(error: str) -> str:
    file = Path(error)
    if file.is_file():
        lines = [line for line in file.read_text(encoding="utf8").splitlines() if line.strip()]
        return lines[-1] if lines else "its process died"
    return error
