"""Connect to a Ray cluster, or start a local one for one command, and check its resources."""

import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from mmdiff_ray.config import ConfigError, WorkersConfig, without_passwords
from mmdiff_ray.distributed.machine import check_ray_folder, lack_of_shared_memory
from mmdiff_ray.distributed.nodes import Labels, alive, autoscales, fitting, machines, start_nodes
from mmdiff_ray.storage.filesystem import is_uri

_log = logging.getLogger(__name__)


@contextmanager
def cluster(cpus: int = 4) -> Iterator[None]:
    """Provide Ray for the block: the current connection, the cluster at RAY_ADDRESS, or a local cluster.

    A local cluster declares at least `cpus` CPUs even on a smaller machine, so that two workers and their
    data workers fit on a laptop. Workers' output goes to Ray's log files only (`log_folder`).
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS ({without_passwords(address)}) is a dashboard; set the cluster's own address, "
            "HEAD:6379, or unset it (`mmdiff submit` reads RAY_API_SERVER_ADDRESS)"
        )
    if not address:
        check_ray_folder()
        if lack := lack_of_shared_memory():
            _log.warning("%s", lack)
    local: dict[str, Any] = (
        {} if address else {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False}
    )
    for variable in ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_DEDUP_LOGS"):
        os.environ.setdefault(variable, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **local)
        except ConnectionError as error:
            raise ConfigError(f"RAY_ADDRESS ({address}): no Ray cluster answers there: {error}") from None
        except ValueError as error:
            if not address:
                raise
            raise ConfigError(f"RAY_ADDRESS ({address}): {error}; want HEAD:6379, or none") from None
    _log_instead_of_print()
    try:
        with _sigterm_as_interrupt():
            yield
    finally:
        ray.shutdown()


@contextmanager
def resources(workers: WorkersConfig) -> Iterator[None]:
    """Provide a cluster with room for the workers and their data workers; with workers.count=0, nothing.

    Raises ConfigError if the cluster is too small.
    """
    if workers.count == 0:
        yield
        return
    with cluster(cpus_needed(workers)):
        check_resources(workers)
        yield


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM: Ray's own handler on a driver aborts with a stack trace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log_instead_of_print() -> None:
    """Log what Ray prints on a driver's terminal (worker deaths, retries)."""
    try:
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
    except ImportError:  # private API: without it Ray prints its messages
        return
    dispatcher.remove_handler("ray_print_logs")
    dispatcher.add_handler("mmdiff", lambda data: _log.info("%s", "\n".join(map(str, data.get("lines", [])))))


def split_records(store: str, runs: str) -> str:
    """Return a warning if each machine of the cluster would write an SQLite file of its own; else "".

    store: tracking URI. runs: where runs are stored; a folder, and the SQLite file in it, is shared by all
    nodes, object storage is not.
    """
    if not (store.startswith("sqlite:") and is_uri(runs) and len(machines()) > 1):
        return ""
    return (
        f"tracking.uri: {store} is a file, and the cluster has {len(machines())} machines; unless they share "
        "it, metrics are lost or trials fail. Set it to an MLflow server"
    )


def cpus_needed(workers: WorkersConfig) -> int:
    """Return the CPUs that training needs: those of workers and data workers, plus one for the driver."""
    return int(workers.count * (workers.cpus + workers.data_workers)) + 1


def check_resources(workers: WorkersConfig) -> None:
    """Raise ConfigError if the cluster is too small for the workers and their data workers.

    If an autoscaler can start the missing nodes, print a line and wait for them.
    """
    count = workers.least or workers.count
    readers = count * workers.data_workers
    bundles = [workers.per_worker] * count + [{"CPU": 1.0}] * readers
    labels = [workers.labels] * count + [workers.data_labels] * readers
    cpus = "workers.cpus and workers.data_workers" if readers else "workers.cpus"
    wanted: list[tuple[str, str, float, Labels]] = [
        *(
            ("workers.labels", name, count * each, workers.labels)
            for name, each in workers.per_worker.items()
        ),
        ("workers.data_labels", "CPU", readers, workers.data_labels),
        (cpus, "CPU", count * workers.cpus + readers, {}),
        ("workers.gpus", "GPU", count * workers.gpus, {}),
        *(("workers.resources", name, count * each, {}) for name, each in workers.resources.items()),
    ]
    lacks = [
        (key, lack)
        for key, resource, amount, where in wanted
        if (where or "labels" not in key) and (lack := _lack(resource, amount, where))
    ]
    if not lacks and (room := places(workers.per_worker, workers.labels)) < count:
        amounts = " and ".join(amount_of(name, amount) for name, amount in workers.per_worker.items())
        each = "each, " if count > 1 else "on one node, "
        found = f"the nodes have room for {room}" if room else "no node has that many"
        lacks = [(_keys(workers.per_worker), f"{amounts} {each}{found}")]
    need = f"{count} workers need " if count > 1 else "1 worker needs "
    if lacks and not start_nodes(bundles, labels, need + "; ".join(lack for _, lack in lacks)):
        key, lack = lacks[0]
        more = ", and its autoscaler cannot start enough nodes" if autoscales() else ""
        advice = f"; try fewer workers (workers.count={count // 2})" if count > 1 else ""
        raise ConfigError(f"{key}: {need}{lack}{more}{advice}")


def check_labels(labels: Labels) -> None:
    """Raise ConfigError if no node has these labels and no autoscaler could start one."""
    if labels and not fitting(labels) and not autoscales():
        known = ", ".join(
            sorted(
                {
                    f"{key}={value}"
                    for node in alive()
                    for key, value in node["Labels"].items()
                    if not key.startswith("ray.io/node")
                }
            )
        )
        raise ConfigError(f"--label: no node of the cluster has all of {dict(labels)}; there are {known}")


def _lack(resource: str, amount: float, labels: Labels) -> str:
    """Return a message if the nodes with some labels have too little of a resource, else ""."""
    there = sum(node["Resources"].get(resource, 0.0) for node in fitting(labels))
    if amount <= there:
        return ""
    needed = amount_of(resource, amount)
    if not labels:
        return f"{needed}, the cluster has {there:g}"
    selector = ", ".join(f"{name}={value}" for name, value in labels.items())
    return f"{needed} on nodes with the labels {selector}, the cluster has {there:g} there"


def places(asks: Mapping[str, float], labels: Labels = MappingProxyType({})) -> int:
    """Return how many workers fit on the live nodes with some labels; a worker cannot span two nodes."""
    return sum(
        math.floor(min(node["Resources"].get(name, 0.0) / amount for name, amount in asks.items()) + 1e-6)
        for node in fitting(labels)
    )


def _keys(asks: Mapping[str, float]) -> str:
    """Return the configuration keys that set a worker's resources."""
    keys = {"CPU": "workers.cpus", "GPU": "workers.gpus"}
    return ", ".join(dict.fromkeys(keys.get(name, "workers.resources") for name in asks))


def amount_of(resource: str, amount: float) -> str:
    """Format an amount of a Ray resource: "2 CPUs", "2 of `fast_disk`"."""
    if resource in ("CPU", "GPU"):
        return f"{amount:g} {resource}{'' if amount == 1 else 's'}"
    return f"{amount:g} of `{resource}`"


def log_folder() -> str:
    """Return the folder of Ray's log files on this machine."""
    import ray

    node = ray._private.worker._global_node
    return os.path.join(node.get_session_dir_path(), "logs") if node else ""


def this_node() -> dict[str, str]:
    """Return the label selector that places an actor on the node of this process."""
    import ray

    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
