"""A published model: a folder that others load, in both formats, without Ray, MLflow or the data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmdiff_ray import load_pipeline
from mmdiff_ray.cli import main
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs.checkpoints import of_checkpoint
from mmdiff_ray.runs.find import find_model
from mmdiff_ray.sampling.export import load_export
from mmdiff_ray.tracking.store import client
from mmdiff_ray.training.checkpoint import complete, read_state
from tests import sprites as tiny

LOAD_ALONE = """
import sys

for blocked in ("ray", "mlflow"):
    sys.modules[blocked] = None  # importing it now raises ImportError
from mmdiff_ray import load_pipeline

samples = load_pipeline(sys.argv[1]).sample({"shape": ["ellipse"] * 2}, num=2, steps=2)
print(samples["pixels"][1].tolist())
"""


@pytest.fixture(scope="module", params=["safetensors", "diffusers"])
def published(request, finished, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "shapes"
    words = ["--format", request.param, "--out", str(out), "--license", "CC-BY-4.0"]
    assert main(["export", str(finished.folder), *words]) == 0
    return out


def names(model) -> list[str]:
    return model.config.modalities["shape"].names


def test_published_model_samples_what_its_run_samples_where_ray_and_mlflow_are_missing(published, finished):
    run = load_export(finished.folder / "export")
    code = LOAD_ALONE.replace("ellipse", names(run)[0])
    command = [sys.executable, "-c", code, str(published)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    expected = run.sample({"shape": [names(run)[0]] * 2}, num=2, steps=2)["pixels"][1]
    np.testing.assert_array_equal(np.array(json.loads(done.stdout)), expected)


def test_card_says_what_was_trained_on_what_and_how_well_it_does(published, finished):
    text = (published / "README.md").read_text()
    _, front, card = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert "Drawn by mmdiff-ray; free to use." in card and "after 160 samples" in card
    figures = json.loads((finished.folder / "evaluation.json").read_text())["figures"]
    best = {one["key"]: one for one in figures}["shape/accuracy"]
    line = next(line for line in card.splitlines() if line.startswith("| shape/accuracy |"))
    floors = [f"{value:.4g}" for value in best["floors"].values()]
    assert f"| {best['value']:.4g} |" in line and any(f"| {floor} |" in line for floor in floors)
    assert "| understand | pixels | shapes, shape, factors |" in card


def test_published_folder_tells_no_address_of_this_machine(published, finished):
    for file in published.rglob("*"):
        if file.suffix in (".json", ".md", ".py"):
            assert (
                str(finished.folder.parents[1]) not in file.read_text() and "sqlite" not in file.read_text()
            )


def test_published_model_is_sampled_by_its_folder_and_starts_a_run(published, sprites, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(published), "--num", "2", "--steps", "2"]) == 0
    assert Path("samples/shapes-joint/grid.png").is_file()
    job = jobs.prepare(tiny.config(sprites, f"train.init={published}"), tmp_path / "run")
    denoiser = job.denoiser()
    job.initialize(denoiser)
    assert tiny.same(tiny.weights(denoiser), tiny.weights(load_pipeline(published).denoiser))


def test_diffusers_loads_the_folder_as_a_pipeline(finished, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = tmp_path / "pipe"
    assert main(["export", str(finished.folder), "--format", "diffusers", "--out", str(out)]) == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(out), trust_remote_code=True).to("cpu")
    found = pipe(num=2, steps=2, seed=3)
    expected = load_pipeline(out).sample({}, num=2, steps=2, seed=3)
    np.testing.assert_array_equal(np.asarray(found.images[1]).transpose(2, 0, 1), expected["pixels"][1])
    assert found.samples["shape"] == expected["shape"]


def test_bfloat16_halves_the_weights_and_keeps_the_scales_of_codes(finished, tmp_path):
    out = tmp_path / "small"
    assert main(["export", str(finished.folder), "--dtype", "bfloat16", "--out", str(out)]) == 0
    small, whole = (load_file(folder / "model.safetensors") for folder in (out, finished.folder / "export"))
    parameters = dict(load_pipeline(out).denoiser.named_parameters())
    for name, value in whole.items():
        expected = value.bfloat16() if name in parameters else value
        assert small[name].dtype == expected.dtype and torch.equal(small[name], expected), name
    assert load_pipeline(out).denoiser.embed[0].weight.dtype == torch.float32


def test_shipped_model_is_found_by_its_name_and_starts_a_run(
    finished, sprites, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMDIFF_PRETRAINED", str(tmp_path / "models"))
    assert main(["export", str(finished.folder), "--dtype", "bfloat16", "--out", "models/shapes"]) == 0
    capsys.readouterr()
    assert main(["sample", "pretrained:shapes", "--num", "2", "--steps", "2"]) == 0
    assert main(["sample", "pretrained:shape", "--num", "2"]) == 2
    assert capsys.readouterr().err == "mmdiff: no shipped model 'shape'; there are: shapes\n"
    job = jobs.prepare(tiny.config(sprites, "train.init=pretrained:shapes"), tmp_path / "run")
    assert job.config.train.init == "pretrained:shapes" and jobs.init_tags(job).keys() == {"mmdiff.init"}
    denoiser = job.denoiser()
    job.initialize(denoiser)
    assert tiny.same(tiny.weights(denoiser), tiny.weights(load_pipeline("pretrained:shapes").denoiser))


def test_published_model_is_evaluated_on_data_that_are_named(
    published, finished, sprites, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    settings = [f"data.sources=[{{uri: {sprites}}}]", "evaluate.evaluators=[labels]"]
    assert main(["evaluate", str(published), *settings]) == 0
    found, own = (
        {one["key"]: one for one in json.loads((folder / "evaluation.json").read_text())["figures"]}
        for folder in (Path("evaluations/shapes"), finished.folder)
    )
    assert found["shape/accuracy"] == own["shape/accuracy"]
    assert main(["evaluate", str(published), *settings, "loss.prediction=x0"]) == 2
    assert "loss.prediction: an evaluation keeps" in capsys.readouterr().err


def test_model_of_the_best_checkpoint_is_sampled_and_evaluated(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = str(finished.folder)
    states = {path.name: read_state(path) for path in complete(finished.folder / "checkpoints")}
    best = f"{int(min(states, key=lambda name: states[name]['metric']))}"
    for which, seen in (("best", best), ("last", "160"), ("128", "128")):
        model = of_checkpoint(find_model(run), which)
        assert (model.name, model.samples_seen) == (f"tiny-{seen}", int(seen))
    last = load_export(of_checkpoint(find_model(run), "last").where)
    assert tiny.same(
        last.denoiser.state_dict(), load_export(finished.folder / "export").denoiser.state_dict()
    )
    assert not tiny.same(tiny.weights(load_export(model.where).denoiser), tiny.weights(last.denoiser))
    assert main(["sample", run, "--checkpoint", "best", "--num", "2", "--steps", "2"]) == 0
    assert Path(f"samples/tiny-{best}-joint/grid.png").is_file()
    assert main(["evaluate", run, "--checkpoint", "best", "evaluate.evaluators=[labels]"]) == 0
    found = json.loads(Path(f"evaluations/tiny-{best}/evaluation.json").read_text())
    assert found["samples_seen"] == int(best) and found["figures"]
    capsys.readouterr()
    assert main(["sample", run, "--checkpoint", "99"]) == 2
    assert "--checkpoint 99: tiny has the checkpoints 128, 160" in capsys.readouterr().err


def test_run_records_held_out_losses_and_figures_as_curves(finished):
    facts = jobs.read_run(finished.folder)
    for metric in ("val/loss/total", "val/task/understand/l2/shape", "val/shape/head_accuracy"):
        points = client(facts["tracking_uri"]).get_metric_history(facts["run_id"], metric)
        assert {64, 128} <= {point.step for point in points}, metric


def test_nothing_is_overwritten(finished, tmp_path, capsys):
    shutil.copytree(finished.folder / "export", tmp_path / "there")
    assert main(["export", str(finished.folder), "--out", str(tmp_path / "there")]) == 2
    assert "is not empty; use a new folder" in capsys.readouterr().err
