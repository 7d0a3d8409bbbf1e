"""Images in buildah's storage, and programs in a chroot of them, without a container engine."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cluster.files import ROOT
from tests.cluster.machine import packages, torch_backend

SHARED = "/mnt/mmdiff"
WORKING = {"mmdiff:mlflow": "/home/mmdiff", "mmdiff:cpu": "/app"}
"""Working folder of each image."""
ENTER = f"""set -e
root=$1 shared=$2; shift 2
mount --rbind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777,size=2g tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o uid=1000,gid=1000 tmpfs "$root/home/mmdiff"
mount --bind /etc/resolv.conf "$root/etc/resolv.conf"
if [ -d "$root{SHARED}" ]; then mount --bind "$shared" "$root{SHARED}"; fi
exec chroot "$root" setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs --bounding-set=-all \\
  --inh-caps=-all "$@"
"""


class Images:
    """Images in a folder, and the programs that run in them. work: the folder."""

    def __init__(self, work: Path):
        self.work = work
        self.shared = work / "shared"
        shutil.rmtree(self.shared, ignore_errors=True)
        self.shared.mkdir()
        os.chown(self.shared, 1000, 1000)
        work.chmod(0o755)
        self.settings = packages(work)
        self.environment: dict[str, str] = {}
        self._services = contextlib.ExitStack()
        self._roots: dict[str, str] = {}

    def close(self) -> None:
        """Stop all servers and remove all containers."""
        self._services.close()

    def buildah(self, *words: str) -> str:
        """Run buildah on the storage of this check and return its output."""
        place = [f"--root={self.work}/storage", f"--runroot={self.work}/state", "--storage-driver=overlay"]
        return run(["buildah", *place, *words])

    def build(self, tag: str, *words: str) -> str:
        """Build an image from the Dockerfile and return its size."""
        base = ["--build-arg", "BASE=localhost/base", "--build-arg", f"TORCH_BACKEND={torch_backend()}"]
        build = ["build", "--isolation=chroot", "--layers", *self.settings, *base]
        self.buildah(*build, "--tag", f"localhost/{tag}", "--file", "cluster/Dockerfile", *words, ".")
        return self.size(tag)

    def size(self, tag: str) -> str:
        """Return an image's size, as buildah prints it."""
        return self.buildah("images", "--format", "{{.Size}}", f"localhost/{tag}").strip()

    def inside(self, tag: str, words: Sequence[str], **extra: str) -> list[str]:
        """Return the command that runs words in an image."""
        if tag not in self._roots:
            container = self.buildah("from", f"localhost/{tag}").strip()
            self._services.callback(self.buildah, "rm", container)
            self._roots[tag] = self.buildah("mount", container).strip()
        variables = {"HOME": "/home/mmdiff", "PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONUNBUFFERED": "1"}
        variables |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", **self.environment, **extra}
        enter = ["unshare", "--mount", "--pid", "--fork", "--propagation=private"]
        enter += ["sh", "-c", ENTER, "enter", self._roots[tag], str(self.shared)]
        enter += ["env", "-i", "-C", WORKING[tag], *(f"{key}={value}" for key, value in variables.items())]
        return [*enter, *words]

    def serve(self, name: str, command: Sequence[str], answers: Callable[[], bool]) -> None:
        """Start a server, wait until it answers, and stop it at the end of the check."""
        log = self.work / f"{name}.log"
        with open(log, "w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        self._services.callback(process.wait)
        # The group, with the first process of the namespace: changing the user undoes --kill-child.
        self._services.callback(os.killpg, process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 300
        while not answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(1)


def run(command: Sequence[str]) -> str:
    """Run a command and return its output; raises SystemExit with the output if it fails."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        output, errors = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode:
        raise SystemExit(f"{command[0]} failed ({process.returncode}):\n{(output + errors)[-6000:]}")
    return output


def answers(address: str) -> bool:
    """Return whether an address answers 200."""
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
