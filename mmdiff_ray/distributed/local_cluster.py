"""A Ray cluster on this machine: a head and workers by `ray start`, with ports and a token of their own."""

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
"""The variable that all processes of a cluster inherit: the cluster's name and the node's."""
HOST = "127.0.0.1"
NOT_INHERITED = ("RAY_", "MLFLOW_", "AWS_", "PYTHONPATH")
UP_S = 120.0
ATTEMPTS = 3
END_S = 15.0
POLL_S = 0.5
STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class LocalCluster:
    """How to reach a cluster. address: of dashboard and job server; gcs: of Ray; temp: of Ray's sessions."""

    name: str
    address: str
    gcs: str
    token_path: str
    temp: str
    workers: int


def read() -> LocalCluster | None:
    """Return the cluster of this folder, which may have ended since; None if there is none."""
    try:
        state = json.loads(STATE.read_text(encoding="utf8"))
        return LocalCluster(**{field.name: state[field.name] for field in dataclasses.fields(LocalCluster)})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def up(workers: int, cpus: int) -> LocalCluster:
    """Start a cluster and return it. Files of one that has ended are removed.

    Raises ConfigError if one runs. Raises RunError with Ray's last line of output if it does not start, and
    then leaves nothing running.
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
            # A folder of its own: Ray unpacks a job's code on every node, over the code that others run.
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
    """End the cluster of this folder with all its processes, and return it; None if there is none."""
    cluster = read()
    if cluster is not None:
        processes.end(processes.marked(MARK, f"{cluster.name}/"), END_S)
        shutil.rmtree(cluster.temp, ignore_errors=True)
    for file in (STATE, TOKEN):
        file.unlink(missing_ok=True)
    return cluster


def nodes(cluster: LocalCluster) -> int:
    """Return how many nodes the cluster reports as alive; 0 if it does not answer."""
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
    """Return where a cluster is and what to do next."""
    return f"""dashboard  {cluster.address} (token: {cluster.token_path})
next       mmdiff submit -- train pipelines/configs/demo.yaml
           mmdiff jobs list
           mmdiff jobs logs --follow ID
           mmdiff cluster down"""


def _start(cluster: LocalCluster, node: str, options: Sequence[str], count: int) -> None:
    """Start a node and wait until the cluster has so many.

    Ray gives up on a node that takes 30 s to start, which happens on a busy machine, so there are several
    attempts. Raises RunError after the last one.
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
    """Return this process's environment without what leads to another Ray and what each job brings along."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(NOT_INHERITED)}
    return kept | {
        MARK: f"{cluster.name}/{node}",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": cluster.token_path,
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
