"""Run all parts within a time limit; `run.sh` calls it.

    python3 -m benchmarks.gpu.run [--minutes M] [--parts NAME ...] [--tiny]

Results go to $OUT (default benchmarks/gpu/out), each as soon as its part has ended, with a table of all
figures. A part that finds too little time left is skipped; what is not finished at its limit is left out.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import Figure, plain_figures, render
from benchmarks.gpu import science
from benchmarks.gpu.cells import CELLS, SPEED
from benchmarks.gpu.correctness import CHECKS
from benchmarks.gpu.shared import HERE, until
from benchmarks.gpu.table import science_figures, speed_figures
from mmdiff_ray.training.checkpoint import write_json

TESTS = "tests/test_gpu.py"
SPEED_TINY = ("unet_small", "dit_base")
"""Of the smallest size, models of one backbone are the same."""
TINY_SLACK = 5
"""How much longer than on a GPU a part of a tiny run may take."""
ENDING_S = 12.0
"""Kept for writing the last results."""
COMPILE_SHARE = 0.65
"""Share of a round's time within which a model must have compiled."""
GRAPHS_S = 85.0
"""Kept of the speed part's time for the round with CUDA graphs."""
GRAPHS, GRAPHS_TINY = ("unet_small", "unet_base", "dit_base"), ("dit_base",)
"""Models that the round with CUDA graphs measures: the largest leaves the GPU no gaps that graphs close."""


@dataclass
class Run:
    """One run. out: results; work: a scratch folder; deadline: seconds since 1970; wanted: names of parts."""

    out: Path
    work: Path
    deadline: float
    tiny: bool
    wanted: Sequence[str]
    figures: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    compiling: list["Process"] = field(default_factory=list)
    started: list["Process"] = field(default_factory=list)

    def start(self, module: str, *words: str) -> "Process":
        """Start a module of this folder on the scratch folder."""
        tiny = ["--tiny"] if self.tiny else []
        return self.launch(f"benchmarks.gpu.{module}", str(self.work), *words, *tiny)

    def start_each(self, module: str, words: Sequence[str], names: Sequence[str]) -> list["Process"]:
        """Start a module for each name at once; in a tiny run one process does all."""
        groups = [list(names)] if self.tiny else [[name] for name in names]
        return [self.start(module, *words, *group) for group in groups]

    def launch(self, *words: str) -> "Process":
        """Start a Python module; what it prints goes to log.txt."""
        name, settings = " ".join(words), environment(self.work, self.tiny)
        with (self.out / "log.txt").open("a", encoding="utf8") as log:
            log.write(f"--- {name}\n")
            log.flush()
            child = subprocess.Popen(
                [sys.executable, "-m", *words], stdout=log, stderr=log, env=settings, process_group=0
            )
        self.started.append(Process(name, child))
        return self.started[-1]

    def wait(self, processes: Sequence["Process"], deadline: float, expected: bool = True) -> None:
        """Wait for processes and kill what runs at the deadline. expected: whether that is a failure."""
        while any(process.child.poll() is None for process in processes) and until(deadline):
            time.sleep(0.1)
        for process in processes:
            late = process.kill()
            if late and expected:
                self.failures.append(f"{process.name}: not finished in time")
            elif not process.killed and process.child.returncode:
                self.failures.append(f"{process.name}: exit status {process.child.returncode}, see log.txt")

    def results(self, pattern: str) -> dict[str, Any]:
        """Return the JSON files of the scratch folder that match, by the rest of their name."""
        prefix = pattern.split("*")[0]
        return {
            file.stem.removeprefix(prefix): json.loads(file.read_text(encoding="utf8"))
            for file in sorted(self.work.glob(pattern))
        }

    def finish(self) -> None:
        """Write run.json and table.txt."""
        facts = {"machine": machine(), "parts": self.parts, "failures": self.failures}
        write_json(self.out / "run.json", facts)
        (self.out / "table.txt").write_text(render(self.figures), encoding="utf8")


@dataclass
class Process:
    """A process that was started here, with a process group of its own."""

    name: str
    child: subprocess.Popen
    killed: bool = False

    def kill(self) -> bool:
        """Kill the process and its children if it still runs; return whether it did."""
        running = self.child.poll() is None
        if running:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
            self.killed = True
        return running


