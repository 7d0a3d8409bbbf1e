"""What a finished run leaves behind: in its folder, and in MLflow."""

import io
import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from mmdiff_ray import config as configuration
from mmdiff_ray.cli import parse
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.distributed.worker import WorkerHooks
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.tracking import queries, store
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.training.checkpoint import complete


@pytest.fixture(scope="module")
def facts(finished):
    return jobs.read_run(finished.folder)


@pytest.fixture(scope="module")
def client(facts):
    return store.client(facts["tracking_uri"])


@pytest.fixture(scope="module")
def record(client, facts):
    """Return the run as MLflow knows it."""
    return client.get_run(facts["run_id"])


def paths(client, run_id: str, folder: str = "") -> list[str]:
    return sorted(item.path for item in client.list_artifacts(run_id, folder))


def test_there_is_one_run_and_it_is_finished(client, record, finished):
    experiment = client.get_experiment(record.info.experiment_id)
    assert experiment.name == "mmdiff" and record.info.run_name == "tiny"
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [record.info.run_id]
    assert record.info.status == "FINISHED"
    assert record.data.tags["mmdiff.run_folder"] == str(finished.folder)


def test_settings_are_parameters_and_a_file_that_loads_again(client, record, finished, tmp_path):
    params = record.data.params
    assert params["train.samples"] == "160" and params["modalities.shape.type"] == "label"
    assert params["modalities.factors.dim"] == "9"  # what only the data know is filled in
    file = client.download_artifacts(record.info.run_id, "config.yaml", str(tmp_path))
    assert configuration.load([file]) == configuration.load([finished.folder / "config.yaml"])


def test_data_set_is_named_by_its_digest(record, sprites):
    (found,) = record.inputs.dataset_inputs
    manifest = read_manifest(sprites)
    assert manifest.digest.startswith(found.dataset.digest) and found.dataset.name == "sprites"
    profile = json.loads(found.dataset.profile)
    assert profile["manifest_sha256"] == manifest.digest
    assert profile["rows"] == {split: facts.rows for split, facts in manifest.splits.items()}


def test_losses_speed_and_held_out_losses_are_recorded_at_their_samples(facts):
    def steps(key: str) -> list[int]:
        return [step for step, _ in queries.history(facts["tracking_uri"], facts["run_id"], key)]

    every = [32, 64, 96, 128, 160]
    for key in ("loss/total", "loss/l1/pixels", "loss/l2/shape", "loss/l0/shapes", "loss/l3/pixels"):
        assert steps(key) == every
    for key in ("grad_norm", "learning_rate", "samples_per_s", "data_wait_share"):
        assert steps(f"train/{key}") == every
    assert steps("val/loss/total") == steps("val/loss/l2/factors") == [64, 128, 160]


@pytest.mark.parametrize("wanted", [True, False])
def test_load_of_the_machine_is_recorded_by_the_first_worker_where_asked(finished, wanted):
    job = jobs.load_job(finished.folder, [f"tracking.system_metrics={str(wanted).lower()}"])
    hooks = WorkerHooks(job, [], lambda event: None, lambda: False)
    assert (hooks.monitor is not None) == wanted and hooks.tracker is not None
    hooks.close()


def test_headline_figures_are_metrics_and_all_figures_stand_in_a_table_beside_their_baselines(
    client, record, finished, tmp_path
):
    metrics = record.data.metrics
    headlines = {"shapes.miou", "shape.accuracy", "factors.cosine"}
    assert {key.removeprefix("eval/") for key in metrics if key.startswith("eval/")} == headlines
    written = json.loads((finished.folder / "evaluation.json").read_text())
    assert written["samples_seen"] == 160
    by_key = {figure["key"]: figure for figure in written["figures"]}
    assert by_key["shape/accuracy"]["value"] == metrics["eval/shape.accuracy"]

    table = json.loads(
        Path(client.download_artifacts(record.info.run_id, "evaluation/figures.json", tmp_path)).read_text()
    )
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {row["figure"] for row in rows} == set(by_key)
    (label,) = [row for row in rows if row["figure"] == "shape/accuracy"]
    known = by_key["shape/accuracy"]
    assert label["rule"] == "majority class" and label["better"] == "higher"
    assert label["model"] == pytest.approx(known["value"], rel=1e-3)
    assert label["baseline"] == pytest.approx(known["floors"]["majority class"], rel=1e-3)


