"""A run from its launch to its end: in this process and on Ray, undisturbed, stopped, killed, hopeless."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.data.bad_rows import BadRowsError
from mmdiff_ray.distributed import launch
from mmdiff_ray.distributed.board import Board
from mmdiff_ray.distributed.cluster import cluster
from mmdiff_ray.distributed.display import Display
from mmdiff_ray.distributed.evaluate import evaluate_run
from mmdiff_ray.distributed.worker import ray_train_loop
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.storage import retry as patience
from mmdiff_ray.tracking import queries, store
from mmdiff_ray.training.checkpoint import complete
from mmdiff_ray.training.trainer import TrainingError
from tests import sprites as tiny
from tests.data.samples import flip_bit

LONG = ("train.samples=1280", "checkpoint.every_samples=160", "data.flip=true")
"""Long enough that a run can be disturbed in its middle."""
UNREAD = r"^cannot read .*sprites, retried for 0 s: .*; resume with: mmdiff train --resume \S+$"


class Watching(Display):
    """Remember the progress that is shown; at some samples do something to the run."""

    def __init__(self, at: int = 0, act: Any = None) -> None:
        super().__init__()
        self.at, self.act = at, act
        self.seen: list[int] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def show(self, event: dict[str, Any]) -> None:
        self.seen.append(event["progress"]["samples_seen"])
        if self.act is not None and self.seen[-1] >= self.at:
            act, self.act = self.act, None
            act()


@dataclass(frozen=True)
class Ended:
    """A run that has ended, and what its display was told."""

    folder: Path
    display: Watching

    @property
    def facts(self) -> dict[str, Any]:
        return jobs.read_run(self.folder)

    @property
    def weights(self) -> dict[str, Any]:
        return load_file(str(self.folder / "export" / "model.safetensors"))

    @property
    def status(self) -> str:
        return store.client(self.facts["tracking_uri"]).get_run(self.facts["run_id"]).info.status

    @property
    def tags(self) -> dict[str, str]:
        return store.client(self.facts["tracking_uri"]).get_run(self.facts["run_id"]).data.tags

    def history(self, key: str) -> list[tuple[int, float]]:
        return queries.history(self.facts["tracking_uri"], self.facts["run_id"], key)


def prepared(data: str, runs: Path, *overrides: str):
    config = tiny.config(data, f"runs={runs}", *overrides)
    return jobs.prepare(config, jobs.new_folder(config))


def train(data: str, runs: Path, *overrides: str, display: Watching | None = None) -> Ended:
    display = display or Watching()
    return Ended(launch.train(prepared(data, runs, *overrides), display), display)


def resume(folder: Path, *overrides: str) -> Ended:
    display = Watching()
    return Ended(launch.resume(jobs.load_job(folder, overrides), display), display)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return the folder of all runs of this module, with one MLflow store."""
    return tmp_path_factory.mktemp("work") / "runs"


