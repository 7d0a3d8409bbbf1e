"""A cell is trained with torch, pyarrow and omegaconf, Pillow and safetensors: all else may be missing."""

import os
import subprocess
import sys

import pytest
import yaml

from tests.experiments.test_runner import PLAIN

ALONE = """
import importlib.abc, importlib.machinery, sys

MISSING = {
    "ray", "mlflow", "lpips", "rich", "scipy", "sklearn", "skimage", "matplotlib", "open_clip", "timm",
    "psutil", "torchvision", "prdc", "aiohttp", "optuna",
}

class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in MISSING else None

    def create_module(self, spec):
        raise ModuleNotFoundError(f"{spec.name} is missing here", name=spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Missing())
from mmdiff_ray.experiments.cell import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_cell_is_trained_where_only_little_is_installed(sprites, tmp_path):
    plain = {**PLAIN, "base": {**PLAIN["base"], "data": {"sources": [{"uri": sprites}]}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    words = [str(tmp_path / "small.yaml"), "both", "0", "--preset", "smoke", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "small-smoke" / "both-0" / "export" / "model.safetensors").is_file()
    refused = subprocess.run(
        [
            sys.executable,
            "-c",
            ALONE.replace('"ray",', '"ray", "safetensors",'),
            *words[:-1],
            str(tmp_path / "other"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert refused.returncode != 0 and "safetensors is missing here" in refused.stderr
