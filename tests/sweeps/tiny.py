"""A tiny sweep of the sprites' label: what the tests of sweeps begin with."""

import copy
from pathlib import Path
from typing import Any

import yaml

from mmdiff_ray.sweeps.spec import Sweep, load_sweep
from tests import sprites

WEIGHTS = "modalities.shape.weights"
PLAIN: dict[str, Any] = {
    "title": "Tiny",
    "base": {
        **sprites.PLAIN,
        "tasks": {
            "joint": sprites.PLAIN["tasks"]["joint"],
            "understand": sprites.PLAIN["tasks"]["understand"],
        },
        "modalities": {k: v for k, v in sprites.PLAIN["modalities"].items() if k != "masked"},
        "evaluate": {"evaluators": ["calibration"], "rows": 8, "steps": 2},
        "workers": {"count": 1, "threads": 1},
    },
    "space": {
        f"{WEIGHTS}.family": {"choice": ["clock", "linear"]},
        f"{WEIGHTS}.scale": {"loguniform": [0.02, 0.5]},
        f"{WEIGHTS}.shape": {"loguniform": [0.5, 2], "when": {f"{WEIGHTS}.family": ["clock"]}},
        "loss.modalities.shape": {"loguniform": [0.01, 1]},
    },
    "metrics": {"shape/head_nll": "min"},
    "searcher": {"name": "random"},
    "scheduler": {"name": "asha", "grace": 0.25, "reduction": 2},
    "budget": {"trials": 4, "samples": 64, "reports": 4},
}


def write(folder: Path, data: str = "unused", **changes: Any) -> Path:
    """Write the tiny sweep of a data set as a YAML file. changes: `section__key` -> value; None removes."""
    plain = copy.deepcopy(PLAIN)
    plain["base"]["data"] = {"sources": [{"uri": data}]}
    plain["base"]["runs"] = str(folder / "runs")
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = plain
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            place.pop(last)
        else:
            place[last] = value
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(plain, sort_keys=False))
    return file


def sweep(folder: Path, data: str = "unused", **changes: Any) -> Sweep:
    """Return the tiny sweep, with changes."""
    return load_sweep(write(folder, data, **changes))
