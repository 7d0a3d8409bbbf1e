"""A real Ray cluster on this machine: a head and workers by `ray start`, with a token; no other Ray is
touched."""

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.distributed import processes
from mmdiff_ray.distributed.processes import Known

FOLDER = Path(".cluster")
STATE = "cluster.json"
TOKEN = "token"
MARK = "MMDIFF_CLUSTER"
"""The variable that all processes of a cluster inherit, with the cluster's name."""
HOST = "127.0.0.1"
NOT_INHERITED = ("RAY_", "MLFLOW_", "AWS_", "PYTHONPATH")
UP_S = 120.0
ATTEMPTS = 3
END_S = 15.0
POLL_S = 0.5
STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class LocalCluster:
    """What it takes to talk to a cluster of this machine, and to end it.

    address: of the dashboard and the job server; processes: (process id, time of its start) of each node,
    the head first; temp: where Ray keeps its sessions.
    """

    name: str
    address: str
    gcs: str
    token_path: str
    temp: str
    workers: int
    processes: tuple[Known, ...] = ()


def read(folder: Path = FOLDER) -> LocalCluster | None:
    """Return the cluster that `up` noted in a folder, which may have ended since; None where none is."""
    try:
        plain = json.loads((folder / STATE).read_text(encoding="utf8"))
        return LocalCluster(**plain | {"processes": tuple(map(tuple, plain["processes"]))})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def is_up(cluster: LocalCluster) -> bool:
    """Return whether all nodes that were started still run; a process that took over an id does not count."""
    return len(cluster.processes) == 1 + cluster.workers and all(map(processes.find, cluster.processes))


def up(workers: int, cpus: int, folder: Path = FOLDER) -> tuple[LocalCluster, bool]:
    """Start a cluster and return it, and whether it was started now: one that is up already stays as it is.

    What a killed machine or an interrupted start left is cleared first. Raises RunError where Ray does not
    come up, with its last words; nothing is left running then.
    """
    if workers < 1 or cpus < 1:
        raise ConfigError(f"--workers ({workers}) and --cpus ({cpus}) must be at least 1")
    with _locked(folder):
        known = read(folder)
        if known is not None and is_up(known):
            return known, False
        if known is not None:
            _clear(known, folder)
        return _start(workers, cpus, folder), True


def down(folder: Path = FOLDER) -> LocalCluster | None:
    """End the cluster of a folder, all its processes and no others, and return it; None where none is."""
    if not folder.is_dir():
        return None
    with _locked(folder):
        known = read(folder)
        if known is not None:
            _clear(known, folder)
        return known


def token(cluster: LocalCluster) -> str:
    """Return the cluster's token."""
    return Path(cluster.token_path).read_text(encoding="utf8").strip()


def describe(cluster: LocalCluster) -> str:
    """Return where a cluster is and what to do with it."""
    return f"""dashboard  {cluster.address} (token: {cluster.token_path})
next       mmdiff submit -- train pipelines/configs/demo.yaml
           mmdiff jobs list
           mmdiff jobs logs --follow ID
           mmdiff cluster down"""


def state(folder: Path = FOLDER) -> tuple[str, bool]:
    """Return in words whether the cluster of a folder is up, and whether all of it is."""
    cluster = read(folder)
    if cluster is None:
        return "there is no cluster in this folder; start one: mmdiff cluster up", False
    wanted, found = 1 + cluster.workers, nodes(cluster)
    if found == wanted:
        return f"the cluster is up, with {found} nodes\n{describe(cluster)}", True
    if not any(map(processes.find, cluster.processes)):
        return (
            "the cluster has ended without `mmdiff cluster down`; start a new one: mmdiff cluster up",
            False,
        )
    return f"of {wanted} nodes {found} answer; start all anew: mmdiff cluster down, mmdiff cluster up", False


def nodes(cluster: LocalCluster) -> int:
    """Return how many nodes the cluster says are alive; 0 where it does not answer."""
    answer = _ask(cluster, "/nodes?view=summary") or {}
    summary = answer.get("data", {}).get("summary", [])
    return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in summary)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other commands on the same folder waiting for the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(workers: int, cpus: int, folder: Path) -> LocalCluster:
    cluster = _planned(workers, folder)
    _write(cluster, folder)
    try:
        cluster = _with_node(cluster, folder, "head", _head_options(cluster))
        for number in range(1, workers + 1):
            name = f"worker-{number}"
            # A folder of its own: Ray unpacks a job's code anew on every node, over what others run from.
            options = [f"--address={cluster.gcs}", f"--num-cpus={cpus}", f"--temp-dir={cluster.temp}/{name}"]
            cluster = _with_node(cluster, folder, name, options)
    except BaseException:
        _clear(cluster, folder)
        raise
    return cluster


