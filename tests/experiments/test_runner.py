"""The runner with real training: a table from cells, the same after a kill, cells made elsewhere, MLflow."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmdiff_ray.cli import main
from mmdiff_ray.experiments import cell as cells
from mmdiff_ray.experiments import table
from mmdiff_ray.experiments.archive import pack, unpack
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.experiments.measurement import measure_cell
from mmdiff_ray.experiments.page import markdown
from mmdiff_ray.storage.lock import lock_folder
from mmdiff_ray.tracking import store
from tests.sprites import MODEL

SAMPLES = 96
PLAIN = {
    "name": "small",
    "title": "Small",
    "question": "Does it run?",
    "base": {
        "space": {"height": 8, "width": 8},
        "modalities": {"pixels": {"type": "image"}, "masked": {"type": "masked_image"}},
        "tasks": {
            "generate": {"roles": {"pixels": "generated"}},
            "restore": {"drop": 0, "roles": {"masked": "given", "pixels": "generated"}},
        },
        "model": MODEL,
        "train": {"samples": SAMPLES, "global_batch": 16, "warmup_samples": 16, "log_every_samples": 32},
        "checkpoint": {"every_samples": 32},
        "evaluate": {"rows": 10, "steps": 2, "repeats": 2},
        "workers": {"count": 0, "threads": 1},
    },
    "presets": {"smoke": {"seeds": [0, 1], "overrides": []}},
    "methods": {
        "both": {"title": "both tasks"},
        "alone": {"title": "restoration alone", "overrides": ["tasks.generate.frequency=0"]},
        "asked": {"title": "both, asked", "model": "both", "overrides": ["evaluate.inpaint=repaint"]},
    },
    "measures": {
        name: {
            "evaluators": ["restoration"],
            "overrides": [
                "modalities.masked.holes=[blocks]",
                f"modalities.masked.ratio=[{ratio}, {ratio}]",
            ],
        }
        for name, ratio in (("a third", 0.3), ("most", 0.8))
    },
    "watch": {"both": ["generate", "restore"], "alone": ["restore"]},
    "matrices": [
        {
            "name": "holes",
            "title": "Holes by size",
            "rows": {"a third": "three tenths", "most": "four fifths"},
            "columns": {"pixels_from_masked/lpips": "LPIPS"},
        }
    ],
    "overview": {"LPIPS": {"measure": "most", "figure": "pixels_from_masked/lpips"}},
    "curves": [
        {
            "name": "lpips",
            "title": "Holes",
            "figure": "pixels_from_masked/lpips",
            "x": "share",
            "points": {"a third": 0.3, "most": 0.8},
        }
    ],
}


@pytest.fixture(scope="module")
def written(sprites, tmp_path_factory) -> Path:
    """Return a folder with the experiment's file."""
    folder = tmp_path_factory.mktemp("experiment")
    plain = {**PLAIN, "base": {**PLAIN["base"], "data": {"sources": [{"uri": sprites}]}}}
    (folder / "small.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def done(written, ray_cluster) -> Path:
    """Return the folder with the experiment's result."""
    assert main(words(written)) == 0
    return written


def words(folder: Path, *more: str) -> list[str]:
    arguments = [
        "experiment",
        str(folder / "small.yaml"),
        "--preset",
        "smoke",
        "--runs",
        str(folder / "runs"),
    ]
    return [*arguments, "--out", str(folder / "result"), *more]


def result(folder: Path, name: str = "result") -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.ray
@pytest.mark.slow
def test_a_table_holds_every_method_rule_and_cost(done):
    found = result(done)
    assert found["missing"] == []
    assert {(cell["method"], cell["seed"], cell["samples_seen"]) for cell in found["cells"]} == {
        (method, seed, SAMPLES) for method in ("both", "alone") for seed in (0, 1)
    }
    lines = {
        (line["measure"], line["method"]): line
        for line in found["figures"]
        if line["figure"] == "pixels_from_masked/lpips"
    }
    assert {method for _, method in lines} == {
        "both",
        "alone",
        "asked",
        "rule: mean visible colour",
        "rule: nearest visible pixel",
        "rule: biharmonic",
    }
    for line in lines.values():
        assert line["seeds"] == [0, 1] and line["rows"] == 10
        assert np.mean(line["values"]) == pytest.approx(line["mean"])
        assert line["interval"][0] <= line["mean"] <= line["interval"][1]
        if line["method"] != "both":
            assert line["difference"] == pytest.approx(lines[line["measure"], "both"]["mean"] - line["mean"])
    harder, easier = (lines[measure, "rule: mean visible colour"]["mean"] for measure in ("most", "a third"))
    assert harder > easier
    page = (done / "result.md").read_text()
    assert "| both tasks |" in page and "| both, asked |" in page and "## Cost" in page
    assert "| three tenths |" in page and page.index("## Holes by size") < page.index("## Cost")
    assert all(cell["gflops"] > 0 for cell in found["cells"])
    assert page.index("result-overview.png") < page.index("result-lpips.png") < page.index("## a third")
    for name in ("overview", "lpips", "tasks", "conflict"):
        assert (done / f"result-{name}.png").stat().st_size > 5000


@pytest.mark.ray
@pytest.mark.slow
def test_tasks_are_watched_while_cells_train(done):
    watched = result(done)["watched"]
    assert set(watched) == {"both", "alone"}
    for method, tasks in (("both", {"generate", "restore"}), ("alone", {"restore"})):
        points = watched[method]
        assert [point["samples"] for point in points] == sorted({point["samples"] for point in points})
        assert points[-1]["samples"] == SAMPLES and len(points) >= 3
        assert all(set(point["losses"]) == tasks and point["seeds"] == 2 for point in points)
        assert points[-1]["losses"]["restore"] < points[0]["losses"]["restore"]
    assert set(watched["both"][0]["cosines"]) == {"generate~restore"} and watched["alone"][0]["cosines"] == {}


@pytest.mark.ray
@pytest.mark.slow
def test_a_cell_in_training_shortens_no_curve(done, tmp_path):
    runs = shutil.copytree(done / "runs", tmp_path / "runs")
    folder = runs / "small-smoke" / "both-1"
    (folder / "export" / "facts.json").unlink()
    points = json.loads((folder / "watched.json").read_text())
    (folder / "watched.json").write_text(json.dumps(points[:1]))
    left = table.watched(load_experiment(str(done / "small.yaml"), "smoke"), runs)["both"]
    assert [point["seeds"] for point in left] == [1] * len(points)


@pytest.mark.ray
@pytest.mark.slow
def test_cells_are_child_runs_of_one_run_with_losses_and_figures(done):
    uri = f"sqlite:///{done / 'runs' / 'mlflow.db'}"
    client = store.client(uri)
    experiment = client.get_experiment_by_name("experiment-small")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"small-smoke", "both-0", "alone-0", "both-1", "alone-1"}
    parent = runs.pop("small-smoke")
    assert parent.info.status == "FINISHED"
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id and run.info.status == "FINISHED"
        assert "loss/total" in run.data.metrics
    assert "asked.most/pixels_from_masked/lpips" in runs["both-0"].data.metrics
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "result")] == [
        "result/result-conflict.png", "result/result-lpips.png", "result/result-overview.png",
        "result/result-tasks.png",
        "result/result.cells.zip", "result/result.json", "result/result.md",
    ]  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_run_trains_nothing_and_has_the_same_result(done):
    before = result(done)
    weights = done / "runs" / "small-smoke" / "both-0" / "export" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert main(words(done)) == 0
    assert result(done) == before and weights.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_cell_made_elsewhere_in_one_process_counts_in_the_table(done, tmp_path):
    file, runs = str(done / "small.yaml"), tmp_path / "runs"
    assert cells.main([file, "both", "0", "--preset", "smoke", "--runs", str(runs)]) == 0
    folder = "runs/small-smoke/both-0/export"
    ours, theirs = (
        np.frombuffer((place / folder / "model.safetensors").read_bytes(), np.uint8)
        for place in (done, tmp_path)
    )
    assert np.array_equal(ours, theirs)
    shutil.copytree(done / "runs", tmp_path / "all")
    shutil.rmtree(tmp_path / "all" / "small-smoke" / "both-0")
    experiment = load_experiment(file, "smoke")
    assert table.result(experiment, tmp_path / "all")["missing"] == ["both-0"]
    shutil.copytree(runs / "small-smoke" / "both-0", tmp_path / "all" / "small-smoke" / "both-0")
    half = table.result(experiment, tmp_path / "all")
    assert (half["missing"], half["unmeasured"]) == ([], ["both-0"])
    assert "Trained, not measured yet: both-0." in markdown(half)
    cell = experiment.cells()[0]
    measure_cell(experiment, cell, tmp_path / "all", print)
    merged = table.result(experiment, tmp_path / "all")
    assert merged["missing"] == merged["unmeasured"] == []
    assert merged["figures"] == result(done)["figures"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_method_is_added_to_a_table_whose_models_are_elsewhere(done, tmp_path, capsys):
    shutil.copy(done / "result.cells.zip", tmp_path)
    plain = yaml.safe_load((done / "small.yaml").read_text())
    plain["presets"]["smoke"]["seeds"] = [0]
    plain["methods"]["quick"] = {"title": "both, quickly", "overrides": ["train.learning_rate=0.01"]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    assert main(words(tmp_path)) == 0
    assert "2 of 3 cells restored from" in capsys.readouterr().out
    models = {file.parts[-3] for file in tmp_path.glob("runs/small-smoke/*/export/model.safetensors")}
    assert models == {"quick-0"}
    found, before = result(tmp_path), result(done)
    assert found["missing"] == found["unmeasured"] == []
    kept = {(c["method"], c["seed"]): c for c in before["cells"]}
    for cell in found["cells"]:
        assert cell["method"] == "quick" or cell == kept[cell["method"], cell["seed"]]
    methods = {line["method"] for line in found["figures"]}
    assert {"both", "alone", "asked", "quick", "rule: biharmonic"} == {
        name for name in methods if name.startswith("rule: bi") or "rule" not in name
    }


@pytest.mark.slow
def test_a_cell_whose_model_is_elsewhere_is_trained_again_for_another_measure(done, tmp_path):
    shutil.copy(done / "result.cells.zip", tmp_path)
    file, runs = str(done / "small.yaml"), tmp_path / "runs"
    experiment = load_experiment(file, "smoke")
    cell = experiment.cells()[0]
    folder = experiment.folder(runs, cell)
    assert unpack(experiment, runs, tmp_path / "result") == 4
    assert unpack(experiment, runs, tmp_path / "result") == 0
    config = (folder / "export" / "config.yaml").read_text()
    assert str(done) not in config and "runs: runs\n" in config
    assert table.result(experiment, runs)["figures"] == result(done)["figures"]
    pack(experiment, runs, tmp_path / "again")
    assert (tmp_path / "again.cells.zip").read_bytes() == (tmp_path / "result.cells.zip").read_bytes()

    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "result.cells.zip", tmp_path / "elsewhere")
    pack(experiment, tmp_path / "elsewhere", tmp_path / "elsewhere" / "result")  # has no cell, and drops none
    assert unpack(experiment, tmp_path / "elsewhere", tmp_path / "elsewhere" / "result") == 4

    next(folder.glob("measured/asked.most.json")).unlink()
    pack(experiment, runs, tmp_path / "result")
    assert (tmp_path / "again.cells.zip").read_bytes() == (tmp_path / "result.cells.zip").read_bytes()
    assert table.result(experiment, runs)["unmeasured"] == ["both-0"]
    cells.run_cell(experiment, cell, runs, True, print)
    assert (folder / "export" / "model.safetensors").is_file()
    assert table.result(experiment, runs)["figures"] == result(done)["figures"]


@pytest.mark.slow
def test_a_killed_cell_resumes_and_ends_with_the_same_model(done, tmp_path):
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "mmdiff_ray.experiments.cell", str(done / "small.yaml"), "alone", "1"]
    command += ["--preset", "smoke", "--runs", str(runs)]
    folder = runs / "small-smoke" / "alone-1"
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/*/state.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_before_its_end = not (folder / "export").exists()
    assert cells.main([*command[3:]]) == 0
    export = "runs/small-smoke/alone-1/export/model.safetensors"
    assert (tmp_path / export).read_bytes() == (done / export).read_bytes()
    assert killed_before_its_end or process.returncode == 0


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_runner_resumes_and_ends_with_the_same_table(done, tmp_path, number):
    shutil.copy(done / "small.yaml", tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    log = tmp_path / "log"
    with log.open("w") as out:
        runner = subprocess.Popen(
            [sys.executable, "-m", "mmdiff_ray.cli", *words(tmp_path)],
            stdout=out, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        deadline = time.monotonic() + 200
        while not (ended := list(tmp_path.glob("runs/small-smoke/*/export/facts.json"))):
            assert time.monotonic() < deadline and runner.poll() is None, log.read_text()
            time.sleep(0.05)
        runner.send_signal(number)
        assert runner.wait(60) == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    parent = json.loads((tmp_path / "runs/small-smoke/tracking/run.json").read_text())["run_id"]
    server = store.client(store.tracking_uri(None, tmp_path / "runs"))
    if number == signal.SIGTERM:
        assert (
            "stopped; run the same command to resume" in log.read_text()
            and "Traceback" not in log.read_text()
        )
        assert server.get_run(parent).info.status == "KILLED"
    assert not (tmp_path / "result.json").exists()
    trained = {file: file.stat().st_mtime_ns for file in ended}
    assert main(words(tmp_path)) == 0
    assert {file: file.stat().st_mtime_ns for file in ended} == trained
    assert result(tmp_path)["figures"] == result(done)["figures"]
    assert server.get_run(parent).info.status == "FINISHED"


