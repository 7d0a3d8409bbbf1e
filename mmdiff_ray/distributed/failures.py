"""When a run gives up: after failures of its workers in a row, with no progress between."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.train import UserCallback

from mmdiff_ray.config import OutageError, RunError


class FailureLimit(UserCallback):
    """Ends a run after more than `most` failures with no new checkpoint between. Ray Train's controller calls
    it where a worker failed; a change of the number of workers is no failure.

    board: counts, and hears of new checkpoints.
    """

    def __init__(self, board: Any, most: int) -> None:
        self.board = board
        self.most = most

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Count a failure, and end the run by raising it where it is one too many."""
        if any(map(_preempted, worker_exceptions.values())):
            return  # the node was reclaimed with notice, which says nothing of the run
        failure = in_words(worker_exceptions)
        try:
            ends = ray.get(self.board.failed.remote(failure, self.most))
        except ray.exceptions.RayActorError:  # nobody listens to the run any more
            ends = True
        if ends:
            raise failure


def in_words(failures: Mapping[int, Exception]) -> RunError:
    """Return what the first of the failed workers raised, by rank, without Ray's layers around it; an outage
    of storage that one had, since the others failed because that one did."""
    causes = {rank: getattr(cause, "cause", None) or cause for rank, cause in failures.items()}
    for cause in causes.values():
        if isinstance(cause, OutageError):
            return cause
    rank, inner = next(iter(causes.items()))
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return RunError(f"worker {rank} failed: {lines[-1] if lines else type(inner).__name__}")


def _preempted(error: Exception) -> bool:
    return getattr(getattr(error, "health_check_failure", error), "preempted", False)
