"""A cluster on this machine whose worker nodes an autoscaler starts and ends: Ray's own, with Ray's provider
of nodes for tests."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmdiff_ray.distributed import processes
from tests.surroundings import is_somebodys

MARK = "MMDIFF_TEST_CLUSTER"
HEAD = "ray.head.default"
HEAD_ID = "f" * 51 + "00000"
"""The type and the id that Ray's provider gives to the head."""
UP_S = 90.0


@contextmanager
def autoscaling_cluster(folder: Path, types: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Run a head without CPUs for the block and yield the address of its cluster.

    types: name -> {resources, min_workers, max_workers, labels} of the nodes that its autoscaler may start.
    """
    name = secrets.token_hex(4)
    gcs, dashboard, client = _free_ports(3)
    address = f"127.0.0.1:{gcs}"
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(_config(address, types)))
    temp = Path(f"/tmp/ray/as-{name}")
    environment = {key: value for key, value in os.environ.items() if not is_somebodys(key)} | {
        MARK: name,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    words = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=0"]
    words += ["--num-gpus=0", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    words += [f"--temp-dir={temp}", f"--autoscaling-config={config}", f"--object-store-memory={2**28}"]
    with open(folder / "head.log", "w") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + UP_S
        while "Ray runtime started" not in (folder / "head.log").read_text():
            assert head.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        processes.end(processes.marked(MARK, name), 5.0)
        processes.end(processes.marked(MARK, name), 2.0)  # nodes that started meanwhile
        head.wait(10)
        shutil.rmtree(temp, ignore_errors=True)


def _config(address: str, types: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    return {
        "cluster_name": "tests",
        "max_workers": 8,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 1,
        "provider": provider,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{key: {"node_config": {}, **value} for key, value in types.items()},
        },
        **{f"{command}_commands": [] for command in commands},
    }


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