def _planned(workers: int, folder: Path) -> LocalCluster:
    """Return a cluster that is not started yet: its name, free ports, a token of its own in a file."""
    name = secrets.token_hex(4)
    gcs, dashboard = _free_ports(2)
    path = (folder / TOKEN).absolute()
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return LocalCluster(
        name, f"http://{HOST}:{dashboard}", f"{HOST}:{gcs}", str(path), f"/tmp/ray/mm-{name}", workers
    )


def _head_options(cluster: LocalCluster) -> list[str]:
    """Return how the head differs from a worker: it holds the dashboard and does no work."""
    (client,) = _free_ports(1)
    return [
        "--head",
        f"--port={cluster.gcs.rpartition(':')[2]}",
        f"--dashboard-host={HOST}",
        f"--dashboard-port={cluster.address.rpartition(':')[2]}",
        f"--ray-client-server-port={client}",
        f"--temp-dir={cluster.temp}",
        "--num-cpus=0",
        "--num-gpus=0",
    ]


def _with_node(cluster: LocalCluster, folder: Path, name: str, options: Sequence[str]) -> LocalCluster:
    """Start one more node and return the cluster with it once it is alive.

    On a busy machine a node gives up after 30 s, which Ray fixes: it gets more attempts. Raises RunError with
    the last words of the last one.
    """
    for _ in range(ATTEMPTS):
        grown = _spawned(cluster, folder, name, options)
        if _comes_up(grown):
            return grown
    log = folder / f"{name}.log"
    raise RunError(f"the local cluster did not come up: {_last_words(log)} ({log})")


def _spawned(cluster: LocalCluster, folder: Path, name: str, options: Sequence[str]) -> LocalCluster:
    """Start a node's process and return the cluster with it, noted on the disk at once so that it can be
    ended."""
    (agent,) = _free_ports(1)
    common = [f"--node-ip-address={HOST}", f"--dashboard-agent-listen-port={agent}", "--block"]
    common += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={STORE_BYTES}"]
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *common],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal is not for it
            env=_environment(cluster),
        )
    cluster = dataclasses.replace(cluster, processes=(*cluster.processes, processes.known(process.pid)))
    _write(cluster, folder)
    return cluster


def _environment(cluster: LocalCluster) -> dict[str, str]:
    """Return the environment of the cluster's processes: this one's, without what leads to another Ray, and
    without what each job brings along."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(NOT_INHERITED)}
    return kept | {
        MARK: cluster.name,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": cluster.token_path,
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _comes_up(cluster: LocalCluster) -> bool:
    """Wait for the cluster's last node; return whether it is alive. What is left of a dead one is ended."""
    deadline, family = time.monotonic() + UP_S, []
    while node := processes.find(cluster.processes[-1]):
        if nodes(cluster) >= len(cluster.processes):
            return True
        family = processes.descendants(node)
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    processes.end([*family, *([node] if node else [])], END_S)
    return False


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _ask(cluster: LocalCluster, path: str) -> Mapping[str, Any] | None:
    """Return what the dashboard answers, by no proxy; None where it does not."""
    try:
        request = urllib.request.Request(
            cluster.address + path, headers={"Authorization": f"Bearer {token(cluster)}"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]


def _write(cluster: LocalCluster, folder: Path) -> None:
    part = folder / f"{STATE}.part"
    part.write_text(json.dumps(dataclasses.asdict(cluster), indent=1) + "\n", encoding="utf8")
    part.replace(folder / STATE)


def _clear(cluster: LocalCluster, folder: Path) -> None:
    """End all that is left of a cluster and remove what it left on the disk."""
    members = processes.family(cluster.processes, MARK, cluster.name)
    nodes_last_first = [process for known in cluster.processes if (process := processes.find(known))][::-1]
    processes.end(nodes_last_first, END_S)
    processes.end([*members, *processes.family((), MARK, cluster.name)], 2.0)
    shutil.rmtree(cluster.temp, ignore_errors=True)
    for name in (STATE, TOKEN):
        (folder / name).unlink(missing_ok=True)
