"""A process that trains on a cluster and prints on which nodes the parts of it ran."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
from pathlib import Path
import ray
from mmdiff_ray import config as configuration
from mmdiff_ray.distributed import launch
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.distributed.display import Display

class Looking(Display):
    def show(self, event):
        labels = {node["NodeID"]: node["Labels"].get("kind") for node in ray.nodes()}
        for actor in ray._private.state.actors().values():
            if actor["Address"]["NodeID"] in labels:  # it has run, whether it has ended or not
                found.add((actor["ActorClassName"], labels[actor["Address"]["NodeID"]]))

found = set()
config = configuration.load([Path(sys.argv[1])])
launch.train(jobs.prepare(config, jobs.new_folder(config)), Looking())
print(json.dumps(sorted(found, key=str)))
"""


def placed(config: Path, environment: dict[str, str]) -> dict[str, set[str | None]]:
    """Return what ran while a configuration trained: the class of an actor -> `kind` of its nodes."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, config], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, set[str | None]] = {}
    for name, kind in json.loads(done.stdout.splitlines()[-1]):
        found.setdefault(name, set()).add(kind)
    return found
