"""Build the images of cluster/Dockerfile with buildah, without a registry, and run programs in them.

`make images-check` runs this as root and writes benchmarks/results/images.json. It needs Debian's buildah and
debootstrap. Programs run in a chroot of an image as its user 1000: read-only root, no capabilities, a process
namespace and /dev/shm of their own, the network of the machine.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.chroot import SHARED, WORKING, Images, answers, free_ports, run
from tests.cluster.files import ROOT
from tests.cluster.machine import debian, torch_backend
from tests.postgres import postgres_server
from tests.s3 import SECRET, s3_server

RESULTS = ROOT / "benchmarks" / "results" / "images.json"
TOOLS = {"buildah": "buildah", "debootstrap": "debootstrap", "unshare": "util-linux"}
"""Programs, and the Debian packages that hold them."""
TINY = ["train.samples=64", "train.global_batch=16", "train.warmup_samples=16", "train.log_every_samples=16"]
TINY += ["model.preset=nano", "checkpoint.every_samples=32", "evaluate.evaluators=[]"]
TINY += ["workers.count=2", "evaluate.every_samples=0", f"data.sources=[{{uri: {SHARED}/data/openmoji}}]"]
ISOLATION = """id -u
for place in / /app /etc /usr/local; do
  if touch "$place/written" 2>/dev/null; then echo "$place can be written"; exit 1; fi
done
touch /tmp/written
grep -q '^CapBnd:.0000000000000000$' /proc/self/status && echo 'root read-only, no capabilities'"""


class Check(Images):
    """The steps of the check, in the order of `STEPS`."""

    def mmdiff(self, *words: str) -> str:
        """Run mmdiff in the CPU image and return its output."""
        return run(self.inside("mmdiff:cpu", ["mmdiff", *words]))

    def base(self) -> str:
        """Make Debian with Python into the base image."""
        suite, mirror = debian()
        container = self.buildah("from", "scratch").strip()
        root = self.buildah("mount", container).strip()
        wanted = "--include=ca-certificates,python3,python3-pip"
        run(["debootstrap", "--variant=minbase", wanted, suite, root, mirror])
        for marker in Path(root).glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            marker.unlink()
        (Path(root) / "usr/bin/python").symlink_to("python3")
        self.buildah("commit", "--rm", container, "localhost/base")
        return f"Debian {suite}, {self.size('base')}"

    def mlflow_image(self) -> str:
        """Build the image of the tracking server."""
        return self.build("mmdiff:mlflow", "--target=mlflow")

    def cpu_image(self) -> str:
        """Build the CPU image."""
        # buildah 1.28 leaves out a stage that a later one names by an argument: build it first.
        self.build("base-cpu", "--target=base-cpu")
        return self.build("mmdiff:cpu")

    def isolation(self) -> str:
        """Check the user, the read-only root and the capabilities of both images."""
        found = {run(self.inside(tag, ["sh", "-c", ISOLATION])) for tag in WORKING}
        return "; ".join(f"user {text.strip()}".replace("\n", ", ") for text in found)

    def doctor(self) -> str:
        """Run `mmdiff doctor`."""
        self.mmdiff("doctor", "--runs", f"{SHARED}/runs")
        return "ok"

    def data(self) -> str:
        """Build 40 emoji, with embeddings by the packages in the image."""
        out = f"{SHARED}/data/openmoji"
        said = self.mmdiff("data", "build", "openmoji", "limit=40", "--workers=0", "--out", out)
        return " ".join(re.findall(r"\d+ train, \d+ val rows", said))

    def demo(self) -> str:
        """Train the demo's configuration on two Ray workers, 64 samples."""
        words = ["train", "demo", "name=alone", f"runs={SHARED}/runs", *TINY]
        self.mmdiff(*words, f"tracking.uri=sqlite:///{SHARED}/alone.db")
        return finished(self.shared / "runs" / "alone")

    def tracking(self) -> str:
        """Start the server of the MLflow image by the command of compose.yaml, with PostgreSQL and S3."""
        import boto3

        database = self._services.enter_context(postgres_server())
        endpoint = self._services.enter_context(
            s3_server(self._services.enter_context(pytest.MonkeyPatch.context()))
        )
        boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1").create_bucket(
            Bucket="mlflow"
        )
        (port,) = free_ports(1)
        service = yaml.safe_load((ROOT / "cluster" / "compose.yaml").read_text())["services"]["mlflow"]
        words = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in service["command"]]
        changed = {"--host": "127.0.0.1", "--port": port, "--backend-store-uri": database.uri}
        for key, value in changed.items():
            words = [f"{key}={value}" if word.startswith(f"{key}=") else word for word in words]
        keys = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        same = {key: value for key, value in service["environment"].items() if "${" not in value}
        variables = same | keys | {"MLFLOW_S3_ENDPOINT_URL": f"http://{endpoint}"}
        address = f"http://127.0.0.1:{port}"
        self.serve(
            "mlflow", self.inside("mmdiff:mlflow", words, **variables), lambda: answers(f"{address}/health")
        )
        self.environment["MLFLOW_TRACKING_URI"] = address
        return "/health answers 200"

    def ray(self) -> str:
        """Start a head and a worker, each in an image of its own."""
        gcs, dashboard, client, *agents = free_ports(5)
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
        start = [
            "ray",
            "start",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--object-store-memory={512 * 2**20}",
        ]
        start += ["--min-worker-port=0", "--max-worker-port=0"]
        head = [*start, "--head", "--num-cpus=0", f"--port={gcs}", f"--ray-client-server-port={client}"]
        head += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        worker = [*start, f"--address=127.0.0.1:{gcs}", "--num-cpus=4"]
        for count, (words, agent) in enumerate(zip((head, worker), agents, strict=True), 1):
            command = self.inside("mmdiff:cpu", [*words, f"--dashboard-agent-listen-port={agent}"])
            self.serve(f"ray-{count}", command, lambda count=count: self.nodes() == count)
        return f"{self.nodes()} nodes"

    def nodes(self) -> int:
        """Return how many Ray nodes are alive."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(
            f"{self.environment['RAY_API_SERVER_ADDRESS']}/nodes?view=summary", headers=token
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                summary = json.load(answer)["data"]["summary"]
        except OSError:
            return 0
        return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in summary)

    def job(self) -> str:
        """Submit a tiny run and follow its log to the end."""
        train = ["train", "pipelines/configs/demo.yaml", "name=job", f"runs={SHARED}/runs", *TINY]
        sent = self.mmdiff("submit", "--folder", SHARED, "--", *train)
        (job_id,) = re.findall(r"^job\s+([\w-]+),", sent, re.M)
        self.mmdiff("jobs", "logs", "--follow", job_id)
        return finished(self.shared / "runs" / "job")

    def recorded(self) -> str:
        """Read the job's run from the tracking server."""
        from mlflow import MlflowClient

        client = MlflowClient(self.environment["MLFLOW_TRACKING_URI"])
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        (found,) = client.search_runs(experiments)
        assert found.info.status == "FINISHED", found.info.status
        count, files = len(found.data.metrics), len(client.list_artifacts(found.info.run_id))
        assert count and files
        return f"FINISHED, {count} metrics, {files} artifacts"