# --- in this process -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(sprites, runs) -> Ended:
    """Return an undisturbed run in this process."""
    return train(sprites, runs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_run_goes_on_to_the_same_end(sprites, runs, whole, number):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped = train(sprites, runs, display=Watching(64, lambda: signal.raise_signal(number)))
    assert stopped.facts["state"] == "stopped" and stopped.status == "KILLED"
    assert stopped.display.seen == [32, 64, 96]
    assert int(complete(stopped.folder / "checkpoints")[-1].name) == 96
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    ended = resume(stopped.folder)
    assert ended.facts["state"] == "finished" and ended.status == "FINISHED"
    assert ended.facts["run_id"] == stopped.facts["run_id"]
    assert ended.display.said == ["training on this process, from the checkpoint at 96 samples"]
    assert tiny.same(ended.weights, whole.weights)
    assert ended.history("loss/total") == whole.history("loss/total")


def test_second_signal_ends_at_once(sprites, runs):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    job = prepared(sprites, runs)
    with pytest.raises(KeyboardInterrupt):
        launch.train(job, Watching(64, twice))
    ended = Ended(job.folder, Watching())
    assert ended.facts["state"] == "stopped" and ended.status == "KILLED"
    assert tiny.same(resume(job.folder).weights, train(sprites, runs).weights)


def test_end_by_rays_own_handler_of_signals_closes_the_run(sprites, runs):
    """Where Ray has the signal, as while the workers are being asked for, the driver is told to exit."""
    job = prepared(sprites, runs)
    with pytest.raises(SystemExit):
        launch.train(job, Watching(64, lambda: sys.exit(signal.SIGTERM)))
    ended = Ended(job.folder, Watching())
    assert ended.facts["state"] == "stopped" and ended.status == "KILLED"


def test_failure_is_marked_and_raised(sprites, runs):
    job = prepared(sprites, runs, "train.learning_rate=1e30")
    with pytest.raises(TrainingError, match=r"not finite: .* at step"):
        launch.train(job, Watching())
    ended = Ended(job.folder, Watching())
    assert ended.facts["state"] == "failed" and ended.status == "FAILED"
    assert not job.export.exists()


def test_corrupt_row_ends_a_run_and_a_higher_limit_lets_it_go_on(sprites, runs, tmp_path):
    data = corrupted(sprites, tmp_path)
    job = prepared_on_sound_data(sprites, data, runs)
    with pytest.raises(BadRowsError, match=r"more than data.bad_row_limit \(0\)"):
        launch.train(job, Watching())
    assert Ended(job.folder, Watching()).status == "FAILED"
    ended = resume(job.folder, "data.bad_row_limit=1000")
    assert ended.status == "FINISHED"
    lost = len(json.loads((job.folder / "bad_rows.json").read_text()))
    assert ended.tags["mmdiff.bad_rows"] == str(lost) and lost > 1
    longer = ("train.samples=640", f"data.bad_row_limit={lost}")  # the same rows again, and again
    assert resume(job.folder, *longer).tags["mmdiff.bad_rows"] == str(lost)


def test_outage_of_the_data_ends_a_run_in_words_and_it_goes_on_to_the_same_end(
    sprites, runs, tmp_path, monkeypatch
):
    data = Path(shutil.copytree(sprites, tmp_path / "sprites"))
    job = prepared(str(data), runs, "train.samples=640", "data.cache_mb=0")
    monkeypatch.setattr(patience, "OUTAGE_S", 0.0)
    with pytest.raises(RunError, match=UNREAD):
        launch.train(job, Watching(64, lambda: take_away(data / "train")))
    assert Ended(job.folder, Watching()).status == "FAILED"
    give_back(data / "train")
    ended = resume(job.folder)
    assert "from the checkpoint at" in ended.display.said[0]
    assert tiny.same(ended.weights, train(sprites, runs, "train.samples=640").weights)


def take_away(split: Path) -> None:
    """Put a folder in the place of each shard: the disk gives neither its bytes nor a reason."""
    shutil.copytree(split, split.with_name("kept"))
    for shard in split.iterdir():
        shard.unlink()
        shard.mkdir()


def give_back(split: Path) -> None:
    """Undo `take_away`."""
    shutil.rmtree(split)
    split.with_name("kept").rename(split)


def prepared_on_sound_data(sprites: str, data: Path, runs: Path, *overrides: str):
    """Return a job on data that are found corrupt only while training reads them."""
    held, broken = data / "train", data / "broken"
    broken.rename(data.parent / "broken")
    job = prepared(str(data), runs, *overrides)
    held.rename(data.parent / "sound")
    (data.parent / "broken").rename(held)
    return job


def corrupted(sprites: str, folder: Path) -> Path:
    """Return a copy of the sprites, with a corrupt twin of its training rows in `broken`."""
    data = Path(shutil.copytree(sprites, folder / "sprites"))
    shutil.copytree(data / "train", data / "broken")
    for shard in (data / "broken").iterdir():
        for position in range(1000, shard.stat().st_size // 2, 500):
            flip_bit(str(shard), position)
    return data


# --- on Ray ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(sprites, runs) -> Ended:
    """Return the long run in this process."""
    return train(sprites, runs, *LONG)


@pytest.fixture(scope="module")
def together(ray_cluster, sprites, runs) -> Ended:
    """Return the long run on two workers."""
    return train(sprites, runs, *LONG, "workers.count=2")


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_train_to_the_losses_of_one_process(alone, together):
    assert together.facts["state"] == "finished" and together.status == "FINISHED"
    for key in ("loss/total", "loss/l1/pixels", "loss/l2/shape", "val/loss/total"):
        one, two = alone.history(key), together.history(key)
        assert [step for step, _ in one] == [step for step, _ in two]
        # the first steps agree to rounding; later ones drift as any two orders of addition do
        assert [value for _, value in two[:3]] == pytest.approx([value for _, value in one[:3]], rel=1e-4)
        assert [value for _, value in two] == pytest.approx([value for _, value in one], rel=0.05)
    assert together.display.seen[-1] == 1280
    assert together.display.said[-1] == "training on 2 workers"
    assert together.display.said[0].startswith("Ray's own log files: /")


def wait_until(done: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until something is done, or the process has ended."""
    while not done() and process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)


def workers(name: str = "RayTrainWorker") -> list[psutil.Process]:
    """Return the training workers, or other actors, of this process's own cluster, the newest last: one of an
    earlier run may still be there, and the numbers of processes start again from low ones."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found += [process] if name in " ".join(process.cmdline()) else []
    return sorted(found, key=psutil.Process.create_time)


@pytest.mark.slow
@pytest.mark.ray
def test_killed_worker_costs_nothing_but_time(ray_cluster, sprites, runs, together):
    killed: list[int] = []

    def kill() -> None:
        victim = workers()[-1]
        killed.append(victim.pid)
        victim.send_signal(signal.SIGKILL)

    ended = train(sprites, runs, *LONG, "workers.count=2", display=Watching(400, kill))
    assert len(killed) == 1 and not psutil.pid_exists(killed[0])
    went_on = [text for text in ended.display.said if "from the checkpoint at" in text]
    assert len(went_on) == 1 and int(went_on[0].split(" at ")[1].split()[0].replace(",", "")) >= 160
    assert ended.facts["state"] == "finished" and ended.status == "FINISHED"
    assert tiny.same(ended.weights, together.weights)
    for key in ("loss/total", "val/loss/total", "train/learning_rate"):
        assert ended.history(key) == together.history(key)
    client = store.client(ended.facts["tracking_uri"])
    experiment = client.get_experiment_by_name("mmdiff").experiment_id
    names = [run.info.run_name for run in client.search_runs([experiment], max_results=100)]
    assert names.count(ended.folder.name) == 1


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.ray
def test_terminated_driver_saves_and_resume_ends_as_the_undisturbed_run(
    ray_cluster, sprites, tmp_path, together
):
    import ray

    file = tiny.write_config(tmp_path, sprites, *LONG, "workers.count=2", "evaluate.rows=4")
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mmdiff_ray.cli", "train"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    driver = subprocess.Popen([*command, str(file)], **pipes)
    folder = tmp_path / "runs" / "tiny"
    wait_until(lambda: bool(complete(folder / "checkpoints")), driver)
    driver.send_signal(signal.SIGTERM)
    out, errors = driver.communicate()
    assert driver.returncode == 130, errors
    assert out.splitlines()[-1] == f"stopped with a checkpoint; resume with: mmdiff train --resume {folder}"
    stopped = Ended(folder, Watching())
    assert stopped.facts["state"] == "stopped" and stopped.status == "KILLED"
    done = subprocess.run([*command, "--resume", str(folder)], **pipes)
    assert done.returncode == 0, done.stderr
    assert "from the checkpoint at" in done.stdout and "next      mmdiff sample" in done.stdout
    assert Ended(folder, Watching()).status == "FINISHED"
    assert tiny.same(Ended(folder, Watching()).weights, together.weights)


@pytest.mark.slow
@pytest.mark.ray
def test_failure_that_no_restart_mends_is_not_tried_again_and_told_in_its_own_words(
    ray_cluster, sprites, runs
):
    job = prepared(sprites, runs, "workers.count=2", "train.learning_rate=1e30", "workers.max_failures=3")
    display = Watching()
    with pytest.raises(TrainingError, match=r"^not finite: .* at step"):
        launch.train(job, display)
    assert len([text for text in display.said if text.startswith("training on")]) == 1
    assert Ended(job.folder, display).status == "FAILED"


@pytest.mark.slow
@pytest.mark.ray
def test_corrupt_shard_ends_a_run_on_workers_with_its_name(ray_cluster, sprites, runs, tmp_path):
    data = corrupted(sprites, tmp_path)
    job = prepared_on_sound_data(sprites, data, runs, "workers.count=2", "workers.max_failures=3")
    display = Watching()
    with pytest.raises(BadRowsError, match=r"more than data.bad_row_limit \(0\).*train/0.*row group"):
        launch.train(job, display)
    assert len([text for text in display.said if text.startswith("training on")]) == 1
    assert Ended(job.folder, display).status == "FAILED"
    ended = resume(job.folder, "data.bad_row_limit=1000")
    lost = len(json.loads((job.folder / "bad_rows.json").read_text()))
    assert ended.tags["mmdiff.bad_rows"] == str(lost)
    assert f"{lost} rows could not be read (data.bad_row_limit 1000)" in ended.display.said


def impatient_loop(settings: dict[str, Any]) -> None:
    """Be a worker that does not wait for storage."""
    patience.OUTAGE_S = 0.0
    ray_train_loop(settings)


class Restoring(Watching):
    """Bring the held-out rows back once a worker has told that it cannot read them."""

    def __init__(self, data: Path) -> None:
        super().__init__()
        self.data = data

    def say(self, text: str) -> None:
        super().say(text)
        if text.startswith("cannot read") and (self.data / "kept").exists():
            give_back(self.data / "val")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("comes_back", [True, False])
def test_workers_are_started_anew_after_an_outage_of_the_data(
    ray_cluster, sprites, runs, tmp_path, monkeypatch, comes_back
):
    data = Path(shutil.copytree(sprites, tmp_path / "sprites"))
    failures = 3 if comes_back else 0
    job = prepared(str(data), runs, "train.samples=64", "workers.count=1", f"workers.max_failures={failures}")
    take_away(data / "val")
    monkeypatch.setattr(launch, "ray_train_loop", impatient_loop)
    display = Restoring(data) if comes_back else Watching()
    if comes_back:
        assert Ended(launch.train(job, display), display).status == "FINISHED"
    else:
        with pytest.raises(RunError, match=UNREAD):
            launch.train(job, display)
    assert sum(text.startswith("cannot read") for text in display.said) >= 1


@pytest.mark.slow
@pytest.mark.ray
def test_worker_that_dies_once_too_often_fails_the_run(ray_cluster, sprites, runs):
    job = prepared(sprites, runs, *LONG, "workers.count=1", "workers.max_failures=0")
    display = Watching(160, lambda: workers()[-1].send_signal(signal.SIGKILL))
    with pytest.raises(RunError, match=r"^worker 0 failed: "):
        launch.train(job, display)
    assert Ended(job.folder, display).status == "FAILED"


class Killing(Watching):
    """Kill the worker in its first attempt, and in its second once something holds."""

    def __init__(self, once: Callable[[], Any]) -> None:
        super().__init__()
        self.holds = [lambda: True, once]
        self.killed: list[int] = []

    @property
    def attempts(self) -> int:
        return len([text for text in self.said if text.startswith("training on")])

    def show(self, event: dict[str, Any]) -> None:
        super().show(event)
        if self.holds and self.attempts > len(self.killed) and self.holds[0]():
            self.holds.pop(0)
            worker = workers()[-1]
            self.killed.append(worker.pid)
            worker.send_signal(signal.SIGKILL)


ONE_MORE = ("workers.count=1", "workers.max_failures=1")


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.ray
def test_worker_that_dies_again_after_a_new_checkpoint_does_not_end_the_run(ray_cluster, sprites, runs):
    job = prepared(sprites, runs, *LONG, *ONE_MORE)
    display = Killing(lambda: complete(job.checkpoints))
    ended = Ended(launch.train(job, display), display)
    assert len(set(display.killed)) == 2 and display.attempts == 3 and ended.status == "FINISHED"
    assert "from the checkpoint at" in display.said[-1]


@pytest.mark.slow
@pytest.mark.ray
def test_worker_that_dies_again_with_no_new_checkpoint_fails_the_run(ray_cluster, sprites, runs):
    unsaved = ("train.samples=1000000", "checkpoint.every_samples=1000000")
    job = prepared(sprites, runs, *unsaved, *ONE_MORE)
    display = Killing(lambda: True)
    with pytest.raises(RunError, match=r"^worker 0 failed: "):
        launch.train(job, display)
    assert len(set(display.killed)) == display.attempts == 2
    assert Ended(job.folder, display).status == "FAILED"


def kill_board() -> None:
    workers("ray::Board")[-1].send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.ray
def test_run_outlives_the_actor_between_driver_and_workers(ray_cluster, sprites, runs):
    ended = train(sprites, runs, *LONG, "workers.count=1", display=Watching(160, kill_board))
    assert ended.status == "FINISHED" and ended.display.seen[-1] == 1280
    assert [text for text in ended.display.said if text.startswith("training on")] == ["training on 1 worker"]


@pytest.mark.slow
@pytest.mark.ray
def test_run_that_has_lost_that_actor_for_good_ends_with_its_workers(ray_cluster, sprites, runs, monkeypatch):
    monkeypatch.setattr(launch, "BOARD_RESTARTS", 0)
    job = prepared(sprites, runs, *LONG, "train.samples=1000000", "workers.count=1")
    left: list[psutil.Process] = []
    display = Watching(160, lambda: (left.append(workers()[-1]), kill_board()))
    with pytest.raises(RunError, match=r"^the run lost its cluster: \w") as caught:
        launch.train(job, display)
    assert str(caught.value).endswith(f"task; resume with: mmdiff train --resume {job.folder}")
    assert Ended(job.folder, display).status == "FAILED"
    assert not [thread for thread in threading.enumerate() if "_fit" in thread.name]
    assert left and not psutil.wait_procs(left, timeout=30)[1]


@pytest.mark.slow
@pytest.mark.ray
def test_workers_that_share_the_model_train_draw_export_and_are_evaluated(ray_cluster, sprites, runs, whole):
    more = ("workers.count=2", "workers.strategy=fsdp", "evaluate.every_samples=64", "evaluate.rows=5")
    ended = train(sprites, runs, *more)
    assert ended.facts["state"] == "finished" and ended.status == "FINISHED"
    for key in ("loss/total", "train/grad_norm"):
        one, two = whole.history(key), ended.history(key)
        assert two == [(step, pytest.approx(value, rel=0.05)) for step, value in one]
    assert {path.stem.split("-")[-1] for path in (ended.folder / "pictures").iterdir()} == {
        "000000064",
        "000000128",
    }
    assert ended.weights.keys() == whole.weights.keys()
    for name, value in whole.weights.items():
        torch.testing.assert_close(ended.weights[name], value, rtol=0.05, atol=1e-3)
    findings, _ = evaluate_run(ended.folder, [])
    assert any(figure.key == "shapes/code_agreement" for figure in findings.figures)


@pytest.mark.slow
@pytest.mark.ray
def test_evaluation_runs_as_a_task_and_hands_back_mistakes_as_they_are(ray_cluster, together):
    findings, place = evaluate_run(together.folder, ["evaluate.rows=4"], on_ray=True)
    assert any(figure.key == "shapes/code_agreement" for figure in findings.figures)
    assert place.parent == together.folder / "evaluations"
    with pytest.raises(ConfigError) as caught:
        evaluate_run(together.folder, ["data.sources=[{uri: nowhere}]"], on_ray=True)
    assert type(caught.value) is ConfigError and str(caught.value).startswith("data.sources: no data set at")


@pytest.mark.slow
@pytest.mark.ray
def test_too_few_cpus_are_told_and_leave_nothing(ray_cluster, sprites, runs):
    job = prepared(sprites, runs, "workers.count=8", "workers.cpus=9")
    with cluster(), pytest.raises(ConfigError, match="8 workers need 80 CPUs, the cluster has"):
        launch.train(job, Watching())
    assert not job.folder.exists()


def test_events_and_wishes_cross_the_board():
    board = Board()
    board.post({"kind": "progress"})
    assert board.take() == [{"kind": "progress"}] and board.take() == []
    assert not board.stop_requested()
    board.request_stop()
    assert board.stop_requested()
    assert board.failure() is None
    board.fail(RunError("first"))
    board.fail(RunError("second"))
    assert str(board.failure()) == "first"


def test_failures_in_a_row_end_a_run_and_a_new_checkpoint_starts_their_count_anew():
    board = Board()
    assert not board.failed(RunError("first"), most=1)
    board.post({"kind": "saved"})
    assert not board.failed(RunError("second"), most=1)
    board.post({"kind": "progress"})
    assert board.failed(RunError("third"), most=1) and str(board.failure()) == "third"


def test_failure_that_a_restart_would_repeat_ends_a_run_at_once():
    board = Board()
    board.fail(RunError("of the data"))
    assert board.failed(RunError("worker 0 failed"), most=3) and str(board.failure()) == "of the data"


def test_reclaimed_node_that_was_announced_is_no_failure(monkeypatch):
    from ray.exceptions import ActorDiedError, RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from mmdiff_ray.distributed.failures import FailureLimit

    board = Board()
    monkeypatch.setattr(board, "failed", SimpleNamespace(remote=board.failed))
    monkeypatch.setattr("ray.get", lambda answer: answer)
    limit = FailureLimit(board, most=0)
    reclaimed = WorkerHealthCheckFailedError("its node", RayActorError("ab", "gone", preempted=True))
    limit.after_exception(None, {0: RuntimeError("connection reset"), 1: reclaimed})
    assert board.failure() is None
    dead = WorkerHealthCheckFailedError("its node", ActorDiedError())
    with pytest.raises(RunError, match=r"^worker 1 failed: .*died"):
        limit.after_exception(None, {1: dead})


def test_run_file_is_json_for_other_programs(whole):
    facts = json.loads((whole.folder / "run.json").read_text())
    assert set(facts) == {"name", "tracking_uri", "run_id", "datasets", "state"}
