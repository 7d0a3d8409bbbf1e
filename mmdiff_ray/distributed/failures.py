"""Limit on worker failures in a row; Ray Train counts only those of the whole run."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.train import UserCallback

from mmdiff_ray.config import OutageError, RunError


class FailureLimit(UserCallback):
    """End a run after more than `most` failures with no new checkpoint between them.

    Ray Train's controller calls it if a worker fails, but not if the number of workers changes.
    board: the actor that counts failures and receives the events of new checkpoints.
    """

    def __init__(self, board: Any, most: int) -> None:
        self.board = board
        self.most = most

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Count a failure; raise it, which ends the run, if it exceeds the limit."""
        if any(map(_preempted, worker_exceptions.values())):
            return  # the cloud reclaimed the node: no fault of the run
        failure = root_cause(worker_exceptions)
        try:
            ends = ray.get(self.board.failed.remote(failure, self.most))
        except ray.exceptions.RayActorError:  # the driver is gone
            ends = True
        if ends:
            raise failure


def root_cause(failures: Mapping[int, Exception]) -> RunError:
    """Return the error of the first failed worker by rank, without Ray's wrappers.

    An OutageError of any worker comes first: the other workers failed because of it.
    """
    causes = {rank: getattr(cause, "cause", None) or cause for rank, cause in failures.items()}
    for cause in causes.values():
        if isinstance(cause, OutageError):
            return cause
    rank, inner = next(iter(causes.items()))
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return RunError(f"worker {rank} failed: {lines[-1] if lines else type(inner).__name__}")


def _preempted(error: Exception) -> bool:
    return getattr(getattr(error, "health_check_failure", error), "preempted", False)
