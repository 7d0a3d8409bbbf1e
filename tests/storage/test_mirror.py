"""A folder and its copy in storage: every file arrives in the end, and no part passes for the whole."""

import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow.fs import FileSystem

from mmdiff_ray.config import RunError, UnreachableError
from mmdiff_ray.storage import mirror as mirror_module
from mmdiff_ray.storage.filesystem import exists, join, read_bytes, write_atomic
from mmdiff_ray.storage.mirror import FILES, UNSENT, Mirror, cached, fetched, mirror
from mmdiff_ray.storage.upload import UploadQueue
from tests import s3
from tests.faults import Faults, faulty

BIG = bytes(range(256)) * 8000


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Mirror, Mirror]:
    """Two machines with a folder each, and storage that both reach."""
    uri = f"file://{tmp_path}/storage/run"
    return Mirror(uri, tmp_path / "one"), Mirror(uri, tmp_path / "two")


def fill(machine: Mirror, text: str, *names: str) -> None:
    for name in names or ("run", "export/weights"):
        (machine.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (machine.folder / name).write_text(text)


def block(machine: Mirror) -> threading.Event:
    """Let a machine's uploads wait until an event."""
    blocked = threading.Event()
    for lane in ("", "export"):
        machine.uploads.add("something slow", lambda: blocked.wait() and None, lane)
    return blocked


def texts(machine: Mirror) -> list[str]:
    """Fetch the file and the folder; return what they hold."""
    assert machine.fetch("run") and machine.fetch_folder("export")
    return [(machine.folder / name).read_text() for name in ("run", "export/weights")]


def test_one_machine_fetches_what_another_sends(pair: tuple[Mirror, Mirror]) -> None:
    one, two = pair
    fill(one, "config", "export/config")
    for text in ("1", "longer"):
        fill(one, text)
        one.send("run", "export", "never there")
        assert one.flush(10) == []
        assert texts(two) == [text, text]
    assert {path.name for path in (two.folder / "export").iterdir()} == {"weights", "config", FILES}


def test_unsent_files_are_newer_than_storage_and_outlive_their_process(pair: tuple[Mirror, Mirror]) -> None:
    one, two = pair
    fill(one, "old")
    one.send("run", "export")
    assert one.flush(10) == []
    fill(two, "new")
    blocked = block(two)
    two.send("run", "export")
    assert texts(two) == ["new", "new"]
    assert two.flush(0.2) == ["export", "run"]
    again = Mirror(two.uri, two.folder)
    assert again.unsent() == ["export", "run"]
    again.resend()
    assert again.flush(10) == [] and texts(one) == ["new", "new"]
    blocked.set()
    assert two.flush(10) == []


def test_what_another_machine_sent_since_is_not_overwritten(pair: tuple[Mirror, Mirror]) -> None:
    one, two = pair
    block(two)
    for machine, text in ((two, "older"), (one, "newer")):
        fill(machine, text)
        machine.send("run", "export")
    assert one.flush(10) == []
    again = Mirror(two.uri, two.folder)
    again.resend()
    assert again.flush(10) == [] and texts(again) == ["newer", "newer"]


@pytest.mark.parametrize("ahead_s", [300, -300])
def test_the_clock_of_storage_does_not_decide_who_was_last(pair, monkeypatch, ahead_s: int) -> None:
    one, two = pair

    def by_another_clock(write: Callable[..., None], fs: FileSystem, path: str, data: object) -> None:
        write(fs, path, data)
        os.utime(path, (time.time() + ahead_s,) * 2)

    monkeypatch.setattr(mirror_module, "write_atomic", functools.partial(by_another_clock, write_atomic))

    def send(machine: Mirror, text: str) -> None:
        fill(machine, text)
        machine.send("run", "export")

    def after_a_restart() -> list[str]:
        again = Mirror(one.uri, one.folder)
        again.resend()
        assert again.flush(10) == []
        return texts(again)

    send(one, "old")
    assert one.flush(10) == []
    block(one)
    send(one, "new")
    assert after_a_restart() == ["new", "new"]
    send(one, "newer")
    send(two, "by another machine")
    assert two.flush(10) == []
    assert after_a_restart() == ["by another machine"] * 2


def test_an_incomplete_folder_is_not_fetched(pair: tuple[Mirror, Mirror]) -> None:
    one, two = pair
    fill(one, "abc")
    one.send("export")
    one.flush(10)
    older = json.dumps({"mark": "older", "files": {"weights": 3}}).encode()
    with pytest.raises(RunError, match="changed during the download"):
        two._download_folder("export", older)
    write_atomic(one.fs, one.path("export/weights"), b"ab")
    with pytest.raises(UnreachableError, match=r"cannot read from file://.*has 2 bytes, expected 3"):
        two.fetch_folder("export")
    assert list(two.folder.iterdir()) == []
    one.fs.delete_file(one.path(f"export/{FILES}"))
    assert not two.fetch_folder("export")


def test_an_outage_is_one_warning_and_each_lane_keeps_its_order() -> None:
    warnings: list[str] = []
    done: list[str] = []
    failures = iter([OSError("no route"), OSError("still none")])
    queue = UploadQueue("s3://toys", warnings.append)

    def fail_twice() -> None:
        for failure in failures:
            raise failure
        done.append("first")

    uploads = [
        queue.add("first", fail_twice, "a"),
        queue.add("second", lambda: done.append("second"), "a"),
        queue.add("third", lambda: done.append("third"), "b"),
    ]
    assert queue.flush(20) == []
    assert done == ["third", "first", "second"] and all(upload.done for upload in uploads)
    assert warnings == ["cannot upload first to s3://toys, retrying: no route"]


def test_the_cache_has_a_folder_of_its_own_for_every_place(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path))
    uri = "s3://bucket/my%20runs/demo?endpoint_override=host:9000&scheme=http"
    assert cached(uri) == tmp_path / "s3@host%3A9000" / "bucket" / "my runs" / "demo"
    assert cached("s3://bucket/../demo") == tmp_path / "s3" / "bucket" / "demo"
    monkeypatch.delenv("MMDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached("gs://b/c") == tmp_path / "mmdiff_ray" / "gs" / "b" / "c"


@pytest.mark.parametrize("by", ["this process", "another process"])
def test_a_file_that_is_sent_again_while_its_upload_ends_stays_unsent(
    tmp_path: Path, monkeypatch, by: str
) -> None:
    one = Mirror(f"file://{tmp_path}/storage/run", tmp_path / "one")
    sender = one if by == "this process" else Mirror(one.uri, one.folder)
    blocked, unlink = [], Path.unlink

    def send_again_first(note: Path, missing_ok: bool = False) -> None:
        if note.parent.name == UNSENT:
            monkeypatch.setattr(Path, "unlink", unlink)
            blocked.append(block(sender))
            fill(one, "2", "run")
            sender.send("run")
        unlink(note, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", send_again_first)
    fill(one, "1", "run")
    one.send("run")
    assert one.flush(0.5) == ["run"]
    blocked[0].set()
    assert sender.flush(10) == [] and read_bytes(one.fs, one.path("run")) == b"2"


def test_a_note_of_an_earlier_release_is_sent(pair: tuple[Mirror, Mirror]) -> None:
    one, _ = pair
    fill(one, "1", "run", f"{UNSENT}/run")
    assert one.unsent() == ["run"]
    one.resend()
    assert one.flush(10) == [] and exists(one.fs, one.path("run"))


@pytest.mark.slow
def test_a_file_that_storage_refuses_delays_no_other_folder(bucket: s3.Bucket, tmp_path: Path) -> None:
    one, warnings = Mirror(bucket.uri("denied"), tmp_path), []
    one.uploads.warn = warnings.append
    bucket.deny("denied/pictures/*")
    fill(one, "1", *(f"{folder}/{name}" for folder in ("pictures", "checkpoints/16") for name in "ab"))
    one.send("pictures/a", "pictures/b")
    checkpoint = [one.send_file(f"checkpoints/16/{name}", "checkpoint 16") for name in "ab"]
    assert one.flush(3) == ["pictures/a", "pictures/b"]
    assert all(upload.done for upload in checkpoint)
    assert one.files() == {"checkpoints/16/a": 1, "checkpoints/16/b": 1}
    assert len(warnings) == 1 and "pictures/a" in warnings[0] and "ACCESS_DENIED" in warnings[0]
    bucket.allow_all()
    assert one.flush(30) == [] and len(one.files()) == 4


# --- a faulty network ------------------------------------------------------------------------------------


@pytest.fixture
def network(bucket: s3.Bucket) -> Iterator[Faults]:
    with faulty(bucket.port) as faults:
        yield faults


@pytest.mark.slow
def test_uploads_that_are_slow_or_break_off_run_in_the_background_until_they_are_complete(
    network: Faults, bucket: s3.Bucket, tmp_path: Path
) -> None:
    one, warnings = Mirror(bucket.uri("broken", network.port), tmp_path / "one"), []
    one.uploads.warn = warnings.append
    one.folder.mkdir()
    (one.folder / "big").write_bytes(BIG)
    network.delay_s, network.cut_after = 0.1, len(BIG) // 3
    one.send("big")
    assert one.uploads.waiting == one.unsent() == ["big"]
    network.delay_s = 0.0
    while not warnings:
        assert one.flush(0.2) == ["big"]
    assert network.cut > 0 and not exists(one.fs, one.path("big"))
    network.cut_after, network.fail_next = None, 2
    assert one.flush(30) == [] and one.files() == {"big": len(BIG)}
    assert len(warnings) == 1 and warnings[0].startswith(f"cannot upload big to {one.uri}, retrying: ")
    two = Mirror(one.uri, tmp_path / "two")
    assert two.fetch("big") and (two.folder / "big").read_bytes() == BIG


@pytest.mark.slow
def test_a_dead_server_costs_a_bounded_wait_and_no_local_file(
    network: Faults, bucket: s3.Bucket, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "cache"))
    uri = bucket.uri("dead", network.port)
    one = mirror(uri, cached(uri))
    fill(one, "abc")
    network.down = True
    one.send("export")
    assert one.flush(1) == ["export"]
    assert (fetched(join(uri, "export")) / "weights").read_text() == "abc"
    network.down = False
    assert one.flush(30) == []
    shutil.rmtree(one.folder)
    assert (fetched(join(uri, "export")) / "weights").read_text() == "abc"
