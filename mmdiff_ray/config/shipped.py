"""Files that ship with the package: configs, experiments and sweeps, of a checkout or an installed wheel."""

from pathlib import Path

import mmdiff_ray

CONFIGS, EXPERIMENTS, SWEEPS = "pipelines/configs", "pipelines/configs/experiments", "sweeps"


def root() -> Path:
    """Return the folder that holds `pipelines/configs` and `sweeps`."""
    package = Path(mmdiff_ray.__file__).parent
    return package / "shipped" if (package / "shipped").is_dir() else package.parent


def find(file: str | Path, *folders: str) -> Path:
    """Return the path of a file: as it is, else of the shipped file with that path or that name.

    `pipelines/configs/demo.yaml`, `demo.yaml` and `demo` all find the demo's config in any working folder.
    folders: where to look for a name. Returns the path unchanged where nothing is found.
    """
    file = Path(file)
    if file.is_file() or file.is_absolute() or not file.name:
        return file
    name = file if file.suffix == ".yaml" else file.with_name(f"{file.name}.yaml")
    found = [path for path in (root() / file, *(root() / one / name for one in folders)) if path.is_file()]
    return found[0] if found else file


def names(folder: str) -> list[str]:
    """Return the names of the files that ship in a folder, sorted."""
    return sorted(path.stem for path in (root() / folder).glob("*.yaml"))