def environment(work: Path, tiny: bool) -> dict[str, str]:
    """Return the environment of the parts' processes."""
    limits = {"OMP_NUM_THREADS": "1" if tiny else "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    compiled = {"TORCHDYNAMO_DISABLE": "1"} if tiny else {"TORCHINDUCTOR_CACHE_DIR": str(work / "compiled")}
    return {**os.environ, **limits, **compiled}


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "gpu": None if gpu is None else gpu.name,
        "gpu_memory_bytes": None if gpu is None else gpu.total_memory,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def run_rows(run: Run, deadline: float) -> None:
    """Decode the rows, and measure the ceilings of the device beside it."""
    words = (
        ["--visits", "1", "--limit", "48"]
        if run.tiny
        else ["--workers", str(max(1, (os.cpu_count() or 2) - 2))]
    )
    run.wait([run.start("rows", *words), run.start("speed", "ceiling")], deadline)


def run_correctness(run: Run, deadline: float) -> None:
    """Run all checks at once, each in its own process, and on a GPU the tests that need one.

    The models of the speed part compile beside them; they are not timed before the checks have ended.
    """
    if "speed" in run.wanted:
        run.compiling = run.start_each("speed", ("plain",), SPEED_TINY if run.tiny else SPEED)
    processes = run.start_each("correctness", (), list(CHECKS))
    names = [] if run.tiny else names_of_tests()
    tests = {name: run.launch("pytest", "-q", f"{TESTS}::{name}") for name in names}
    run.wait([*processes, *tests.values()], deadline)
    found = run.results("correctness-*.json")
    if tests:
        failed = [name for name, process in tests.items() if process.child.returncode]
        figure = Figure(f"{TESTS}: tests that failed", len(failed), target=0, note=", ".join(failed))
        found["tests"] = plain_figures([figure])
    write_json(run.out / "correctness.json", found)
    run.figures += [figure for figures in found.values() for figure in figures]


def names_of_tests() -> list[str]:
    """Return the names of the package's tests that need a GPU."""
    return re.findall(r"^def (test_\w+)", Path(TESTS).read_text(encoding="utf8"), re.MULTILINE)


def run_speed(run: Run, deadline: float) -> None:
    """Measure all models eager and compiled, then some with CUDA graphs."""
    plain = run.compiling or run.start_each("speed", ("plain",), SPEED_TINY if run.tiny else SPEED)
    measure_round(run, "plain", plain, deadline - GRAPHS_S)
    graphs = run.start_each("speed", ("graphs",), GRAPHS_TINY if run.tiny else GRAPHS)
    measure_round(run, "graphs", graphs, deadline)
    run.figures += plain_figures(speed_figures(run.results("speed-*.json")))


def measure_round(run: Run, mode: str, processes: Sequence["Process"], deadline: float) -> None:
    """Wait for a round of models. One that has not compiled in time is killed: others have their turn."""
    compiled_by = time.time() + COMPILE_SHARE * until(deadline)
    while any(process.child.poll() is None for process in processes) and until(compiled_by):
        time.sleep(0.1)
    for process in processes:
        marks = [run.work / f"speed-{name}-{mode}.compiled" for name in SPEED if name in process.name.split()]
        if not any(mark.exists() for mark in marks) and process.kill():
            run.failures.append(f"{process.name}: not compiled in time")
    run.wait(processes, deadline)
    write_json(run.out / "speed.json", run.results("speed-*.json"))


def run_science(run: Run, deadline: float) -> None:
    """Train all cells at once until the deadline, and collect their models and curves.

    Nothing is compiled where the checks of part 1 could not compile either.
    """
    ends = 0.0 if run.tiny else deadline  # tiny: one milestone each
    compiles = "correctness" not in run.wanted or any(run.work.glob("correctness-compiled*.json"))
    words = (str(ends), *(() if compiles else ("--eager",)))
    processes = run.start_each("science", words, list(CELLS))
    run.wait(processes, deadline, expected=run.tiny)
    run.figures += plain_figures(science_figures(science.collect(run.work, run.out)))


@dataclass(frozen=True)
class Part:
    """A part. share: of the time left, at most; least_s: what it needs to start; most_s: its time limit."""

    call: Callable[[Run, float], None]
    share: float
    least_s: float
    most_s: float


PARTS = {
    "rows": Part(run_rows, 1.0, 10, 60),
    "correctness": Part(run_correctness, 0.4, 30, 130),
    "speed": Part(run_speed, 0.55, 60, 210),
    "science": Part(run_science, 1.0, 60, 600),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts in order and print the table."""
    parser = argparse.ArgumentParser(prog="run.sh", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--tiny", action="store_true", help="the smallest sizes, on the CPU, nothing compiled"
    )
    given = parser.parse_args(arguments)
    if not given.tiny and not torch.cuda.is_available():
        print("torch sees no CUDA GPU here; --tiny runs everything on the CPU", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or HERE / "out").absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        deadline = time.time() + 60 * given.minutes - ENDING_S
        run = Run(out, Path(work), deadline, given.tiny, ["rows", *given.parts])
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            for name in PARTS:
                if name in run.wanted:
                    run_part(run, name, PARTS[name])
        finally:
            for process in run.started:
                process.kill()
    print(render(run.figures))
    for failure in run.failures:
        print(failure)
    return 1 if run.failures else 0


def run_part(run: Run, name: str, part: Part) -> None:
    """Run a part if there is time for it, and write what is known so far."""
    begun, left = time.time(), until(run.deadline)
    limit = min(TINY_SLACK * part.most_s if run.tiny else part.most_s, part.share * left)
    status = "done"
    if left < part.least_s:
        status = "skipped: no time left"
        run.failures.append(f"{name}: {status}")
    else:
        try:
            part.call(run, begun + limit)
        except Exception as error:
            status = f"failed: {type(error).__name__}: {error}"
            run.failures.append(f"{name}: {status}")
    run.parts.append({"part": name, "seconds": time.time() - begun, "limit_s": limit, "status": status})
    print(f"{name}: {status} in {time.time() - begun:.0f} s", flush=True)
    run.finish()


if __name__ == "__main__":
    sys.exit(main())