STEPS: dict[str, tuple[Callable[[Check], str], bool]] = {
    "base image": (Check.base, True),
    "MLflow image": (Check.mlflow_image, True),
    "CPU image": (Check.cpu_image, True),
    "isolation": (Check.isolation, False),
    "mmdiff doctor": (Check.doctor, False),
    "data build": (Check.data, False),
    "demo": (Check.demo, False),
    "MLflow server": (Check.tracking, False),
    "Ray cluster": (Check.ray, False),
    "submitted job": (Check.job, False),
    "run in MLflow": (Check.recorded, False),
}
"""The steps in order, and whether a later check in the same folder may reuse the result."""


def finished(folder: Path) -> str:
    """Return what a run folder says about a run that has ended well."""
    facts = json.loads((folder / "run.json").read_text())
    checkpoints = len(list((folder / "checkpoints").iterdir()))
    return f"{facts['state']}, {checkpoints} checkpoints"


def missing() -> str:
    """Return why the check cannot run here, or nothing."""
    if os.geteuid() != 0:
        return "it needs root, for mounts and chroot"
    lacking = [package for program, package in TOOLS.items() if shutil.which(program) is None]
    return f"apt-get install {' '.join(lacking)}" if lacking else ""


def table(steps: Sequence[dict[str, Any]]) -> str:
    """Return the steps as the table of cluster/README.md."""
    rows = [f"| {step['step']} | {step['seconds']} | {step['result']} |" for step in steps]
    return "\n".join(["| step | seconds | result |", "|---|---|---|", *rows])


@contextlib.contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """Yield the folder to work in: the given one, which stays, or a new one, which is removed."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="mmdiff-images-") as folder:
        yield Path(folder)


def check(work: Path) -> list[dict[str, Any]]:
    """Run all steps; return the seconds and the result of each."""
    kept = work / "steps.json"
    known = {step["step"]: step for step in json.loads(kept.read_text())} if kept.exists() else {}
    steps: list[dict[str, Any]] = []
    checks = Check(work)
    try:
        for name, (step, reusable) in STEPS.items():
            if reusable and name in known:
                steps.append(known[name])
            else:
                start = time.monotonic()
                result = step(checks)
                steps.append({"step": name, "seconds": round(time.monotonic() - start), "result": result})
            kept.write_text(json.dumps(steps))
            print(f"{name:14} {steps[-1]['seconds']:5} s  {steps[-1]['result']}", flush=True)
    finally:
        checks.close()
    return steps


def main() -> None:
    """Run the check and write its results; says why if it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="keep images here, and reuse those of an earlier check")
    given = parser.parse_args()
    if reason := missing():
        print(f"images-check skipped: {reason}")
        return
    with working_folder(given.work) as work:
        steps = check(work)
    torch = torch_backend() or "the package index's, with CUDA's libraries"
    facts = {
        "command": "make images-check",
        "machine": f"{os.cpu_count()} cores shared with other work, {platform.machine()}",
        "versions": {"buildah": run(["buildah", "--version"]).split()[2], "torch_build": torch},
        "steps": steps,
    }
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf8")
    print(f"{table(steps)}\n{RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
