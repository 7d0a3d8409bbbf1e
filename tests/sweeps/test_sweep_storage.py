"""Sweeps in storage: on nodes that share no disk, copied between them, gone on with from another machine."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmdiff_ray.cli import main
from mmdiff_ray.config import OutageError
from mmdiff_ray.distributed import launch
from mmdiff_ray.distributed.tune import trial as trials
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.storage.filesystem import join
from mmdiff_ray.storage.mirror import cached, mirror
from mmdiff_ray.sweeps.journal import Trial, number_of, read_trial, read_trials, write_trial
from mmdiff_ray.sweeps.spec import Sweep
from mmdiff_ray.tracking import store
from mmdiff_ray.training.remote_checkpoints import RemoteCheckpoints, copy_checkpoint, roll_back
from tests import s3
from tests import sprites as tiny_sprites
from tests.faults import faulty
from tests.sweeps import tiny
from tests.sweeps.tiny import WEIGHTS

SCALE = f"{WEIGHTS}.scale"


@pytest.fixture
def bucket(monkeypatch) -> Iterator[s3.Bucket]:
    """Yield an empty bucket."""
    for name, value in s3.KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with s3.serve() as bucket:
        yield bucket


def test_journals_in_storage_are_the_same_for_every_machine(tmp_path):
    for where in (tmp_path / "folder", f"file://{tmp_path}/storage/sweeps/tiny"):
        assert list(read_trials(where)) == [] and read_trial(where, 0) is None
        for number in (10, 2):
            write_trial(where, Trial(number, {"a": number}))
        assert [trial.number for trial in read_trials(where)] == [2, 10]
        assert read_trial(where, 10) == Trial(10, {"a": 10})
        assert [number_of(where, "x_1", number) for number in (4, 7)] == [4, 4]


def saved(uri: str, folder: Path, samples: int, run: str, mark: str, value: float) -> Path:
    """Write a checkpoint of one file here and, under a URI, in storage; return where it is here."""
    place = folder / "checkpoints" / f"{samples:012d}"
    (place / mark).mkdir(parents=True)
    torch.save(value, place / mark / "0.distcp")
    files = {f"{mark}/0.distcp": (place / mark / "0.distcp").stat().st_size}
    state = {"format_version": 1, "run": run, "mark": mark, "files": files}
    (place / "state.json").write_text(json.dumps(state))
    if uri:
        run_there = mirror(uri, folder)
        for name in (*files, "state.json"):
            run_there.send_file(f"checkpoints/{place.name}/{name}")
        assert run_there.uploads.flush(10) == []
    return place


def test_a_checkpoint_is_copied_from_storage_as_the_only_one_and_another_machines_saving_counts(tmp_path):
    where = f"file://{tmp_path}/storage"
    mine, theirs = tmp_path / "here", tmp_path / "there"
    saved(join(where, "donor"), theirs, 32, "donor", "d", 1.0)
    for samples in (32, 64):
        saved(join(where, "mine"), mine, samples, "mine", "m", 2.0)
    run = mirror(join(where, "mine"), mine)
    source = join(where, "donor", "checkpoints", f"{64:012d}")
    before = run.files("checkpoints")
    assert not copy_checkpoint(source, "donor", mine / "checkpoints", run, "mine")
    assert run.files("checkpoints") == before and len(list((mine / "checkpoints").iterdir())) == 2

    source = join(where, "donor", "checkpoints", f"{32:012d}")
    assert not copy_checkpoint(source, "what it was before", mine / "checkpoints", run, "mine")
    assert run.files("checkpoints") == before and len(list((mine / "checkpoints").iterdir())) == 2
    assert copy_checkpoint(source, "donor", mine / "checkpoints", run, "mine")
    (kept,) = (mine / "checkpoints").iterdir()
    assert kept.name == f"{32:012d}" and torch.load(kept / "d" / "0.distcp") == 1.0
    state = json.loads((kept / "state.json").read_text())
    assert (state["run"], state["mark"]) == ("mine", "d")
    assert set(run.files("checkpoints")) == {f"{kept.name}/{file}" for file in ("d/0.distcp", "state.json")}

    old = tmp_path / "old"  # a machine that this trial was on before
    for samples, mark in ((32, "m"), (64, "m")):
        saved("", old, samples, "mine", mark, 2.0)

    def latest(folder: Path) -> Path:
        there = mirror(join(where, "mine"), folder)
        return RemoteCheckpoints(there, "mine", keep_last=2, stored_only=True).latest()

    for machine in (mine, old, tmp_path / "new"):
        assert latest(machine) == machine / "checkpoints" / kept.name
        assert torch.load(machine / "checkpoints" / kept.name / "d" / "0.distcp") == 1.0
    roll_back(old / "checkpoints", mirror(join(where, "mine"), old), 32)
    assert [path.name for path in (old / "checkpoints").iterdir()] == [kept.name]
    (mine / "checkpoints" / kept.name / "state.json").unlink()  # is no checkpoint any more
    assert copy_checkpoint(source, "donor", mine / "checkpoints", run, "mine") and latest(mine) == kept


class Machines:
    """Machines, each with a cache of its own, that train the trials of one sweep, a report at a time.

    where: the sweep's address.
    """

    def __init__(self, sweep: Sweep, where: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.sweep, self.where, self.folder, self.patch = sweep, where, folder, patch
        self.store = f"sqlite:///{folder}/mlflow.db"

    def train(self, machine: str, number: int, samples: int) -> Path:
        """Train a trial to so many samples on a machine; return the folder of its run there."""
        self.patch.setenv("MMDIFF_CACHE", str(self.folder / machine))
        trial = read_trial(self.where, number) or Trial(number, {SCALE: 0.1 * (number + 1)})
        job = trials._job(self.sweep, self.where, trial, "parent", self.store, None)
        while trial.samples < samples:
            trial.reports.append(trials._segment(self.sweep, job, trial))
            write_trial(self.where, trial)
        return job.folder

    def copy(self, machine: str, number: int, source: int, samples: int) -> Trial:
        """Copy another trial's state after so many samples into a trial, on a machine; return the trial."""
        self.patch.setenv("MMDIFF_CACHE", str(self.folder / machine))
        trial = read_trial(self.where, number)
        pointer = {"number": source, "samples": samples, "values": {SCALE: 0.3}}
        trials._adopt(self.sweep, self.where, trial, pointer)
        return read_trial(self.where, number)


