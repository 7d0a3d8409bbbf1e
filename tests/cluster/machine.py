"""Settings of this machine that an image build needs: Debian's mirror, package indexes, certificates."""

import functools
import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

from tests.cluster.files import locked

CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host")


def debian() -> tuple[str, str]:
    """Return the suite and the mirror of this machine's Debian."""
    command = ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Identifier: Packages"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    suite, mirror = done.stdout.splitlines()[0].split()
    return suite, mirror


def packages(work: Path) -> list[str]:
    """Return options of `buildah bud` that bring this machine's settings of pip and uv into the build.

    work: folder for the files that are mounted. Folders that the settings name are mounted, too.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [line.partition("=")[::2] for line in listed]
    found = {key.rpartition(".")[2]: value.strip("'\"") for key, value in pairs}
    found = {key: found[key] for key in KEYS if key in found}
    volumes = {ssl.get_default_verify_paths().cafile or CERTIFICATES: CERTIFICATES}
    for word in " ".join(found.values()).split():
        if Path(word.removeprefix("file://")).is_dir():
            # The index of a folder links to files beside it.
            folder = Path(word.removeprefix("file://"))
            top = folder.parent if word.startswith("file://") else folder
            volumes[str(top)] = str(top)
    pip, uv = work / "pip.conf", work / "uv.toml"
    lines = ["[global]", f"cert = {CERTIFICATES}", *(f"{key} = {value}" for key, value in found.items())]
    pip.write_text("\n".join(lines) + "\n")
    links, extra = (found.get(key, "").split() for key in ("find-links", "extra-index-url"))
    toml = ["system-certs = true", 'index-strategy = "unsafe-best-match"', f"find-links = {links}"]
    toml += [f"extra-index-url = {extra}"]
    if index := os.environ.get("UV_DEFAULT_INDEX") or found.get("index-url"):
        toml.append(f'index-url = "{index}"')
    uv.write_text("\n".join(toml) + "\n")
    volumes |= {str(pip): "/etc/pip.conf", str(uv): "/etc/uv/uv.toml"}
    return [f"--volume={here}:{there}:ro" for here, there in volumes.items()]


@functools.cache
def torch_backend() -> str:
    """Return "cpu", or "" where PyTorch's index of CPU builds cannot be reached."""
    uv = Path(sys.executable).with_name("uv")
    program = str(uv) if uv.exists() else shutil.which("uv")
    (version,) = locked()["torch"]
    command = [program or "uv", "pip", "install", "--dry-run", "--no-deps", "--reinstall", "--quiet"]
    command += ["--no-cache", "--python", sys.executable, "--torch-backend", "cpu", f"torch=={version}"]
    return "" if subprocess.run(command, capture_output=True).returncode else "cpu"
