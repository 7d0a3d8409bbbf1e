"""Run functions as Ray tasks, as many at once as the cluster fits."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mmdiff_ray.config import ConfigError
from mmdiff_ray.distributed.cluster import cluster


def run_tasks(
    function: Callable[..., Any],
    calls: Mapping[str, Sequence[Any]],
    cpus: float,
    gpus: float,
    first: Sequence[str] = (),
    poll_s: float = 2.0,
) -> Iterator[tuple[str, Any] | None]:
    """Run `function(*arguments)` for every call; yield (key, what it returned or raised) as they end.

    Yields None every `poll_s` seconds while no task ends. A task whose worker dies is retried once.

    calls: key -> arguments. first: keys whose tasks must end before any other starts.
    Raises ConfigError if the cluster is too small for one task.
    """
    import ray

    with cluster(os.cpu_count() or 1):
        _check_fits(cpus, gpus)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_called)
        folder = os.getcwd()
        waiting = {task.remote(folder, function, calls[key]): key for key in first}
        before = list(waiting)  # Ray starts a task after its arguments are ready
        waiting |= {
            task.remote(folder, function, arguments, *before): key
            for key, arguments in calls.items()
            if key not in first
        }
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=poll_s)
            for reference in ready:
                yield waiting.pop(reference), _outcome(reference)
            if not ready:
                yield None


def _called(folder: str, function: Callable[..., Any], arguments: Sequence[Any], *before: Any) -> Any:
    """Call a function in the driver's folder. Returns its error: tasks that wait for this one must run."""
    os.chdir(folder)
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _outcome(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return error


def _check_fits(cpus: float, gpus: float) -> None:
    import ray

    total = ray.cluster_resources()
    for resource, wanted in (("CPU", cpus), ("GPU", gpus)):
        if wanted > total.get(resource, 0):
            raise ConfigError(
                f"a task needs {wanted:g} {resource}s, the cluster has {total.get(resource, 0):g}"
            )
