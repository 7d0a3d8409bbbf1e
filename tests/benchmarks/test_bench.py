"""`make bench`: its parts, and how they measure."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import PARTS
from benchmarks.start import first_report
from benchmarks.step import STEPS, TURNS, in_turns
from benchmarks.stream import BATCH, consume

ROOT = Path(__file__).parents[2]


def test_an_unknown_part_is_refused_with_the_known_ones():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nothing"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 2 and run.stderr == f"unknown part 'nothing'; known: {', '.join(PARTS)}\n"


def test_two_calls_are_timed_in_turns():
    calls = []
    ours, theirs, ratio = in_turns(
        lambda: (calls.append("ours"), time.sleep(0.005)), lambda: (calls.append("theirs"), time.sleep(0.001))
    )
    assert calls == ([*["ours"] * STEPS, *["theirs"] * STEPS]) * TURNS
    assert ours >= 0.005 and theirs >= 0.001 and ratio > 1


def test_the_first_batch_is_timed_apart_from_the_rest():
    def batches():
        time.sleep(0.05)
        while True:
            yield object()
            time.sleep(0.001)

    first_s, rate = consume(batches(), 5)
    assert first_s >= 0.05 and 0 < rate <= BATCH / 0.001


def test_a_start_lasts_until_the_first_report():
    speaks = "import time; time.sleep(0.1); print('64 of 640 samples', flush=True); time.sleep(0.3)"
    assert first_report([sys.executable, "-c", speaks]) >= 0.1
    with pytest.raises(RuntimeError, match="ended without a report"):
        first_report([sys.executable, "-c", "pass"])
