"""A folder is one process's at a time, and nobody's once that has ended, however it did."""

import subprocess
import sys
import threading

import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.runs.exclusive import alone

HOLDS = """
import sys, time
from pathlib import Path
from mmdiff_ray.runs.exclusive import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_one_process_s_until_that_has_ended(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"{tmp_path}: process {other.pid} on \S+ works on it; wait"):
        alone(tmp_path).__enter__()
    threading.Timer(1.0, other.kill).start()
    with alone(tmp_path, patience_s=60):
        assert other.poll() is not None or other.wait(5)
    other.communicate()
    for _ in range(2):
        with alone(tmp_path):
            pass
