"""Tell how many cases were generated, and write it to `FUZZ_RESULTS` where that names a file."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.cases import ran


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BEGUN] = time.monotonic()


_BEGUN = pytest.StashKey[float]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the number of cases, and write the figures."""
    if not ran:
        return
    seconds = round(time.monotonic() - config.stash[_BEGUN], 1)
    terminalreporter.write_line(f"fuzz: {ran.total():,} generated cases in {seconds} s")
    if file := os.environ.get("FUZZ_RESULTS"):
        figures = {"cases": ran.total(), "seconds": seconds, "tests": dict(sorted(ran.items()))}
        Path(file).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf8")
