"""Paths of the shipped configs, experiments and sweeps, in a checkout or an installed wheel."""

from pathlib import Path

import mmdiff_ray

CONFIGS, EXPERIMENTS, SWEEPS = "pipelines/configs", "pipelines/configs/experiments", "sweeps"


def root() -> Path:
    """Return the folder that contains `pipelines/configs` and `sweeps`."""
    package = Path(mmdiff_ray.__file__).parent
    return package / "shipped" if (package / "shipped").is_dir() else package.parent


def find(file: str | Path, *folders: str) -> Path:
    """Return the path of an existing file, else of the shipped file with this path or name.

    `pipelines/configs/demo.yaml`, `demo.yaml` and `demo` all find the demo config from any working folder.
    folders: where to search for a name. Returns the path unchanged if nothing is found.
    """
    file = Path(file)
    if file.is_file() or file.is_absolute() or not file.name:
        return file
    name = file if file.suffix == ".yaml" else file.with_name(f"{file.name}.yaml")
    found = [path for path in (root() / file, *(root() / one / name for one in folders)) if path.is_file()]
    return found[0] if found else file


def names(folder: str) -> list[str]:
    """Return the sorted names of the shipped files in a folder."""
    return sorted(path.stem for path in (root() / folder).glob("*.yaml"))
