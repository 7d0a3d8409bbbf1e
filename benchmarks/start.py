"""Measure what a start costs: seconds until the first step is reported, and what plain Ray Train takes.

The plain run starts the same Ray, the same number of workers, and a loop that reports at once.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import Figure

ROWS, TURNS = Path("data/openmoji"), 3
MMDIFF = Path(sys.executable).with_name("mmdiff")
MOST_S, MOST_RATIO = 4.0, 1.2
PLAIN = """
import ray, ray.train
from ray.train.torch import TorchTrainer
def loop():
    print("64 of 640 samples", flush=True)
    ray.train.report({})
TorchTrainer(loop, scaling_config=ray.train.ScalingConfig(num_workers=2)).fit()
"""


def measure() -> list[Figure]:
    """Return the seconds to the first report: in process, and of two workers against plain Ray Train."""
    here, two, plain = [], [], []
    for turn in range(TURNS):
        here.append(first_report(train(f"here-{turn}", "workers.count=0")))
        two.append(first_report(train(f"two-{turn}", "workers.count=2")))
        plain.append(first_report([sys.executable, "-c", PLAIN]))
    note = f"median of {TURNS}"
    return [
        Figure("first step in process, s", statistics.median(here), target=MOST_S, note=note),
        Figure(
            "first step of two workers, s", statistics.median(two), statistics.median(plain), MOST_RATIO,
            note=f"{note}; baseline: plain Ray Train, empty loop",
        ),
    ]  # fmt: skip


def train(name: str, *overrides: str) -> list[str]:
    """Return the command of a run of the demo that reports its first step."""
    return [
        str(MMDIFF), "train", "demo", f"name={name}", f"data.sources=[{{uri: {ROWS.absolute()}}}]",
        "runs=runs", "train.samples=640", "train.max_minutes=null", "train.log_every_samples=32",
        "evaluate.evaluators=[]", *overrides,
    ]  # fmt: skip


def first_report(command: Sequence[str]) -> float:
    """Return the seconds from a command's start to the first line that reports samples."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment
        )
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            if found is None and "of 640 samples" in line:
                found = time.perf_counter() - start
        if process.wait() or found is None:
            raise RuntimeError(f"{' '.join(command)} ended without a report")
    return found
