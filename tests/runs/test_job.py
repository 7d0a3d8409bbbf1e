"""A job: checked on the driver, found again by name, gone on with only as what it was."""

import dataclasses
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from mmdiff_ray.config import ConfigError, load, load_saved, plain_yaml, to_plain
from mmdiff_ray.models.denoiser import inert_settings
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs.find import find_run
from tests import sprites as tiny


@pytest.fixture
def made(sprites, tmp_path):
    """Return the job of a run that was written into a folder."""
    job = tiny.job(sprites, f"runs={tmp_path}", folder=tmp_path / "tiny")
    jobs.write_run(dataclasses.replace(job, tracking_uri="sqlite:///x.db", run_id="1"), state="stopped")
    return job


def test_run_goes_on_with_the_password_of_the_environment_which_its_files_do_not_hold(made, monkeypatch):
    whole = "http://me:hidden@host:5000"
    job = dataclasses.replace(made, tracking_uri=whole)
    jobs.write_run(job, state="stopped")
    assert "hidden" not in str(job)
    assert not any("hidden" in file.read_text() for file in made.folder.rglob("*") if file.is_file())
    assert jobs.load_job(made.folder).tracking_uri == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert jobs.load_job(made.folder).tracking_uri == whole


def test_prepared_job_writes_nothing_and_knows_what_the_data_say(sprites, tmp_path):
    job = tiny.job(sprites, folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    assert job.config.modalities["shape"].names[:2] == ["circle", "square"]
    assert job.config.modalities["factors"].dim == 9
    assert job.config.model.options["multipliers"] == [1, 2]


def test_scales_that_are_not_configured_are_the_types_own_and_written_out_where_they_are_used(sprites):
    made = tiny.job(sprites, "modalities.shape.weights.scale=null", "modalities.factors.weights.scale=0.3")
    scales = {name: options.weights.scale for name, options in made.config.modalities.items()}
    cells, channels = math.prod(made.denoiser().size), made.denoiser().modalities["shape"].code_channels
    assert scales["shape"] == pytest.approx(1 / math.sqrt(channels * cells))
    assert scales["shapes"] == 4 / math.sqrt(cells)
    assert (scales["factors"], scales["pixels"], scales["masked"]) == (0.3, None, None)
    t = torch.tensor([0.25], dtype=torch.float64)
    process = made.denoiser().process
    assert process.profiles["shape"](t) == scales["shape"] * process.schedule.abar(t).sqrt()
    assert inert_settings(made.config) == []


def test_codes_of_a_job_have_unit_rms_in_every_worker(sprites):
    job = pickle.loads(pickle.dumps(tiny.job(sprites)))
    first, second = job.denoiser(), job.denoiser()
    assert tiny.same(dict(first.named_buffers()), dict(second.named_buffers()))
    assert tiny.same(tiny.weights(first), tiny.weights(second))
    batch = next(tiny.batches(dataclasses.replace(job, config=job.config)))
    rms = first.encode(batch.data)["pixels"].square().mean().sqrt()
    assert float(rms) == pytest.approx(1.0, abs=0.15)  # 16 rows of the 180 it was fixed on
    assert not torch.equal(job.calibration["pixels.code_scale"], torch.full((3,), 0.5))


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.sources=[{uri: nowhere}]", "no data set at nowhere"),
        ("data.sources=[]", "data.sources is empty"),
        ("modalities.colour={type: label}", "modalities.colour needs the column 'colour'"),
        ("modalities.shapes.classes=3", "modalities.shapes.classes"),
        ("evaluate.evaluators=[joint, beauty]", "evaluate.evaluators: .*beauty"),
        ("modalities.shapes.weights={family: constant, scale: 1}", "modalities.shapes.weights: at t = 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(sprites, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        tiny.job(sprites, override, folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_new_run_takes_the_next_free_name(sprites, tmp_path):
    config = tiny.config(sprites, f"runs={tmp_path}")
    assert jobs.new_folder(config) == tmp_path / "tiny"
    for name in ("tiny", "tiny-2"):
        (tmp_path / name).mkdir()
    assert jobs.new_folder(config) == tmp_path / "tiny-3"


def test_run_is_found_by_name_or_folder_and_others_are_named(made, tmp_path, monkeypatch):
    assert find_run("tiny", str(tmp_path)) == made.folder
    monkeypatch.chdir(tmp_path)
    assert find_run("tiny") == made.folder
    assert find_run(str(made.folder)) == made.folder
    with pytest.raises(ConfigError, match=r"no run 'tin' in .*; there are: tiny"):
        find_run("tin", str(tmp_path))
    with pytest.raises(ConfigError, match=r"there are: none yet"):
        find_run("small", str(tmp_path / "elsewhere"))


def test_run_is_loaded_as_it_was_with_what_may_change(made):
    again = jobs.load_job(made.folder)
    assert again.config == made.config and (again.tracking_uri, again.run_id) == ("sqlite:///x.db", "1")
    assert tiny.same(again.calibration, made.calibration)
    longer = jobs.load_job(made.folder, ["train.samples=999", "workers.count=2", "data.bad_row_limit=3"])
    assert (longer.config.train.samples, longer.config.workers.count) == (999, 2)
    assert longer.config.data.bad_row_limit == 3


@pytest.mark.parametrize(
    "override",
    ["seed=1", "train.global_batch=32", "data.lanes=4", "model.options.width=16", "tasks.joint.drop=0.5"],
)
def test_run_cannot_go_on_as_another(made, override):
    with pytest.raises(ConfigError, match=f"{override.split('=')[0]}: a resumed run keeps .*train.samples"):
        jobs.load_job(made.folder, [override])


def test_run_cannot_go_on_with_other_data(sprites, tmp_path):
    shutil.copytree(sprites, tmp_path / "data")
    job = tiny.job(str(tmp_path / "data"), folder=tmp_path / "tiny")
    jobs.write_run(job, state="stopped")
    manifest = Path(tmp_path / "data" / "manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "description": "other"}))
    with pytest.raises(ConfigError, match=r"data.sources: tiny was trained on other data"):
        jobs.load_job(job.folder)


def test_automatic_precision_is_decided_once_and_kept_where_the_run_goes_on(sprites, tmp_path):
    job = tiny.job(sprites, "train.precision=auto", f"runs={tmp_path}", folder=tmp_path / "tiny")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = torch.cuda.is_available() or any(flag in flags for flag in ("avx512_bf16", "amx_tile"))
    assert job.config.train.precision == ("bfloat16" if fast else "float32")
    on_gpus = tiny.config(sprites, "train.precision=auto", "workers.count=2", "workers.gpus=1")
    assert jobs.with_precision(on_gpus).train.precision == "bfloat16"
    other = "float32" if fast else "bfloat16"  # a run of another kind of machine
    train = dataclasses.replace(job.config.train, precision=other)
    moved = dataclasses.replace(job, config=dataclasses.replace(job.config, train=train), run_id="1")
    jobs.write_run(dataclasses.replace(moved, tracking_uri="sqlite:///x.db"), state="stopped")
    assert jobs.load_job(moved.folder).config.train.precision == other


def test_keys_that_a_saved_configuration_lacks_have_the_value_by_which_it_was_trained(sprites, tmp_path):
    """Runs of before `in_place` and `loss.normalize` keep the path and the weights that they began with."""
    plain = to_plain(tiny.job(sprites, "given.input=u_plus_code", "loss.normalize=batch").config)
    before = tmp_path / "config.yaml"
    for key in ("exact", "zero_unused", "input"):
        del plain["given"][key]
    del plain["loss"]["normalize"]
    before.write_text(plain_yaml(plain))
    config = load_saved(before)
    assert (config.given.input, config.loss.normalize) == ("u_plus_code", "batch")
    now = load([before])
    assert (now.given.input, now.loss.normalize) == ("in_place", "expected")
