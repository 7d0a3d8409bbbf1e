"""A run with `workers.least`: it goes on with fewer workers when a node dies, with more when one comes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmdiff_ray.distributed import launch
from mmdiff_ray.distributed.display import Display
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.tracking import queries
from mmdiff_ray.training.checkpoint import complete
from tests import sprites as tiny

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SAMPLES = 640
"""How much of the run is compared with one in one process."""
WORDS = (
    "checkpoint.every_samples=160",
    "train.decay=constant",
    "workers.strategy=fsdp",
    "evaluate.rows=4",
    "data.lanes=1",
)
"""One lane, which two workers share: their number never divides it."""
DRIVER = """
import sys
from mmdiff_ray.distributed import launch
from mmdiff_ray.cli import main
launch.GROW_S = 1.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def nodes() -> Iterator[Any]:
    """Return a cluster whose head holds one worker and its reader, with a second such node."""
    from ray.cluster_utils import Cluster

    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


@pytest.mark.faults
def test_run_goes_on_with_fewer_workers_and_again_with_more(nodes, sprites, tmp_path):
    file = tiny.write_config(
        tmp_path, sprites, *WORDS, "train.samples=1000000", "workers.count=2", "workers.least=1"
    )
    folder, said = tmp_path / "runs" / "tiny", tmp_path / "said"
    command = [sys.executable, "-c", DRIVER, "train"]
    environment = {**os.environ, "RAY_ADDRESS": nodes.address, "PYTHONUNBUFFERED": "1"}
    with said.open("w") as out:
        driver = subprocess.Popen(
            [*command, str(file)], stdout=out, stderr=subprocess.STDOUT, env=environment
        )

    def begun() -> list[str]:
        return re.findall(r"training on (\d+ workers?)", said.read_text())

    def wait(done: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 400
        while not done():
            assert driver.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)

    wait(lambda: complete(folder / "checkpoints"))
    other = subprocess.run(
        [*command, "--resume", str(folder)], env=environment, capture_output=True, text=True
    )
    assert other.returncode == 2 and f"process {driver.pid} on" in other.stderr
    second = next(node for node in nodes.list_all_nodes() if node is not nodes.head_node)
    second.kill_all_processes(check_alive=False, allow_graceful=False)
    wait(lambda: len(begun()) > 1)
    left = complete(folder / "checkpoints")[-1]
    wait(lambda: complete(folder / "checkpoints")[-1] > left)
    nodes.add_node(num_cpus=2)
    wait(lambda: len(begun()) > 2)
    left = complete(folder / "checkpoints")[-1]
    wait(lambda: int(complete(folder / "checkpoints")[-1].name) > max(int(left.name), SAMPLES))
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=240) == 130, said.read_text()
    assert begun() == ["2 workers", "1 worker", "2 workers"]

    end = int(complete(folder / "checkpoints")[-1].name) + 64
    words = [f"train.samples={end}", "workers.count=0", "workers.least=null"]
    launch.resume(jobs.load_job(folder, words), Display())
    assert jobs.read_run(folder)["state"] == "finished"
    assert (folder / "export" / "model.safetensors").is_file()
    config = tiny.config(sprites, *WORDS, f"runs={tmp_path / 'alone'}", f"train.samples={SAMPLES}")
    alone = launch.train(jobs.prepare(config, jobs.new_folder(config)), Display())
    for key in ("loss/total", "loss/l2/shape"):
        one, many = history(alone, key), history(folder, key)
        assert {step: many[step] for step in one} == pytest.approx(one, rel=0.05)


def history(folder: Path, key: str) -> dict[int, float]:
    """Return a metric of a run by samples seen."""
    facts = jobs.read_run(folder)
    return dict(queries.history(facts["tracking_uri"], facts["run_id"], key))