@pytest.mark.slow
def test_a_second_runner_is_refused_and_changes_nothing(done, capsys):
    before = (done / "result.json").read_bytes()
    with lock_folder(done / "runs" / "small-smoke"):
        assert main(words(done)) == 2
    assert "works on it" in capsys.readouterr().err
    assert (done / "result.json").read_bytes() == before
    uri = store.tracking_uri(None, done / "runs")
    parent = json.loads((done / "runs/small-smoke/tracking/run.json").read_text())["run_id"]
    assert store.client(uri).get_run(parent).info.status == "FINISHED"


@pytest.mark.slow
def test_a_table_of_fewer_cells_replaces_none_of_more(done, tmp_path, capsys):
    shutil.copy(done / "result.json", tmp_path)
    assert (
        main(words(done, "--table", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "result"))) == 0
    )
    assert f"{tmp_path / 'result.json'} is kept: it has 4 cells, this result has 0" in capsys.readouterr().out
    assert result(tmp_path) == result(done)
    assert (tmp_path / "runs" / "small-smoke" / "small.md").is_file()


@pytest.mark.slow
def test_other_settings_than_those_a_cell_was_trained_with_are_refused(done, tmp_path, capsys):
    plain = yaml.safe_load((done / "small.yaml").read_text())
    plain["base"]["train"]["samples"] = 2 * SAMPLES
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    runs = str(done / "runs")
    assert cells.main([str(tmp_path / "small.yaml"), "both", "0", "--preset", "smoke", "--runs", runs]) == 2
    assert "was trained with settings that differ from the experiment's" in capsys.readouterr().err
