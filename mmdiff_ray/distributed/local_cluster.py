"""A Ray cluster on this machine (`mmdiff cluster up`): head and worker nodes, own ports, own token."""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.distributed import processes

FOLDER = Path(".cluster")
STATE, TOKEN = FOLDER / "cluster.json", FOLDER / "token"
MARK = "MMDIFF_CLUSTER"
"""Environment variable of all processes of a cluster: CLUSTER/NODE. Used to find and end them."""
HOST = "127.0.0.1"
NOT_INHERITED = ("RAY_", "MLFLOW_", "AWS_", "PYTHONPATH")
UP_S = 120.0
ATTEMPTS = 3
END_S = 15.0
POLL_S = 0.5
STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class LocalCluster:
    """A cluster. address: dashboard and job server; gcs: Ray's address; temp: folder of Ray's sessions."""

    name: str
    address: str
    gcs: str
    token_path: str
    temp: str
    workers: int


def read() -> LocalCluster | None:
    """Return this folder's cluster, or None. It may have ended without `down`."""
    try:
        state = json.loads(STATE.read_text(encoding="utf8"))
        return LocalCluster(**{field.name: state[field.name] for field in dataclasses.fields(LocalCluster)})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def up(workers: int, cpus: int) -> LocalCluster:
    """Start a cluster with `workers` nodes of `cpus` CPUs each, besides a head without CPUs.

    Raises ConfigError if this folder's cluster runs. If the cluster does not start, ends its processes and
    raises RunError with Ray's last line of output.
    """
    if workers < 1 or cpus < 1:
        raise ConfigError(f"--workers ({workers}) and --cpus ({cpus}) must be at least 1")
    known = read()
    if known is not None and processes.marked(MARK, f"{known.name}/"):
        raise ConfigError(f"{nodes(known)} of {1 + known.workers} nodes answer; end it: mmdiff cluster down")
    down()
    FOLDER.mkdir(exist_ok=True)
    with open(os.open(TOKEN, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    name, (gcs, dashboard, client) = secrets.token_hex(4), _free_ports(3)
    cluster = LocalCluster(
        name=name,
        address=f"http://{HOST}:{dashboard}",
        gcs=f"{HOST}:{gcs}",
        token_path=str(TOKEN.absolute()),
        temp=f"/tmp/ray/mm-{name}",
        workers=workers,
    )
    STATE.write_text(json.dumps(dataclasses.asdict(cluster), indent=1) + "\n", encoding="utf8")
    head = ["--head", f"--port={gcs}", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}"]
    head += [
        f"--ray-client-server-port={client}",
        f"--temp-dir={cluster.temp}",
        "--num-cpus=0",
        "--num-gpus=0",
    ]
    try:
        _start(cluster, "head", head, 1)
        for number in range(1, workers + 1):
            # One temp folder per node: each unpacks a job's code there and would overwrite files in use.
            options = [
                f"--address={cluster.gcs}",
                f"--num-cpus={cpus}",
                f"--temp-dir={cluster.temp}/{number}",
            ]
            _start(cluster, f"worker-{number}", options, 1 + number)
    except BaseException:
        down()
        raise
    return cluster


def down() -> LocalCluster | None:
    """End this folder's cluster with all its processes and return it, or None."""
    cluster = read()
    if cluster is not None:
        processes.end(processes.marked(MARK, f"{cluster.name}/"), END_S)
        shutil.rmtree(cluster.temp, ignore_errors=True)
    for file in (STATE, TOKEN):
        file.unlink(missing_ok=True)
    return cluster


def nodes(cluster: LocalCluster) -> int:
    """Return how many nodes of the cluster are alive; 0 if the cluster does not answer."""
    try:
        token = Path(cluster.token_path).read_text(encoding="utf8")
        request = urllib.request.Request(
            f"{cluster.address}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as answer:
            summary = json.load(answer)["data"]["summary"]
    except (OSError, ValueError, KeyError):
        return 0
    return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in summary)


def describe(cluster: LocalCluster) -> str:
    """Describe a new cluster: its dashboard and the next commands."""
    return f"""dashboard  {cluster.address} (token: {cluster.token_path})
next       mmdiff submit -- train pipelines/configs/demo.yaml
           mmdiff jobs list
           mmdiff jobs logs --follow ID
           mmdiff cluster down"""


def _start(cluster: LocalCluster, node: str, options: Sequence[str], count: int) -> None:
    """Start a node and wait until the cluster has `count` nodes.

    Retries, because Ray gives up on a node that takes 30 s to start, as on a busy machine. Raises RunError
    after the last attempt.
    """
    common = [f"--node-ip-address={HOST}", f"--object-store-memory={STORE_BYTES}", "--block"]
    common += [
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--dashboard-agent-listen-port={_free_ports(1)[0]}",
    ]
    log = FOLDER / f"{node}.log"
    for _ in range(ATTEMPTS):
        with open(log, "w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *common],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal does not reach it
                env=_environment(cluster, node),
            )
        deadline = time.monotonic() + UP_S
        while process.poll() is None and time.monotonic() < deadline:
            if nodes(cluster) >= count:
                return
            time.sleep(POLL_S)
        processes.end(processes.marked(MARK, f"{cluster.name}/{node}"), END_S)
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    raise RunError(f"the local cluster did not start: {last} ({log})")


def _environment(cluster: LocalCluster, node: str) -> dict[str, str]:
    """Return this process's environment without variables of another Ray cluster or of a job."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(NOT_INHERITED)}
    return inherited | {
        MARK: f"{cluster.name}/{node}",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": cluster.token_path,
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _free_ports(count: int) -> list[int]:
    """Return distinct free ports."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