def test_the_description_says_what_was_trained_how_good_it_is_and_what_to_type(record, finished):
    text = record.data.tags["mlflow.note.content"]
    assert text.startswith("**tiny**: joint diffusion of pixels (image), shapes (mask), shape (label), ")
    assert " Trained on sprites at 8 x 8 with unet nano, 160 samples.\n" in text
    accuracy = record.data.metrics["eval/shape.accuracy"]
    assert f"shape/accuracy \N{UPWARDS ARROW} **{accuracy:.3f}** (majority class: 0." in text
    commands = [line.partition("`")[2].strip("`") for line in text.splitlines() if ": `mmdiff " in line]
    where = finished.folder
    assert commands == [f"mmdiff sample {where} --num 16", f"mmdiff train --resume {where}"]
    for command in commands:
        parse(shlex.split(command)[1:])


def test_pictures_were_taken_along_the_way_and_at_the_end(client, record, finished):
    names = sorted(path.name for path in (finished.folder / "pictures").iterdir())
    assert names == [
        "joint-000000064.png",
        "joint-000000128.png",
        "joint.png",
        "masks_from_pixels-000000064.png",
        "masks_from_pixels-000000128.png",
        "masks_from_pixels.png",
    ]
    sent = "".join(paths(client, record.info.run_id, "images"))
    for step in (64, 128, 160):
        assert f"images/samples~joint+step+{step}+" in sent
        assert f"images/samples~masks_from_pixels+step+{step}+" in sent
    assert "evaluation/joint.png" in paths(client, record.info.run_id, "evaluation")


def test_model_loads_in_mlflow_and_samples(record, facts, monkeypatch):
    import mlflow
    import pandas

    monkeypatch.setenv("MLFLOW_TRACKING_URI", facts["tracking_uri"])
    model = mlflow.pyfunc.load_model(f"runs:/{record.info.run_id}/model")
    joint = model.predict(pandas.DataFrame(), params={"num": 3, "steps": 2})
    assert sorted(joint.columns) == ["factors", "pixels", "shape", "shapes"] and len(joint) == 3
    assert Image.open(io.BytesIO(joint["pixels"][0])).size == (8, 8)
    stars = model.predict(pandas.DataFrame({"shape": ["star", "ring"]}), params={"num": 2, "steps": 2})
    assert stars["shape"].tolist() == ["star", "star", "ring", "ring"]


def test_folder_holds_checkpoints_and_an_export_and_nothing_half_done(finished):
    assert [int(path.name) for path in complete(finished.folder / "checkpoints")][-1] == 160
    assert json.loads((finished.folder / "export" / "facts.json").read_text())["state"] == "finished"
    assert jobs.read_run(finished.folder)["state"] == "finished"
    assert list(finished.folder.rglob("*.partial")) == []
    assert Log(finished.folder / "tracking").waiting == 0  # all that was recorded has been sent


def test_last_lines_say_what_was_made_and_what_to_type_next(finished):
    lines = finished.output.splitlines()
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[-4:]}
    assert said["run"].endswith("runs/tiny") and said["pictures"].endswith("runs/tiny/pictures")
    assert said["next"].startswith("mmdiff sample ") and said["next"].endswith("tiny --num 16")
    assert said["MLflow"] == f"mmdiff ui --runs {finished.runs}"
    assert "shape/accuracy" in finished.output and "majority class" in finished.output