def interrupted(*words: Any) -> bool:
    """Copy, and be killed before anybody knows of it."""
    assert copy_checkpoint(*words)
    raise KeyboardInterrupt


def test_a_trial_whose_beginning_or_model_does_not_reach_storage_begins_or_goes_on_anew(
    bucket, sprites, tmp_path, monkeypatch
):
    sweep = tiny.sweep(tmp_path, sprites, budget={"trials": 1, "samples": 64, "reports": 2})
    with faulty(bucket.port) as network:
        where = bucket.uri("runs/sweeps/tiny", network.port)
        machines = Machines(sweep, where, tmp_path, monkeypatch)
        write_run = jobs.write_run

        def cut_off(job: jobs.Job, state: str) -> None:
            network.down = True
            write_run(job, state=state)

        with monkeypatch.context() as bad:
            bad.setattr(jobs, "write_run", cut_off)
            bad.setattr(trials, "OUTAGE_S", 1.0)
            with pytest.raises(OutageError, match=r"trials/0000.* does not take config.yaml, run.json"):
                machines.train("a", 0, 32)
        network.down = False
        assert read_trial(where, 0) is None
        machines.train("a", 0, 32)
        with monkeypatch.context() as bad:
            bad.setattr(launch, "work", lambda *_: "finished")  # its model stays where its worker was
            with pytest.raises(OutageError, match=r"trials/0000.* has no model newer than 32 samples"):
                machines.train("a", 0, 64)
        machines.train("b", 0, 64)
        assert [report["samples"] for report in read_trial(where, 0).reports] == [32, 64]
    client = store.client(machines.store)
    runs = client.search_runs([client.get_experiment_by_name(f"sweep-{sweep.name}").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "RUNNING"]


@pytest.mark.slow
def test_a_trial_copies_another_and_moves_between_machines_as_it_would_in_one_folder(
    sprites, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    sweep = tiny.sweep(
        tmp_path, sprites, space={SCALE: {"loguniform": [0.02, 0.5]}},
        scheduler={"name": "pbt", "grace": 0.25, "quantile": 0.5},
        budget={"trials": 2, "samples": 128, "reports": 4},
    )  # fmt: skip
    found = []
    for where in (f"{tmp_path}/sweeps/tiny", f"file://{tmp_path}/storage/sweeps/tiny"):
        machines = Machines(sweep, where, tmp_path, monkeypatch)
        machines.train("a", 0, 64)
        machines.train("b", 1, 64)  # leaves checkpoints on b which are soon not those of this trial
        before = read_trial(where, 1)
        assert machines.copy("c", 1, 0, 96) == before, "there is no such checkpoint"
        assert machines.copy("c", 1, 0, 128) == before, "nothing would follow"
        with monkeypatch.context() as ended, pytest.raises(KeyboardInterrupt):
            ended.setattr(trials, "copy_checkpoint", interrupted)
            machines.copy("c", 1, 0, 32)
        pointer = {"number": 0, "samples": 32, "values": {SCALE: 0.3}}
        assert read_trial(where, 1) == replace(before, copying=pointer)
        donor = read_trial(where, 0)
        assert machines.copy("c", 0, 1, 32) == donor, (
            "what lies there is not of trial 1 as its journal has it"
        )
        machines.train("a", 1, 32)  # the copy is made before anything else
        after = read_trial(where, 1)
        again = machines.copy("c", 1, 0, 32)
        assert again.copied != after.copied and replace(again, copied="") == replace(after, copied="")
        assert after.changes == [{"at": 32, "values": {SCALE: 0.3}, "source": 0}] and after.samples == 32
        machines.train("b", 1, 64)
        folder = machines.train("c", 1, 128)
        trial = read_trial(where, 1)
        assert [report["samples"] for report in trial.reports] == [32, 64, 96, 128]
        assert trial.reports[1]["figures"] != before.reports[1]["figures"]
        trials.close_run(where, trial, "stopped")
        assert jobs.load_job(folder).lineage == trial.copied  # to go on with it as with any run
        figures = [report["figures"] for report in trial.reports]
        found.append((figures, load_file(folder / "export" / "model.safetensors")))
    assert found[0][0] == found[1][0] and tiny_sprites.same(found[0][1], found[1][1])
    names = mirror(join(where, "trials", "0001"), tmp_path / "looking").files("checkpoints")
    assert {name.partition("/")[0] for name in names} == {f"{samples:012d}" for samples in (32, 64, 96, 128)}


@contextmanager
def cluster(caches: Path) -> Iterator[Any]:
    """Start a head and two nodes, each with a cache of its own below a folder and room for one trial.

    By their addresses the nodes are two machines.
    """
    from ray.cluster_utils import Cluster

    kept = [{"MMDIFF_CACHE": str(caches / f"node-{number}")} for number in range(3)]
    head = {"num_cpus": 0, "include_dashboard": False, "env_vars": kept[0]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for number, own in enumerate(kept[1:]):
            address = {"node_ip_address": "127.0.0.2"} if number else {}
            cluster.add_node(num_cpus=1, env_vars=own, **address)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_whose_cluster_died_goes_on_on_another_that_shares_nothing_but_storage(
    bucket, sprites, tmp_path, monkeypatch, capsys
):
    where = bucket.uri("runs")
    file = tiny.write(
        tmp_path, sprites, scheduler={"name": "fifo"}, budget={"trials": 4, "samples": 64, "reports": 2},
        base__tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    )  # fmt: skip
    address = join(where, "sweeps", "tiny")

    def start(nodes: str, machine: str, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "mmdiff_ray.cli", "sweep", *words, "--runs", where]
        quick = {"RAY_gcs_rpc_server_reconnect_timeout_s": "3", "RAY_ADDRESS": nodes}
        environment = {**os.environ, **quick, "MMDIFF_CACHE": str(tmp_path / machine)}
        said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, cwd=tmp_path, **said)

    with cluster(tmp_path / "first") as nodes:
        first = start(nodes.address, "driver-1", str(file))
        deadline = time.monotonic() + 240
        while not any(trial.outcome for trial in read_trials(address)):
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "laptop"))
        assert main(["sweep", "--resume", "tiny", "--runs", where]) == 2
        assert f"{address}: process {first.pid} on " in capsys.readouterr().err
        nodes.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        out, _ = first.communicate(timeout=120)
        assert first.returncode != 0, out
    before = {trial.number: trial for trial in read_trials(address)}

    with cluster(tmp_path / "second") as nodes:
        out, _ = (second := start(nodes.address, "driver-2", "--resume", "tiny")).communicate(timeout=400)
        assert second.returncode == 0, out
    after = list(read_trials(address))
    assert [trial.outcome for trial in after] == ["finished"] * 4, [trial.why for trial in after]
    assert all([report["samples"] for report in trial.reports] == [32, 64] for trial in after)
    assert all(trial == after[trial.number] for trial in before.values() if trial.outcome == "finished")
    client = store.client(f"sqlite:///{tmp_path}/mlflow.db")
    for trial in before.values():  # went on from what it had
        assert after[trial.number].reports[: len(trial.reports)] == trial.reports
        if trial.reports:
            trained = client.get_metric_history(trial.run_id, "loss/l0/pixels")
            assert [point.step for point in trained].count(32) == 1
    assert all(list((tmp_path / "first" / f"node-{number}").rglob("run.json")) for number in (1, 2))
    there = set(mirror(address, tmp_path / "looking").files())
    assert {"sweep.json", "sweep.yaml", "report/report.html", "trials/0000/run.json"} <= there
    assert {f"trials/{n:04d}/checkpoints/{64:012d}/state.json" for n in range(4)} <= there
    assert not any(name.startswith("ray/") for name in there)
    assert f"report    {join(address, 'report', 'report.html')}" in out
    assert "is a file, and the cluster has 2 machines; unless they share it, metrics are lost" in out

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert main(["sweep", "report", "tiny", "--runs", where]) == 0
    assert (cached(address) / "report" / "report.html").is_file()
    best = sorted((cached(address) / "report" / "best").glob("*.yaml"))[0]
    assert f"next      mmdiff train {best}" in capsys.readouterr().out
    assert main(["sync", address]) == 0 and "all records are in MLflow" in capsys.readouterr().out
    assert main(["sweep", "--resume", "tin", "--runs", where]) == 2
    assert "no sweep 'tin' in s3://" in capsys.readouterr().err
    for named, said in ((join(where, "sweeps", "tin"), "no sweep 'tin' in s3://"), ("tin", "tin")):
        assert main(["sweep", "report", named, "--runs", where]) == 2
        assert said in capsys.readouterr().err
