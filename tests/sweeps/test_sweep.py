"""Sweeps for real: on two nodes, cut short and gone on with, populations, larger trials, reports."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mmdiff_ray.cli import main
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.sweeps.journal import Trial, read_trials
from mmdiff_ray.sweeps.record import read_record
from mmdiff_ray.sweeps.spec import load_sweep
from mmdiff_ray.tracking.store import client
from mmdiff_ray.training.checkpoint import complete
from tests.surroundings import is_somebodys
from tests.sweeps import tiny
from tests.sweeps.tiny import WEIGHTS

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def nodes() -> Iterator[str]:
    """Return the address of a cluster of two nodes of two CPUs each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield cluster.address
    cluster.shutdown()


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "mmdiff_ray.cli", "sweep", *words]


def run(address: str, *words: str, code: int = 0) -> str:
    """Run `mmdiff sweep` on a cluster and return what it printed; of one that failed, its errors."""
    ended = subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_ADDRESS": address},
        timeout=400,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stderr if code else ended.stdout


@pytest.fixture(scope="module")
def done(nodes, sprites, tmp_path_factory) -> tuple[Path, str]:
    """Return the folder of a finished sweep on two nodes, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    file = tiny.write(folder, sprites, budget__trials=6, base__evaluate__evaluators=["calibration", "joint"])
    out = run(nodes, str(file), "--runs", str(folder / "runs"))
    return folder / "runs" / "sweeps" / "tiny", out


def test_all_trials_end_after_one_read_of_the_data_and_worse_ones_are_stopped(done, sprites):
    folder, out = done
    trials = list(read_trials(folder))
    assert [trial.number for trial in trials] == list(range(6))
    finished = [trial for trial in trials if trial.outcome == "finished"]
    stopped = [trial for trial in trials if trial.outcome == "stopped"]
    assert stopped and len(finished) + len(stopped) == 6
    assert all([r["samples"] for r in trial.reports] == [16, 32, 48, 64] for trial in finished)
    for trial in stopped:
        assert trial.samples < 64
        reports = [report for other in trials for report in other.reports]
        then = [one["figures"]["shape/head_nll"] for one in reports if one["samples"] == trial.samples]
        assert min(then) < trial.figures["shape/head_nll"]
    best = min(finished, key=lambda trial: trial.figures["shape/head_nll"])
    assert f"Best: trial {best.number} with shape/head_nll" in out
    manifest = read_manifest(sprites)
    groups = sum(len(shard.row_groups) for split in manifest.splits.values() for shard in split.shards)
    reads = int(re.search(r"data: (\d+) row groups read from storage for all trials", out)[1])
    assert 0 < reads <= groups


def test_trials_are_child_runs_that_mlflow_can_compare(done):
    folder, _ = done
    facts = json.loads((folder / "sweep.json").read_text())
    record = read_record(facts["tracking_uri"], "tiny")
    assert record.run_id == facts["run_id"] and len(record.trials) == 6
    for ours, theirs in zip(read_trials(folder), record.trials, strict=True):
        assert (ours.number, ours.values, ours.outcome) == (theirs.number, theirs.values, theirs.outcome)
        for mine, other in zip(ours.reports, theirs.reports, strict=True):
            assert mine["samples"] == other["samples"]
            assert other["figures"]["shape/head_nll"] == pytest.approx(mine["figures"]["shape/head_nll"])
    from mmdiff_ray.tracking import queries

    parent = queries.find_run(facts["tracking_uri"], facts["run_id"])
    assert parent.info.status == "FINISHED" and "best/shape/head_nll" in parent.data.metrics
    trials = {trial.run_id: trial for trial in record.trials}
    for child in queries.children(facts["tracking_uri"], parent):
        assert child.info.status == "FINISHED" and f"{WEIGHTS}.scale" in child.data.params
        files = client(facts["tracking_uri"]).list_artifacts(child.info.run_id, "images")
        drawn = {int(re.search(r"step[%+](\d+)", file.path)[1]) for file in files}
        assert drawn == {report["samples"] for report in trials[child.info.run_id].reports}


def test_the_report_is_made_again_from_mlflow_alone(done, tmp_path, monkeypatch, capsys):
    folder, _ = done
    uri = json.loads((folder / "sweep.json").read_text())["tracking_uri"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main(["sweep", "report", "tiny", "--runs", str(tmp_path / "elsewhere")]) == 0
    again = tmp_path / "elsewhere" / "sweeps" / "tiny" / "report"
    assert json.loads((again / "results.json").read_text()) == json.loads(
        (folder / "report" / "results.json").read_text()
    )
    page = (again / "report.html").read_text()
    assert "<h1>Tiny</h1>" in page and "cdn" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert {path.name for path in again.glob("*.png")} >= {"trials.png", "timeline.png", "weights.png"}
    assert "Best: trial" in capsys.readouterr().out


def test_the_best_configuration_trains(done, tmp_path, capsys):
    best = sorted((done[0] / "report" / "best").glob("*.yaml"))[0]
    assert main(["train", str(best), f"runs={tmp_path / 'runs'}", "workers.count=0"]) == 0
    assert "shape/head_nll" in capsys.readouterr().out


@pytest.mark.faults
def test_a_driver_that_is_killed_in_mid_sweep_loses_nothing_that_ended(nodes, sprites, tmp_path):
    file = tiny.write(tmp_path, sprites, budget__trials=5, budget__concurrent=2)
    runs = tmp_path / "runs"
    folder = runs / "sweeps" / "tiny"
    process = subprocess.Popen(
        command(str(file), "--runs", str(runs)), env={**os.environ, "RAY_ADDRESS": nodes},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while sum(trial.outcome is not None for trial in read_trials(folder)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {trial.number: trial for trial in read_trials(folder) if trial.outcome is not None}
    out = run(nodes, "--resume", "tiny", "--runs", str(runs))
    after = {trial.number: trial for trial in read_trials(folder)}
    assert sorted(after) == list(range(5)) and all(trial.outcome for trial in after.values())
    for number, trial in before.items():
        assert after[number] == trial, "an ended trial was done again"
        assert f"trial {number}:" not in out
    for trial in after.values():
        samples = [report["samples"] for report in trial.reports]
        assert samples == sorted(set(samples))
    facts = json.loads((folder / "sweep.json").read_text())
    assert len(read_record(facts["tracking_uri"], facts["run_id"]).trials) == 5


def test_a_trial_whose_process_is_killed_goes_on_from_its_last_report(nodes, sprites, tmp_path):
    file = tiny.write(
        tmp_path, sprites, budget={"trials": 2, "samples": 320, "reports": 10}, scheduler__name="fifo"
    )
    runs = tmp_path / "runs"
    folder = runs / "sweeps" / "tiny"
    process = subprocess.Popen(
        command(str(file), "--runs", str(runs)), env={**os.environ, "RAY_ADDRESS": nodes},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not any(len(trial.reports) > 1 for trial in read_trials(folder)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    mine = psutil.Process().children(recursive=True)
    trainers = [one for one in mine if one.name().startswith("ray::Implicit")]
    before = {trial.number: trial.reports for trial in read_trials(folder)}
    assert trainers
    for one in trainers:
        one.kill()
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    after = list(read_trials(folder))
    assert [trial.outcome for trial in after] == ["finished", "finished"], out
    for trial in after:
        kept = before.get(trial.number, [])
        assert trial.reports[: len(kept)] == kept
        assert [report["samples"] for report in trial.reports] == list(range(32, 321, 32))


def test_the_quickstart_finds_a_classifier_on_two_nodes(nodes, tmp_path):
    file = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"
    ended = subprocess.run(
        command(str(file), "--runs", str(tmp_path / "runs")), capture_output=True, text=True,
        env={**os.environ, "RAY_ADDRESS": nodes}, cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    folder = tmp_path / "runs" / "sweeps" / "quickstart"
    results = json.loads((folder / "report" / "results.json").read_text())
    trials = list(read_trials(folder))
    assert len(trials) == 12 and any(trial.outcome == "stopped" for trial in trials)
    best = max(trial.reports[-1]["figures"]["label/head_accuracy"] for trial in trials)
    assert best > 0.6 and results["front"] and (folder / "report" / "report.html").is_file()
    assert [trial.number for trial in trials if not trial.values] == [0]
    assert re.search(r"The base configuration itself \(trial 0.*\): label/head_accuracy 0\.\d", ended.stdout)


@pytest.mark.faults
def test_an_interrupted_sweep_ends_cleanly_with_what_is_known(nodes, sprites, tmp_path):
    file = tiny.write(tmp_path, sprites, budget__trials=50, budget__concurrent=1, scheduler__name="fifo")
    runs = tmp_path / "runs"
    process = subprocess.Popen(
        command(str(file), "--runs", str(runs)), env={**os.environ, "RAY_ADDRESS": nodes},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not any(trial.outcome == "finished" for trial in read_trials(runs / "sweeps" / "tiny")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    assert "works on it" in run(nodes, "--resume", "tiny", "--runs", str(runs), code=2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert "Traceback" not in out and "Best: trial" in out and "resume with: mmdiff sweep --resume" in out
    open_ones = [trial for trial in read_trials(runs / "sweeps" / "tiny") if trial.outcome is None]
    for trial in open_ones:
        assert f"trial {trial.number}: interrupted at" in out
    assert {"RUNNING"}.isdisjoint(statuses(runs / "sweeps" / "tiny"))
    begun = len(list(read_trials(runs / "sweeps" / "tiny")))
    run(nodes, "--resume", "tiny", f"budget.trials={begun + 2}", "--runs", str(runs))
    after = {trial.number: trial for trial in read_trials(runs / "sweeps" / "tiny")}
    assert len(after) == begun + 2 and {trial.outcome for trial in after.values()} == {"finished"}
    assert len({json.dumps(trial.values) for trial in after.values()}) == begun + 2, "drawn once more"
    assert load_sweep(runs / "sweeps" / "tiny" / "sweep.yaml").budget.trials == begun + 2
    assert set(statuses(runs / "sweeps" / "tiny")) == {"FINISHED"}
    for trial in open_ones:  # went on from what it had
        assert after[trial.number].reports[: len(trial.reports)] == trial.reports


def statuses(folder: Path) -> list[str]:
    """Return the status of a sweep's run and of its trials' in MLflow."""
    from mmdiff_ray.tracking import queries

    facts = json.loads((folder / "sweep.json").read_text())
    parent = queries.find_run(facts["tracking_uri"], facts["run_id"])
    return [run.info.status for run in [parent, *queries.children(facts["tracking_uri"], parent)]]


@pytest.mark.faults
def test_an_interrupted_population_goes_on_where_each_member_stood(nodes, sprites, tmp_path):
    space = {f"{WEIGHTS}.scale": {"loguniform": [0.02, 0.5]}}
    file = tiny.write(
        tmp_path, sprites, space=space, scheduler={"name": "pbt", "grace": 0.2, "quantile": 0.5},
        budget={"trials": 3, "samples": 192, "reports": 6},
    )  # fmt: skip
    folder = tmp_path / "runs" / "sweeps" / "tiny"
    process = subprocess.Popen(
        command(str(file), "--runs", str(tmp_path / "runs")), env={**os.environ, "RAY_ADDRESS": nodes},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while sum(len(trial.reports) > 2 for trial in read_trials(folder)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    before = {trial.number: trial for trial in read_trials(folder)}
    copied = [change for trial in before.values() for change in trial.changes]
    copying = [trial.copying for trial in before.values() if trial.copying]  # is begun again
    copied += [{"at": one["samples"], "source": one["number"]} for one in copying]
    run(nodes, "--resume", "tiny", "--runs", str(tmp_path / "runs"))
    for trial in read_trials(folder):
        assert trial.outcome == "finished", trial.why
        assert [report["samples"] for report in trial.reports] == list(range(32, 193, 32))
        for place, change in enumerate(trial.changes):
            donor = before.get(change["source"], Trial(change["source"], {}))
            as_it_was = all(earlier in donor.changes for earlier in trial.changes[:place])
            new = change not in copied and {key: change[key] for key in ("at", "source")} not in copied
            if new and as_it_was:  # nobody copied a state that the donor had left behind
                assert change["at"] >= donor.samples


def test_a_population_copies_checkpoints_and_its_schedule_can_be_trained_again(nodes, sprites, tmp_path):
    space = {
        f"{WEIGHTS}.scale": {"loguniform": [0.02, 0.5]},
        "loss.modalities.shape": {"loguniform": [0.01, 1]},
    }
    file = tiny.write(
        tmp_path, sprites, space=space, scheduler={"name": "pbt", "grace": 0.2, "quantile": 0.5},
        budget={"trials": 3, "samples": 64, "reports": 4},
        base__evaluate={"evaluators": ["calibration", "bound", "labels"], "rows": 8, "steps": 2},
    )  # fmt: skip
    run(nodes, str(file), "--runs", str(tmp_path / "runs"))
    folder = tmp_path / "runs" / "sweeps" / "tiny"
    trials = {trial.number: trial for trial in read_trials(folder)}
    assert {trial.outcome for trial in trials.values()} == {"finished"}
    copied = [
        (trial, change)
        for trial in trials.values()
        for change in trial.changes
        if change["source"] != trial.number
    ]
    assert copied, "nothing was copied"
    for trial, change in copied:
        donor = trials[change["source"]]
        shared = [report for report in trial.reports if report["samples"] <= change["at"]]
        if donor.changes == [] or donor.changes[-1]["at"] < change["at"]:
            assert shared == [report for report in donor.reports if report["samples"] <= change["at"]]
        assert complete(folder / "trials" / f"{trial.number:04d}" / "checkpoints")
    changed = [
        sorted((folder / "report" / "best").glob(f"*-trial-{trial.number}.yaml")) for trial, _ in copied
    ]
    files = [path for paths in changed for path in paths]
    assert files and main(["train", str(files[0]), f"runs={tmp_path / 'again'}", "workers.count=0"]) == 0
    number = int(files[0].stem.split("-")[-1])
    (evaluated,) = (tmp_path / "again").glob("*/evaluation.json")
    found = {figure["key"]: figure["value"] for figure in json.loads(evaluated.read_text())["figures"]}
    told = {k: v for k, v in trials[number].reports[-1]["figures"].items() if k in found}
    assert {"shape/head_nll", "shape/l1_nats"} <= told.keys()  # the latter by the weights at the end
    assert {key: found[key] for key in told} == pytest.approx(told, rel=1e-5)


@pytest.fixture
def watched_nodes(tmp_path_factory) -> Iterator[str]:
    """Return the address of a cluster of two nodes, with a cache each, whose dashboard is on."""
    from ray.cluster_utils import Cluster

    kept = [{"MMDIFF_CACHE": str(tmp_path_factory.mktemp("cache"))} for _ in range(2)]

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if is_somebodys(name)]:
            patch.delenv(name)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # whatever a test before this one asked for
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": True,
                "dashboard_port": 0,
                "env_vars": kept[0],
            },
        )
        cluster.add_node(num_cpus=2, env_vars=kept[1])
        with urllib.request.urlopen(f"http://{cluster.webui_url}/api/version") as page:
            assert "ray_version" in json.load(page)
        yield cluster.address
        cluster.shutdown()


@pytest.mark.faults
def test_a_trial_of_two_workers_that_is_stopped_makes_room_for_the_next_and_leaves_nothing_behind(
    watched_nodes, sprites, tmp_path
):
    file = tiny.write(
        tmp_path, sprites, scheduler__grace=0.5,
        base__workers={"count": 2, "cpus": 0.5, "data_workers": 1, "threads": 1},
        base__train={**tiny.PLAIN["base"]["train"], "global_batch": 16}, searcher__name="grid",
        space={"train.learning_rate": {"grid": [1e-9, 1e-2, 1.1e-9]}},
        budget={"trials": 3, "samples": 32, "reports": 2, "retries": 0, "concurrent": 1},
        base__tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    )  # fmt: skip
    out = run(watched_nodes, str(file), "--runs", f"file://{tmp_path}/storage")
    outcomes = [trial.outcome for trial in read_trials(f"file://{tmp_path}/storage/sweeps/tiny")]
    assert len(outcomes) == 3 and outcomes[:2] == ["finished", "stopped"], out
    free = subprocess.run(
        [sys.executable, "-c", FREE, watched_nodes], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(free.stdout.splitlines()[-1]) == [4.0, 4.0]


FREE = """
import json, sys, time, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
for _ in range(100):
    if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
        break
    time.sleep(0.2)
