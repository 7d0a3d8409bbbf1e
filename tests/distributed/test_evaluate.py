"""Evaluation by a pool of models: the same figures, kept chunk by chunk, gone on with after a stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmdiff_ray import config as configuration
from mmdiff_ray.distributed import evaluate as evaluation
from mmdiff_ray.evaluation.requests import CHUNK, SampleRequest, cached, sample_locally
from mmdiff_ray.evaluation.run import metrics_of
from mmdiff_ray.sampling.export import load_export

WORDS = ["evaluate.evaluators=[segmentation, labels, calibration, joint, restoration]", "evaluate.steps=2"]


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of a finished run, for the test alone."""
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(finished.folder, folder, ignore=shutil.ignore_patterns("tracking", "evaluations"))
    return folder


def config_of(folder: Path, *more: str):
    return configuration.load([folder / "export" / "config.yaml"], [*WORDS, *more])


def figures(findings) -> dict[str, float]:
    """Return every figure and floor by its name."""
    return metrics_of(findings.figures)


@pytest.mark.ray
@pytest.mark.slow
def test_a_pool_of_models_finds_what_one_process_finds(ray_cluster, finished):
    config = config_of(finished.folder)
    alone = evaluation.measure(finished.folder, config)
    pool = evaluation.measure(finished.folder, config, evaluation.pooled(finished.folder, config, 2))
    assert figures(pool) == pytest.approx(figures(alone), rel=1e-4)
    assert len(figures(alone)) > 6


def test_cached_samples_are_not_drawn_again(finished, tmp_path):
    config = config_of(finished.folder)
    first = evaluation.measure(finished.folder, config, None, tmp_path / "kept")
    files = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert files and all(name.endswith(".pt") for name in files)

    def never(name, requests):
        assert not requests, f"{name} is requested again"
        yield from ()

    second = evaluation.measure(finished.folder, config, never, tmp_path / "kept")
    assert figures(second) == figures(first)


def test_only_missing_chunks_are_drawn(finished, tmp_path):
    model = load_export(finished.folder / "export")
    drawn: list[int] = []

    def counted(name, requests):
        drawn.extend(request.start for request in requests)
        return sample_locally(model)(name, requests)

    sample_fn = cached(tmp_path, counted)
    requests = [
        SampleRequest(start, 3, model_roles(model), {}, seed=0, steps=2, sampler="ancestral")
        for start in (0, CHUNK, 2 * CHUNK)
    ]
    stream = sample_fn("from noise", requests)
    before = [next(stream), next(stream)]  # then the process is killed
    del stream
    (tmp_path / "from noise-000000128.partial").write_bytes(b"half")
    after = list(sample_fn("from noise", requests))
    assert drawn == [0, CHUNK, 2 * CHUNK, 2 * CHUNK]
    for old, new in zip(before, after, strict=False):
        assert all(torch.equal(value, new.data[name]) for name, value in old.data.items())


def model_roles(model) -> dict[str, int]:
    return {name: int(role[0]) for name, role in model.roles_for([], 1).items()}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_evaluation_resumes_and_finds_the_same(run):
    words = [*WORDS, "evaluate.rows=40", "evaluate.steps=30"]
    command = [sys.executable, "-m", "mmdiff_ray.cli", "evaluate", str(run), *words]
    process = subprocess.Popen(
        [*command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(run.glob("evaluations/unfinished-*/*.pt")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (kept,) = run.glob("evaluations/unfinished-*")
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*.pt")}
    assert not list(run.glob("evaluations/*/evaluation.json"))
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert ended.returncode == 0, ended.stderr
    assert before and not kept.exists()
    (file,) = run.glob("evaluations/*/evaluation.json")
    whole, _ = evaluation.evaluate_run(run, words)
    found = {figure["key"]: figure["value"] for figure in json.loads(file.read_text())["figures"]}
    assert found == pytest.approx({figure.key: figure.value for figure in whole.figures}, rel=1e-4)


def test_a_pool_smaller_than_nothing_is_refused(finished, capsys):
    from mmdiff_ray.cli import main

    assert main(["evaluate", str(finished.folder), "--workers", "-1"]) == 2
    assert "--workers (-1) must be at least 0" in capsys.readouterr().err
