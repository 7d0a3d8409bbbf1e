"""Checkpoints in storage: complete or absent there too, whoever has which part, whatever the network does."""

import json
from typing import Any

import pytest
import torch

from mmdiff_ray.config import OutageError, RunError
from mmdiff_ray.storage import filesystem, retry, upload
from mmdiff_ray.storage.filesystem import read_bytes, write_atomic
from mmdiff_ray.training import remote_checkpoints as remote
from mmdiff_ray.training.checkpoint import complete
from tests import sprites as tiny
from tests.faults import faulty
from tests.training import two_machines
from tests.training.two_machines import make_store, one_trainer


@pytest.fixture(scope="module")
def job(sprites):
    return tiny.job(sprites)


@pytest.fixture(scope="module")
def trainer(job):
    """A trainer after a step. Its checkpoints are called apart by the samples it is said to have seen."""
    made = tiny.trainer(job)
    made.advance(tiny.batches(job), 16)
    return made


def names(store) -> list[int]:
    return sorted(int(name) for name in store.remote.stored())


def save(store, trainer, samples: int, metric: float | None = None) -> None:
    trainer.progress.samples_seen = samples
    store.save(trainer, {}, metric)
    store.close()


def test_a_checkpoint_comes_back_on_another_machine(job, trainer, tmp_path):
    uri = f"file://{tmp_path}/storage"
    save(make_store(uri, tmp_path / "one"), trainer, 16)
    path = make_store(uri, tmp_path / "two").latest()
    assert path == tmp_path / "two" / "checkpoints" / "000000000016"
    assert complete(path.parent) == [path]
    again = one_trainer(job, path)
    assert tiny.same(tiny.weights(again.denoiser), tiny.weights(trainer.denoiser))
    assert make_store(uri, tmp_path / "three", run="another of the same name").latest() is None


def test_last_and_best_are_kept_in_storage_and_what_was_never_completed_goes(trainer, tmp_path):
    store = make_store(f"file://{tmp_path}/storage", tmp_path / "one")
    for samples, metric in [(16, 3.0), (32, 1.0), (48, 2.0), (64, 4.0), (80, 5.0)]:
        save(store, trainer, samples, metric)
        if samples == 64:
            fs, left = (
                store.remote.mirror.fs,
                store.remote.mirror.path("checkpoints/000000000070/mark/__0_0.distcp"),
            )
            write_atomic(fs, left, b"by a killed worker")
    assert names(store) == [32, 64, 80]
    found = {name.split("/")[0] for name in store.remote.mirror.files("checkpoints")}
    assert found == {"000000000032", "000000000064", "000000000080"}
    assert [int(path.name) for path in complete(store.folder)] == [32, 64, 80]
    again = make_store(f"file://{tmp_path}/storage", tmp_path / "two")
    assert int(again.latest().name) == 80
    save(again, trainer, 96, 9.0)
    assert names(again) == [32, 80, 96]


def broken(kind: str, store) -> None:
    """Break the newest checkpoint in storage."""
    fs, path = store.remote.mirror.fs, store.remote.mirror.path
    (file,) = [name for name in store.remote.mirror.files() if name.endswith("32/state.json")]
    state = json.loads(read_bytes(fs, path(file)))
    shard = path(f"{file.removesuffix('/state.json')}/{sorted(state['files'])[-1]}")
    if kind == "short file":
        write_atomic(fs, shard, read_bytes(fs, shard)[:-1])
    elif kind == "no file":
        fs.delete_file(shard)
    elif kind == "no state":
        fs.delete_file(path(file))
    elif kind == "half a state":
        write_atomic(fs, path(file), read_bytes(fs, path(file))[:100])


@pytest.mark.parametrize("kind", ["short file", "no file", "no state", "half a state"])
def test_half_a_checkpoint_is_never_taken_for_one(trainer, tmp_path, kind):
    uri = f"file://{tmp_path}/storage"
    store = make_store(uri, tmp_path / "one")
    for samples in (16, 32):
        save(store, trainer, samples)
    broken(kind, store)
    assert names(store) == [16]
    assert int(make_store(uri, tmp_path / "two").latest().name) == 16
    again = make_store(uri, tmp_path / "one")
    assert int(again.latest().name) == 32  # it is whole on this machine, and goes to storage once more
    again.close()
    assert again.unsent == [] and names(again) == [16, 32]


