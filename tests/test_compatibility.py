"""What commit 913545b wrote still loads: data, runs, exports, plug-ins, records and sweeps.

The fixtures and the commands that made them: tests/fixtures/913545b/README.md.
"""

import json
import math
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdiff_ray import config as configuration
from mmdiff_ray.cli import main
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.registry import look_up
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.sampling.export import load_export
from mmdiff_ray.sweeps.journal import read_trials
from mmdiff_ray.sweeps.spec import load_sweep
from mmdiff_ray.tracking.sender import replay
from mmdiff_ray.tracking.store import client
from mmdiff_ray.training.checkpoint import complete, read_state
from tests.sprites import same

ARCHIVE = Path(__file__).parent / "fixtures/913545b/fixtures.tar.gz"
RUN = Path("runs/tiny")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("913545b")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    sys.path.insert(0, str(folder))  # of the plug-in
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def here(unpacked, tmp_path, monkeypatch) -> Path:
    """Work in a copy of the fixtures."""
    shutil.copytree(unpacked, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def recorded(here) -> dict[str, torch.Tensor]:
    """Return inputs and outputs of the exported denoiser as the old code computed them."""
    return load_file("prediction.safetensors")


def part(recorded: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {name.partition("/")[2]: value for name, value in recorded.items() if name.startswith(f"{kind}/")}


def test_an_exported_denoiser_predicts_what_it_predicted_then(recorded):
    generator = load_export(RUN / "export")
    assert generator.denoiser.path.name == "u_plus_code"
    denoiser, data = generator.denoiser, part(recorded, "data")
    with torch.no_grad():
        found = denoiser(
            recorded["z_t"],
            recorded["t"],
            part(recorded, "role"),
            denoiser.encode(data),
            denoiser.conditions(data),
        )
    for now, then in ((found.codes, part(recorded, "code")), (found.heads, part(recorded, "head"))):
        assert now.keys() == then.keys() and then
        for name, value in then.items():
            torch.testing.assert_close(now[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_a_saved_configuration_keeps_the_values_by_which_its_run_was_trained(here):
    for file in (RUN / "config.yaml", RUN / "export/config.yaml"):
        config = configuration.load_saved(file)
        assert config.given.input == "u_plus_code" and not config.given.zero_unused
        assert config.loss.normalize == "batch"
        assert config.loss.channel_cap == config.loss.gamma == 5
        assert config.train.precision == "float32"
        assert {task.readout for task in config.tasks.values()} == {"sample"}


def test_manifest_and_shards_hold_the_rows_that_were_read_then(recorded):
    manifest = read_manifest("data")
    assert [manifest.digest] == json.loads((RUN / "run.json").read_text())["datasets"]
    assert {name: split.rows for name, split in manifest.splits.items() if split.rows} == {
        "train": 36,
        "val": 4,
    }
    job = jobs.load_job(RUN.absolute())
    batch = next(split_batches(job.reader(job.denoiser()), [manifest.splits["val"]], 4, 4))
    assert same(batch.data, part(recorded, "data"))


def test_a_run_resumes_from_its_checkpoint_and_trains_on(here):
    (before,) = complete(RUN / "checkpoints")
    assert read_state(before)["progress"]["samples_seen"] == 64
    started = load_file(RUN / "export/model.safetensors")
    assert main(["train", "--resume", "tiny", "train.samples=96", "evaluate.evaluators=[]"]) == 0
    state = read_state(complete(RUN / "checkpoints")[-1])
    assert state["progress"]["samples_seen"] == 96 and state["progress"]["steps"] == 6
    assert math.isfinite(state["metric"])
    ended = load_file(RUN / "export/model.safetensors")
    assert ended.keys() == started.keys() and not same(ended, started)
    assert configuration.load_saved(RUN / "config.yaml").given.input == "u_plus_code"


def test_a_run_is_evaluated_with_the_figures_it_had(here):
    then = json.loads((RUN / "evaluation.json").read_text())["figures"]
    assert main(["evaluate", "tiny"]) == 0
    now = {one["key"]: one["value"] for one in json.loads((RUN / "evaluation.json").read_text())["figures"]}
    assert {one["key"] for one in then} <= now.keys()
    assert all(math.isfinite(value) for value in now.values())


def test_a_plug_in_written_then_loads_and_its_modality_can_be_given(here):
    assert main(["sample", "tiny", "--given", "brightness=0.25", "--num", "2", "--out", "out"]) == 0
    assert look_up("modality", "number").__module__ == "number_plugin"
    (written,) = Path("out").rglob("*brightness*.txt")
    assert float(written.read_text()) == 0.25


def test_records_that_waited_for_mlflow_are_sent(here):
    uri = f"sqlite:///{here / 'mlflow.db'}"
    done = replay(RUN / "tracking", uri)
    assert done.sent == 17 and done.waiting == 0 and done.error is None
    mlflow = client(uri)
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("mmdiff").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["given.input"] == "u_plus_code"
    steps = [metric.step for metric in mlflow.get_metric_history(run.info.run_id, "loss/total")]
    assert steps == [16, 32, 48, 64]
    assert {"config.yaml", "evaluation"} <= {file.path for file in mlflow.list_artifacts(run.info.run_id)}


def test_the_journal_of_a_sweep_is_read(here):
    finished, stopped = read_trials(Path("runs/sweeps/sweep"))
    assert (finished.number, finished.outcome) == (0, "finished")
    assert (stopped.number, stopped.outcome) == (1, "stopped")
    for trial, samples in ((finished, [16, 32]), (stopped, [16])):
        assert [report["samples"] for report in trial.reports] == samples
        assert all(math.isfinite(report["figures"]["shape/head_nll"]) for report in trial.reports)
    assert load_sweep(Path("runs/sweeps/sweep/sweep.yaml")).title == "Tiny"
