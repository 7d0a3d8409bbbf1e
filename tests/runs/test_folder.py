"""Runs in storage: found, reserved and refused there as in a folder, from every machine."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mmdiff_ray.cli import main
from mmdiff_ray.config import ConfigError, UnreachableError
from mmdiff_ray.distributed import launch, worker
from mmdiff_ray.distributed.display import Display
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs import records
from mmdiff_ray.runs.find import find_run
from mmdiff_ray.storage import upload
from mmdiff_ray.storage.filesystem import filesystem, folders_in, join
from mmdiff_ray.storage.mirror import cached
from mmdiff_ray.tracking.log import Log
from tests import s3
from tests import sprites as tiny
from tests.faults import faulty

LONG = ("train.samples=1280", "train.global_batch=8", "checkpoint.every_samples=160")


class Machine:
    """A machine with a cache of its own, on which commands are typed."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._patch, self._capsys = folder, patch, capsys
        folder.mkdir()

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Type a command here; return its exit code, what it printed, and what it complained of."""
        with self._patch.context() as patch:
            patch.setenv("MMDIFF_CACHE", str(self.folder / "cache"))
            patch.chdir(self.folder)
            self._capsys.readouterr()
            code = main(words)
        return code, *self._capsys.readouterr()


@pytest.fixture
def machines(tmp_path, monkeypatch, capsys) -> Iterator[Machine]:
    """Yield machines that never saw a run, as many as are asked for."""
    return (Machine(tmp_path / f"machine-{number}", monkeypatch, capsys) for number in range(9))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(sprites, tmp_path, cache) -> jobs.Job:
    """A run in storage that has begun, and nothing more."""
    where = f"file://{tmp_path}/storage"
    job = tiny.job(sprites, f"runs={where}", folder=cached(join(where, "tiny")))
    job = dataclasses.replace(job, uri=join(where, "tiny"), tracking_uri="sqlite:///x.db", run_id="1").here()
    runs.claim(job.uri)
    jobs.write_run(job, state="stopped")
    assert job.mirror is not None and job.mirror.flush(10) == []
    return job


def test_a_run_is_found_by_name_or_uri_on_a_machine_that_never_saw_it(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "another"))
    where = f"file://{tmp_path}/storage"
    folder = find_run("tiny", where)
    assert folder == find_run(f"{where}/tiny") == cached(f"{where}/tiny") != made.folder
    assert folder == find_run(str(folder)) and runs.address(folder) == made.uri
    job = jobs.load_job(folder)
    assert (job.uri, job.run_id, job.config) == (made.uri, "1", made.config)
    with pytest.raises(ConfigError, match=r"no run 'tin' in file://.*storage; there are: tiny"):
        find_run("tin", where)
    with pytest.raises(ConfigError, match=r"there are: none yet"):
        find_run("tiny", f"file://{tmp_path}/elsewhere")
    assert not cached(f"{where}/tin").exists()


def test_a_name_is_taken_by_a_run_in_storage_or_what_this_machine_has_not_sent(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    where = f"file://{tmp_path}/storage"
    assert jobs.new_folder(made.config) == cached(f"{where}/tiny-2")
    cached(f"{where}/tiny-2").mkdir(parents=True)
    assert jobs.new_folder(made.config) == cached(f"{where}/tiny-3")
    assert sorted(path.name for path in (tmp_path / "storage").iterdir()) == ["tiny"]


def test_one_name_is_given_to_one_run(made, tmp_path):
    with pytest.raises(ConfigError, match=r"^name: file://.*tiny was just taken by another run"):
        runs.claim(made.uri)
    new = join(f"file://{tmp_path}/storage", "new")
    runs.claim(new)
    with pytest.raises(ConfigError, match="just taken by another run"):
        runs.claim(new)
    runs.release(new)
    runs.claim(new)


def test_to_continue_a_run_finds_it_or_frees_what_a_beginning_that_was_cut_short_left(made, tmp_path):
    where = f"file://{tmp_path}/storage"
    assert runs.find_existing(join(where, "other")) is None
    assert (runs.find_existing(made.uri) / "run.json").is_file()
    runs.claim(join(where, "other"))
    assert runs.find_existing(join(where, "other")) is None
    assert "other" not in runs.names_in(where)
    (tmp_path / "storage" / "mine").mkdir()
    (tmp_path / "storage" / "mine" / "letters.txt").touch()
    with pytest.raises(ConfigError, match=r"^name: file://.*/mine exists but is not a run"):
        runs.find_existing(join(where, "mine"))


def test_a_run_that_cannot_be_recorded_leaves_nothing_in_storage(sprites, tmp_path, cache):
    where = f"file://{tmp_path}/storage"
    config = tiny.config(sprites, f"runs={where}", "tracking.uri=http://127.0.0.1:9")
    job = jobs.prepare(config, jobs.new_folder(config))
    with pytest.raises(
        ConfigError, match=r"^tracking.uri \(http://127.0.0.1:9\): the run cannot be recorded"
    ):
        launch.begin(job, required=True)
    assert list((tmp_path / "storage").iterdir()) == [] and not job.folder.exists()


def test_records_that_a_worker_cannot_send_reach_the_driver_on_another_machine(made, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "HAND_OVER_S", 0.2)
    job = dataclasses.replace(made, tracking_uri="http://me:a-secret@127.0.0.1:9")
    notes: list[dict] = []
    hooks = worker.WorkerHooks(job, [], notes.append, lambda: False)
    hooks.tracker.metrics({"loss": 1}, 1)
    hooks.tracker.text("hello", "note.txt")
    hooks.close()
    (said,) = (note["text"] for note in notes)
    assert said.startswith("MLflow at http://127.0.0.1:9: ") and "; 2 records wait. Retrying until" in said
    assert Log(job.spool).waiting == 0
    for file in (tmp_path / "storage" / "tiny" / "records").rglob("*.*"):
        assert not file.is_file() or "a-secret" not in file.read_text()

    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "another"))
    folder = runs.open_run(made.uri)
    for _ in range(2):
        records.fetch_unsent(folder, runs.mirror_of(folder))
        log = Log(folder / "tracking")
        assert [record.kind for record in log.read(9)] == ["metrics", "artifact"]
        assert (log.files(log.read(9)[1].id) / "note.txt").read_text() == "hello"
        assert log.target == {"uri": "sqlite:///x.db", "run_id": "1"}
    assert not list((tmp_path / "storage" / "tiny" / "records").glob("*"))


def test_records_that_storage_does_not_take_either_are_named_with_where_they_lie(made, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "HAND_OVER_S", 0.2)
    monkeypatch.setattr(upload, "STALL_S", 0.2)
    (tmp_path / "storage" / "tiny" / "records").write_text("no folder")
    notes: list[dict] = []
    hooks = worker.WorkerHooks(
        dataclasses.replace(made, tracking_uri="http://127.0.0.1:9"), [], notes.append, lambda: False
    )
    hooks.tracker.metrics({"loss": 1}, 1)
    hooks.close()
    assert f"not in {made.uri}: records/" in notes[-1]["text"]
    assert f"They are in {made.folder}; " in notes[-1]["text"]
    (tmp_path / "storage" / "tiny" / "records").unlink()
    folder = runs.open_run(made.uri)
    records.fetch_unsent(folder, runs.mirror_of(folder))
    assert Log(folder / "tracking").waiting == 1


def test_sync_of_storage_without_a_run_is_refused(tmp_path, capsys):
    (tmp_path / "storage").mkdir()
    assert main(["sync", f"file://{tmp_path}/storage"]) == 2
    assert f"there is no run in file://{tmp_path}/storage" in capsys.readouterr().err


@pytest.mark.parametrize(
    "where, message",
    [
        ("nope://bucket/runs", r"^runs: cannot open nope://bucket/runs"),
        ("s3://bucket/runs?colour=red", r"^runs: cannot open s3://bucket/runs\?colour=red"),
        ("s3://me:secret@bucket/runs", r"^runs: a key in a URI would be recorded.*AWS_ACCESS_KEY_ID"),
        ("s3://secret@bucket/runs", r"^runs: a key in a URI would be recorded.*AWS_ACCESS_KEY_ID"),
        ("file:///proc/nothing", r"^runs: cannot write to file:///proc/nothing: .*permission to write"),
    ],
)
def test_storage_that_cannot_be_used_is_refused_before_anything_starts(sprites, where, message):
    with pytest.raises(ConfigError, match=message) as caught:
        jobs.new_folder(tiny.config(sprites, f"runs='{where}'", "tracking.uri=sqlite:///x.db"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "command, message",
    [
        (
            ("train", "tiny.yaml"),
            "tracking.uri: runs in file:///nowhere need an MLflow store; set tracking.uri=http://host:5000",
        ),
        (("ui", "--runs", "file:///nowhere"), "tracking.uri: runs in file:///nowhere need an MLflow store"),
        (("sweep", "report", "x", "--runs", "file:///nowhere"), "tracking.uri: runs in file:///nowhere need"),
        (("experiment", "weights", "--runs", "s3://b/c"), r"--runs (s3://b/c): must be a folder on a disk"),
        (
            ("submit", "--", "experiment", "weights", "--runs", "s3://b"),
            r"--runs (s3://b): must be a folder on a disk",
        ),
    ],
)
def test_what_needs_a_folder_says_so(machines, sprites, monkeypatch, command, message):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = next(machines)
    tiny.write_config(here.folder, sprites)
    words = [*command, *(["runs=file:///nowhere"] if command[0] == "train" else [])]
    code, _, complaint = here(*words)
    assert code == 2 and message in complaint
    assert not Path("/nowhere").exists()


# --- on S3 -----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch) -> Iterator[s3.Bucket]:
    for name, value in s3.KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with s3.serve() as bucket:
        yield bucket


@pytest.mark.slow
def test_no_bucket_no_right_no_key_and_no_server_are_told_apart(bucket, monkeypatch):
    runs.check_runs(bucket.uri("runs"))
    assert runs.names_in(bucket.uri("runs")) == []
    where = bucket.uri("runs").replace("s3://toys", "s3://nobodys")
    with pytest.raises(ConfigError, match=r"^runs: cannot write to s3://nobodys/runs.*bucket does not exist"):
        runs.check_runs(where)
    bucket.ask_for_rights()
    for folder in ("keys-without-a-right", "no-keys"):
        with pytest.raises(
            ConfigError, match=rf"^runs: cannot write to s3://toys/{folder}.*AWS_ACCESS_KEY_ID"
        ):
            runs.check_runs(bucket.uri(folder))
        for name in s3.KEYS:
            monkeypatch.delenv(name, raising=False)
    with faulty(bucket.port) as network:
        network.down = True
        with pytest.raises(UnreachableError, match=r"^runs: cannot list s3://toys/runs"):
            runs.names_in(bucket.uri("runs", network.port))


def wait_for(done, process: subprocess.Popen) -> None:
    while not done() and process.poll() is None:
        time.sleep(0.1)


@pytest.mark.faults
@pytest.mark.slow
def test_a_killed_run_goes_on_from_storage_on_another_machine_and_is_used_on_a_third(
    bucket, sprites, tmp_path, machines, monkeypatch
):
    one, two, three = next(machines), next(machines), next(machines)
    where, store = bucket.uri("some/runs"), f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    file = tiny.write_config(
        one.folder, sprites, *LONG, f"runs='{where}'", store, "evaluate.every_samples=320"
    )
    environment = {**os.environ, "MMDIFF_CACHE": str(one.folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mmdiff_ray.cli", "train", str(file)]
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    run = runs.mirror(join(where, "tiny"), tmp_path / "looking")
    wait_for(lambda: any(name.endswith("/state.json") for name in run.files("checkpoints")), killed)
    killed.send_signal(signal.SIGSTOP)
    code, _, refused = two("train", "--resume", "tiny", f"runs={where}")
    assert code == 2 and f"{join(where, 'tiny')}: process {killed.pid} on " in refused, refused
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    code, said, _ = two("train", "--resume", "tiny", f"runs={where}")
    assert code == 0 and "from the checkpoint at" in said
    assert f"run       {join(where, 'tiny')}\n" in said
    names = set(run.files())
    assert {"run.json", "config.yaml", "evaluation.json", "pictures/joint.png", "export/files.json"} <= names
    assert any(name.startswith("pictures/joint-000000") for name in names)
    assert not any(name.startswith("tracking/") for name in names)
    states = [name.split("/")[1] for name in names if name.endswith("/state.json")]
    assert max(states) == "000000001280" and len(states) <= 3

    assert three("train", "--resume", "tiny", "--runs", where)[1].startswith(
        "tiny is finished at 1,280 samples"
    )
    code, said, _ = three("evaluate", "tiny", "--runs", where, "evaluate.rows=4")
    assert code == 0 and f"{join(where, 'tiny', 'evaluations', 'evaluation', 'evaluation.json')}\n" in said
    assert three("sample", join(where, "tiny"), "--num", "2")[0] == 0
    assert three("generate", "tiny", "--runs", where, "--num", "4", "--workers", "0", "--out", "made")[0] == 0
    assert two("evaluate", "tiny", "--runs", where, "evaluate.rows=4")[0] == 0
    assert sorted(folders_in(run.fs, run.path("evaluations"))) == ["evaluation", "evaluation-2"]

    local = tiny.config(sprites, *LONG, f"runs={tmp_path}/local", store)
    alone = launch.train(jobs.prepare(local, jobs.new_folder(local)), Display())
    with monkeypatch.context() as patch:
        patch.setenv("MMDIFF_CACHE", str(three.folder / "cache"))
        exported = load_file(cached(join(where, "tiny")) / "export" / "model.safetensors")
    assert tiny.same(exported, load_file(alone / "export" / "model.safetensors"))


@pytest.mark.slow
def test_a_server_that_dies_at_the_end_costs_an_exit_code_and_the_next_command_sends_what_is_left(
    bucket, sprites, tmp_path, machines, monkeypatch
):
    one, two = next(machines), next(machines)
    monkeypatch.setattr(upload, "STALL_S", 1.0)
    with faulty(bucket.port) as network:
        where = bucket.uri("runs", network.port)
        file = tiny.write_config(
            one.folder, sprites, f"runs='{where}'", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
        )
        resumed = worker.WorkerHooks.resumed

        def resumed_and_cut_off(hooks, progress):
            resumed(hooks, progress)
            hooks.job.mirror.flush(20)
            network.down = True

        monkeypatch.setattr(worker.WorkerHooks, "resumed", resumed_and_cut_off)
        code, said, _ = one("train", str(file))
        uri = join(where, "tiny")
        with monkeypatch.context() as patch:
            patch.setenv("MMDIFF_CACHE", str(one.folder / "cache"))
            here = cached(uri)
        assert code == 1 and said.count("cannot upload") == 1
        checkpoints = "checkpoint 000000000064, checkpoint 000000000160"
        assert f"not in {uri}: {checkpoints}. They are in {here}; resuming the run" in said
        left = "config.yaml, evaluation.json, evaluation.npz, export, pictures/joint.png, run.json"
        assert said.rstrip().endswith(
            f"not in {uri}: {left}. They are in {here}; the next command on this run "
            "on this machine uploads them"
        )
        network.down = False
        code, _, complaint = two("sample", uri, "--num", "2")
        assert code == 2 and "holds no exported model" in complaint
        code, said, _ = one("train", "--resume", "tiny", "--runs", where)
        assert code == 0 and "tiny is finished" in said
        assert two("sample", uri, "--num", "2")[0] == 0
        assert two("evaluate", uri, "evaluate.rows=4")[0] == 0
        assert folders_in(*filesystem(join(uri, "evaluations"))) == ["evaluation"]
        monkeypatch.setenv("MMDIFF_CACHE", str(two.folder / "cache"))
        assert jobs.read_run(find_run("tiny", where))["state"] == "finished"


# --- on Ray, without a disk that the nodes share ---------------------------------------------------------


@pytest.fixture
def nodes(bucket, tmp_path) -> Iterator[str]:
    """Yield the address of a cluster of a head and two nodes, each with a cache of its own."""
    from ray.cluster_utils import Cluster

    kept = [{"MMDIFF_CACHE": str(tmp_path / f"node-{number}")} for number in range(3)]
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "env_vars": kept[0]}
    )
    for own in kept[1:]:
        cluster.add_node(num_cpus=3, env_vars=own)  # room for one worker
    yield cluster.address
    cluster.shutdown()


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.ray
def test_nodes_that_share_no_disk_train_go_on_and_evaluate(bucket, sprites, tmp_path, nodes):
    where, folder = bucket.uri("runs"), tmp_path / "driver"
    folder.mkdir()
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    workers = ("workers.count=2", "workers.cpus=2", "evaluate.evaluators=[]")
    file = tiny.write_config(folder, sprites, f"runs='{where}'", store, *workers)
    environment = {**os.environ, "RAY_ADDRESS": nodes, "OMP_NUM_THREADS": "1"}

    def train(cache: str, *words: str) -> str:
        command = [sys.executable, "-m", "mmdiff_ray.cli", "train", *words]
        own = {**environment, "MMDIFF_CACHE": str(tmp_path / cache)}
        done = subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "training on 2 workers" in train("driver-1", str(file))
    for number in (1, 2):
        place = "/".join(cached(join(where, "tiny")).parts[-4:])
        (kept,) = (tmp_path / f"node-{number}").glob(f"{place}/checkpoints/000000000160")
        assert len(list(kept.glob("*/*.distcp"))) == 1
    run = runs.mirror(join(where, "tiny"), tmp_path / "looking")
    names = run.files()
    assert sum(name.startswith("checkpoints/000000000160/") for name in names) == 4
    assert {"run.json", "config.yaml", "export/files.json"} <= set(names)
    changed = ("train.samples=224", "evaluate.evaluators=[joint]")
    said = train("driver-2", "--resume", "tiny", "--runs", where, *changed)
    assert "training on 2 workers, from the checkpoint at 160 samples" in said
    assert "not in s3://" not in said and {"evaluation.json", "pictures/joint.png"} <= set(run.files())
