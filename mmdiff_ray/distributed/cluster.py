"""The Ray cluster a command runs on: the one at an address, or a quiet local one for as long as it lasts."""

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
    """Provide Ray for the block: the one in use, the one at RAY_ADDRESS, or a local one with at least `cpus`
    CPUs.

    A local cluster counts CPUs by what is asked of it, so that two workers and their readers fit on a laptop.
    Workers' output stays in Ray's log files, whose folder `log_folder` names.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS ({without_passwords(address)}) is the address of a dashboard; want that of the "
            "cluster itself, HEAD:6379, or none. Where `mmdiff submit` sends jobs is RAY_API_SERVER_ADDRESS"
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
    _keep_messages_off_the_terminal()
    try:
        with _sigterm_as_interrupt():
            yield
    finally:
        ray.shutdown()


@contextmanager
def resources(workers: WorkersConfig) -> Iterator[None]:
    """Provide a cluster that can hold the workers and their readers; nothing where there are none.

    Raises ConfigError where it cannot.
    """
    if workers.count == 0:
        yield
        return
    with cluster(cpus_needed(workers)):
        check_resources(workers)
        yield


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does; Ray's own answer on a driver is to abort with a trace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep_messages_off_the_terminal() -> None:
    """Send what the cluster prints on its drivers (worker deaths, retries) to the log instead."""
    try:
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
    except ImportError:  # a private name: without it the messages show, nothing breaks
        return
    dispatcher.remove_handler("ray_print_logs")
    dispatcher.add_handler("mmdiff", lambda data: _log.info("%s", "\n".join(map(str, data.get("lines", [])))))


def split_records(store: str, runs: str) -> str:
    """Return the warning where every machine of the cluster would record into an SQLite file of its own.

    store: MLflow's address. runs: where runs are kept; a folder, and so the file beside it, is of all nodes.
    """
    if not (store.startswith("sqlite:") and is_uri(runs) and len(machines()) > 1):
        return ""
    return (
        f"tracking.uri: {store} is a file, and the cluster has {len(machines())} machines: unless they "
        "share it, each records into one of its own, and figures are missing or trials fail; name a server "
        "(`mlflow server`)"
    )


def cpus_needed(workers: WorkersConfig) -> int:
    """Return the CPUs that training with these workers takes: theirs, their readers', and one for the
    rest."""
    return int(workers.count * (workers.cpus + workers.data_workers)) + 1


def check_resources(workers: WorkersConfig) -> None:
    """Raise ConfigError if the cluster has too little for the workers and their readers, before they are
    asked for.

    Where an autoscaler can start the nodes that are lacking, print so and wait for them.
    """
    count = workers.least or workers.count
    readers = count * workers.data_workers
    bundles = [workers.asks] * count + [{"CPU": 1.0}] * readers
    labels = [workers.labels] * count + [workers.data_labels] * readers
    cpus = "workers.cpus and workers.data_workers" if readers else "workers.cpus"
    wanted: list[tuple[str, str, float, Labels]] = [
        *(("workers.labels", name, count * each, workers.labels) for name, each in workers.asks.items()),
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
    if not lacks and (held := places(workers.asks, workers.labels)) < count:
        asked = " and ".join(amount_of(name, amount) for name, amount in workers.asks.items())
        each = "each, " if count > 1 else "at one place, "
        room = f"the nodes have room for {held}" if held else "no node has so much"
        lacks = [(_keys(workers.asks), f"{asked} {each}{room}")]
    need = f"{count} workers need " if count > 1 else "1 worker needs "
    if lacks and not start_nodes(bundles, labels, need + "; ".join(lack for _, lack in lacks)):
        key, lack = lacks[0]
        more = ", and can start no nodes for them" if autoscales() else ""
        advice = f"; try fewer workers (workers.count={count // 2})" if count > 1 else ""
        raise ConfigError(f"{key}: {need}{lack}{more}{advice}")


def check_labels(labels: Labels) -> None:
    """Raise ConfigError if no node has these labels, and no autoscaler could start one."""
    if labels and not fitting(labels) and not autoscales():
        told = ", ".join(
            sorted(
                {
                    f"{key}={value}"
                    for node in alive()
                    for key, value in node["Labels"].items()
                    if not key.startswith("ray.io/node")
                }
            )
        )
        raise ConfigError(f"--label: no node of the cluster has all of {dict(labels)}; there are {told}")


def _lack(resource: str, amount: float, labels: Labels) -> str:
    """Return in words what the nodes with some labels lack of a resource; nothing where they have enough."""
    there = sum(node["Resources"].get(resource, 0.0) for node in fitting(labels))
    if amount <= there:
        return ""
    needed = amount_of(resource, amount)
    if not labels:
        return f"{needed}, the cluster has {there:g}"
    told = ", ".join(f"{name}={value}" for name, value in labels.items())
    return f"{needed} on nodes with the labels {told}, the cluster has {there:g} there"


def places(asks: Mapping[str, float], labels: Labels = MappingProxyType({})) -> int:
    """Return how many workers the nodes with some labels hold that are up now, each whole on one node."""
    return sum(
        math.floor(min(node["Resources"].get(name, 0.0) / amount for name, amount in asks.items()) + 1e-6)
        for node in fitting(labels)
    )


def _keys(asks: Mapping[str, float]) -> str:
    """Return the keys of a configuration that say what a worker asks for."""
    keys = {"CPU": "workers.cpus", "GPU": "workers.gpus"}
    return ", ".join(dict.fromkeys(keys.get(name, "workers.resources") for name in asks))


def amount_of(resource: str, amount: float) -> str:
    """Return an amount of one of Ray's resources in words: "2 CPUs", "2 of `fast_disk`"."""
    if resource in ("CPU", "GPU"):
        return f"{amount:g} {resource}{'' if amount == 1 else 's'}"
    return f"{amount:g} of `{resource}`"


def log_folder() -> str:
    """Return where Ray keeps the log files of this cluster on this machine."""
    import ray

    node = ray._private.worker._global_node
    return os.path.join(node.get_session_dir_path(), "logs") if node else ""


def this_node() -> dict[str, str]:
    """Return the label by which Ray places an actor on the node of this process."""
    import ray

    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
