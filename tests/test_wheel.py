"""The wheel alone, in an empty folder: everything that ships is found by its name."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mmdiff_ray.config import shipped

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The content of a wheel that is built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "content")
    return folder / "content"


@pytest.mark.slow
def test_wheel_holds_every_shipped_file_and_installs_one_package(unpacked):
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith("dist-info")} == {"mmdiff_ray"}
    for folder in (shipped.CONFIGS, shipped.EXPERIMENTS, shipped.SWEEPS):
        there = {path.stem for path in (unpacked / "mmdiff_ray/shipped" / folder).glob("*.yaml")}
        assert there == set(shipped.names(folder)) != set()
    models = Path("mmdiff_ray/pretrained")
    there, here = (
        {file.relative_to(root) for file in (root / models).rglob("*") if file.is_file()}
        for root in (unpacked, ROOT)
    )
    assert there == here and models / "README.md" in there


@pytest.mark.slow
def test_wheel_builds_data_and_trains_by_name_in_an_empty_folder(unpacked, tmp_path):
    def mmdiff(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mmdiff_ray.cli", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    mmdiff("data", "build", "sprites", "--out", "data/sprites", "--limit", "100", "--workers", "0")
    small = ("train.samples=128", "train.global_batch=32", "evaluate.rows=8", "evaluate.steps=2")
    out = mmdiff("train", "sprites", "workers.count=0", "evaluate.evaluators=[segmentation]", *small)
    assert "runs/sprites" in out and (tmp_path / "runs/sprites/export/model.safetensors").is_file()
    assert "nothing was started" in mmdiff("sweep", "quickstart", "--dry-run")
