"""Functions run as Ray tasks, as many at once as the cluster holds."""

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

    Between ends None is yielded every `poll_s` seconds. calls: key -> arguments; first: keys that have to end
    before any other starts. A task whose worker dies is tried once more. Raises ConfigError where the cluster
    is too small for one of them.
    """
    import ray

    with cluster(os.cpu_count() or 1):
        _check_fits(cpus, gpus)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_called)
        folder = os.getcwd()
        waiting = {task.remote(folder, function, calls[key]): key for key in first}
        before = list(waiting)  # what a task is given, it waits for
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
    """Call a function where its driver is; a failure is an outcome, so that others do not wait in vain."""
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