def test_training_goes_on_while_storage_is_away_and_the_newest_gets_there_in_the_end(
    trainer, tmp_path, monkeypatch
):
    monkeypatch.setattr(upload, "STALL_S", 1.0)
    storage = tmp_path / "storage"
    store, called = make_store(f"file://{storage}", tmp_path / "one"), []
    store.remote.completed = lambda: called.append(names(store)[-1])
    storage.write_text("a file where the folder should be")
    for samples in (16, 32, 48, 64):
        trainer.progress.samples_seen = samples
        store.save(trainer, {})
        store.poll()
    store.close()
    assert store.unsent == ["checkpoint 000000000016", "checkpoint 000000000064"]
    assert [int(path.name) for path in complete(store.folder)] == [16, 48, 64]  # 32 is old, 16 on its way
    assert called == []
    storage.unlink()
    monkeypatch.setattr(upload, "STALL_S", 30.0)
    store.close()
    assert store.unsent == [] and names(store) == called == [16, 64]


# --- two machines and S3 ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_storage_that_does_not_answer_is_no_empty_storage(trainer, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "STALL_S", 0.1)
    monkeypatch.setattr(retry, "OUTAGE_S", 0.1)
    with faulty(bucket.port) as network:
        uri = bucket.uri("silent", network.port)
        save(make_store(uri, tmp_path / "one"), trainer, 16)
        network.down = True
        assert int(make_store(uri, tmp_path / "one").latest().name) == 16
        with pytest.raises(OutageError, match=r"cannot look for checkpoints in s3://toys/silent"):
            make_store(uri, tmp_path / "two").latest()


@pytest.mark.parametrize("failures", [1, 100])
def test_a_checkpoint_that_storage_does_not_give_is_asked_for_again(trainer, tmp_path, monkeypatch, failures):
    uri, left = f"file://{tmp_path}/storage", [OSError("no route")] * failures
    save(make_store(uri, tmp_path / "one"), trainer, 16)

    def download(*given: Any) -> None:
        if left:
            raise left.pop()
        filesystem.download(*given)

    monkeypatch.setattr(remote, "download", download)
    two = make_store(uri, tmp_path / "two")
    if failures == 1:
        assert int(two.latest().name) == 16 and [int(path.name) for path in complete(two.folder)] == [16]
        return
    monkeypatch.setattr(retry, "OUTAGE_S", 0.0)
    with pytest.raises(OutageError, match=r"^cannot fetch checkpoint 0+16 from file://.*: no route$"):
        two.latest()
    monkeypatch.setattr(remote, "download", lambda *_: (tmp_path / "nothing").read_bytes())
    with pytest.raises(RunError, match=r"^cannot fetch checkpoint 0+16 .*No such file") as caught:
        two.latest()
    assert not isinstance(caught.value, OutageError)


@pytest.fixture(scope="module")
def seen(job, bucket, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two workers on machines of their own saw."""
    folder = tmp_path_factory.mktemp("machines")
    torch.multiprocessing.spawn(two_machines.work, (job, bucket, folder), nprocs=2)
    return [{**torch.load(folder / f"{rank}.pt"), "folder": folder} for rank in (0, 1)]


@pytest.mark.slow
def test_a_checkpoint_is_complete_when_the_files_of_all_machines_are_there(seen):
    first, second = seen
    assert first["first"] == ["000000000048"]
    unsent = ["checkpoint 000000000080"]
    assert first["without"] == (unsent, ["000000000048"]) and second["without"][0] == unsent
    assert first["with"] == ([], ["000000000048", "000000000080"]) and second["with"][0] == []
    disks = [{path.name for path in (first["folder"] / f"disk-{rank}").rglob("*.distcp")} for rank in (0, 1)]
    assert "__0_0.distcp" in disks[0] and "__1_0.distcp" in disks[1]


@pytest.mark.slow
def test_a_checkpoint_in_parts_on_two_machines_is_joined_by_way_of_storage(seen):
    assert seen[0]["lost"] == ["000000000048", "000000000080"]
    assert seen[0]["joined"] == ("000000000112", True, ["000000000080", "000000000112"])
    assert seen[1]["joined"][:2] == ("000000000112", True)


@pytest.mark.slow
def test_what_two_workers_saved_comes_back_to_two_and_to_one_on_fresh_machines(seen, job, bucket, tmp_path):
    assert tiny.same(seen[0]["back"], seen[1]["back"])
    store = make_store(bucket.uri("apart"), tmp_path / "alone")
    alone = one_trainer(job, store.latest())
    assert alone.progress.samples_seen == 112
    assert tiny.same(tiny.weights(alone.denoiser), seen[0]["back"])
    assert not tiny.same(seen[0]["at 80"], seen[0]["back"])


@pytest.mark.slow
def test_two_workers_of_one_machine_send_every_file_and_keep_the_last_and_best(seen):
    for worker in seen:
        folders = {name.rpartition("/")[0].split("/")[1] for name in worker["same disk"]}
        assert folders == {"000000000016", "000000000032", "000000000048"}
        assert sum(name.endswith(".distcp") for name in worker["same disk"]) == 6
        assert sum(name.endswith("state.json") for name in worker["same disk"]) == 3
