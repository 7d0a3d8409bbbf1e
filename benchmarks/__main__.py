"""Measure what the CPU can show against named alternatives: `python -m benchmarks [PART ...]`.

Prints one table and writes benchmarks/results/PART.json. Measure on a quiet machine.
"""

import json
import os
import platform
import sys
import time
from importlib import import_module
from pathlib import Path

import ray
import torch

from benchmarks.figures import plain_figures, render

PARTS = ("step", "stream", "start")
RESULTS = Path(__file__).parent / "results"


def main(parts: list[str]) -> int:
    """Measure the parts, one after another; return 0 whether or not the targets are met."""
    if unknown := [part for part in parts if part not in PARTS]:
        print(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    rows = []
    for part in parts or PARTS:
        start = time.monotonic()
        figures = plain_figures(import_module(f"benchmarks.{part}").measure())
        result = {
            "command": f"python -m benchmarks {part}",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "ray": ray.__version__,
            },
            "seconds": round(time.monotonic() - start),
            "figures": figures,
        }
        (RESULTS / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
        rows += figures
    print(render(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