print(json.dumps([ray.available_resources().get("CPU"), ray.cluster_resources()["CPU"]]))
"""


def test_several_metrics_give_a_front(nodes, sprites, tmp_path):
    file = tiny.write(
        tmp_path, sprites, metrics={"shape/head_nll": "min", "shapes/code_agreement": "max"},
        searcher={"name": "tpe", "startup": 2}, base__evaluate__evaluators=["calibration", "joint"],
        budget={"trials": 4, "samples": 32, "reports": 2}, scheduler__name="fifo",
    )  # fmt: skip
    out = run(nodes, str(file), "--runs", str(tmp_path / "runs"))
    report = tmp_path / "runs" / "sweeps" / "tiny" / "report"
    results = json.loads((report / "results.json").read_text())
    assert results["front"] and (report / "pareto.png").is_file()
    front = results["front"]
    assert f"{len(front)} trial{'s are' if len(front) > 1 else ' is'} on the Pareto front." in out
    assert f"Trial {results['front'][0]}: " in out
    assert len(list((report / "best").glob("*.yaml"))) == len(results["front"])


def test_a_trial_that_diverges_is_told_and_stops_nothing(nodes, sprites, tmp_path):
    space = {"train.learning_rate": {"grid": [1e-3, 1e30]}}
    file = tiny.write(
        tmp_path, sprites, space=space, searcher__name="grid", scheduler__name="fifo",
        budget={"trials": 2, "samples": 64, "reports": 2},
    )  # fmt: skip
    out = run(nodes, str(file), "--runs", str(tmp_path / "runs"))
    trials = list(read_trials(tmp_path / "runs" / "sweeps" / "tiny"))
    assert [trial.outcome for trial in trials] == ["finished", "diverged"]
    assert "not finite" in trials[1].why and "trial 1: diverged" in out


def test_a_trial_that_does_not_fit_is_told_before_the_sweep_begins(nodes, sprites, tmp_path):
    file = tiny.write(tmp_path, sprites, base__workers={"count": 1, "cpus": 64})
    ended = subprocess.run(
        command(str(file), "--runs", str(tmp_path / "runs")), capture_output=True, text=True,
        env={**os.environ, "RAY_ADDRESS": nodes}, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "workers.cpus: 1 worker needs 64 CPUs, the cluster has" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_what_would_fail_later_is_told_before_anything_starts(sprites, tmp_path, capsys):
    for changes, words in (
        ({"metrics": {"shape/head_nl": "max"}}, "did you mean 'shape/head_nll'?"),
        ({"budget__reports": 9}, "budget.reports (9): 64 samples are 4 steps of 16 rows"),
        ({"base__workers": {"count": 1, "gpus": 1}}, "workers.gpus"),
        ({"space": {f"{WEIGHTS}.kappa": {"uniform": [1, 2]}}}, "has no effect in this configuration"),
        ({"base__workers": {"count": 99}}, "train.global_batch (16) must have a row for each of 99"),
        (
            {"base__workers": {"count": 1, "labels": {"kind": "a"}}},
            "workers.labels: Ray Tune places one-worker",
        ),
    ):
        file = tiny.write(tmp_path, sprites, **changes)
        assert main(["sweep", str(file), "--runs", str(tmp_path / "runs")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()
    assert main(["sweep", str(tiny.write(tmp_path, sprites)), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "0 invalid" in out and "nothing was started" in out and not (tmp_path / "runs").exists()
