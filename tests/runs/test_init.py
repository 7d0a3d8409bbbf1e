"""A run that starts from another run's weights: what fits is taken, the rest is listed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mmdiff_ray.cli import main
from mmdiff_ray.config import ConfigError
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.tracking.store import client
from tests import sprites as tiny

SHORT = ("train.samples=32", "evaluate.evaluators=[]")


def test_weights_that_fit_are_taken_and_all_else_keeps_its_start(sprites, finished):
    config = tiny.config(sprites, "modalities.factors=null", f"train.init={finished.folder}")
    job = jobs.prepare(config, finished.folder)
    donor = load_file(str(finished.folder / "export" / "model.safetensors"))
    untouched, denoiser = dict(job.denoiser().named_parameters()), job.denoiser()
    job.initialize(denoiser)
    found = jobs.init_match(job)
    assert found.same and found.new, "one modality less changes the shape of the first and last layers"
    for name, parameter in denoiser.named_parameters():
        expected = donor[name] if name in found.same else untouched[name]
        assert torch.equal(parameter, expected), name


def test_run_starts_from_another_tags_it_and_needs_it_no_more_once_it_is_resumed(
    sprites, finished, tmp_path, capsys
):
    parent = shutil.copytree(finished.folder, tmp_path / "parent")
    file = tiny.write_config(tmp_path, sprites, "name=child", f"train.init={parent}", *SHORT)
    assert main(["train", str(file)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    total = len(list(tiny.job(sprites).denoiser().parameters()))
    assert f"init {total} of {total} tensors from {parent}" in out
    facts = json.loads((tmp_path / "runs" / "child" / "run.json").read_text())
    tags = client(facts["tracking_uri"]).get_run(facts["run_id"]).data.tags
    assert tags["mmdiff.init"] == str(parent / "export" / "model.safetensors")
    assert tags["mmdiff.init_run_id"] == json.loads((parent / "run.json").read_text())["run_id"]
    shutil.rmtree(parent)
    assert main(["train", "--resume", str(tmp_path / "runs" / "child"), "train.samples=64"]) == 0


@pytest.mark.parametrize(
    "init, message",
    [
        ("nobody", "no run 'nobody' in runs/"),
        ("missing.safetensors", "train.init: cannot read a model from"),
        ("other.safetensors", "train.init: no tensor in"),
    ],
)
def test_what_is_no_start_is_refused_before_anything_begins(sprites, tmp_path, monkeypatch, init, message):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    save_file({"other": torch.zeros(2)}, "other.safetensors")
    with pytest.raises(ConfigError, match=message):
        jobs.prepare(tiny.config(sprites, f"train.init={init}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
