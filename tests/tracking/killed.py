"""A process that records 100 numbers and a text and is killed before it can close anything."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.recorder import Recorder
from mmdiff_ray.tracking.tracker import Tracker
uri, run_id, root, sending = sys.argv[1:]
if sending == "True":
    recorder = Tracker(uri, run_id, root)
else:
    recorder = Recorder(Log(root, {"uri": uri, "run_id": run_id}))
for step in range(100):
    recorder.metrics({"loss": step}, step)
recorder.text("from the dead", "note.txt")
print("recorded", flush=True)
sys.stdin.read()
"""


def record_and_be_killed(uri: str, run_id: str, root: Path, sending: bool = False) -> None:
    """Run the process until everything is recorded, then kill it. sending: kill a tracker while it sends."""
    command = [sys.executable, "-c", PROGRAM, uri, run_id, str(root), str(sending)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "recorded\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
