"""A folder and its copy in storage: all of it gets there in the end, and no part is taken for the whole."""

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
from mmdiff_ray.storage.filesystem import (
    exists,
    filesystem,
    frugal,
    join,
    parent,
    read_bytes,
    write_bytes_atomic,
)
from mmdiff_ray.storage.mirror import FILES, UNSENT, Mirror, cached, download, fetched, mirror
from mmdiff_ray.storage.upload import Uploader
from tests import s3
from tests.faults import Faults, faulty

BIG = bytes(range(256)) * 8000


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Mirror, Mirror]:
    """Two machines with a folder each, and storage that both reach."""
    uri = f"file://{tmp_path}/storage/run"
    return Mirror(uri, tmp_path / "one"), Mirror(uri, tmp_path / "two")


def fill(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_what_one_machine_sends_another_fetches(pair: tuple[Mirror, Mirror]) -> None:
    one, two = pair
    fill(one.folder, run="1")
    fill(one.folder / "export", weights="abc", config="x")
    one.send("run", "export")
    assert one.flush(10) == []
    assert two.fetch("run") and (two.folder / "run").read_text() == "1"
    assert two.fetch_folder("export")
    assert {path.name for path in (two.folder / "export").iterdir()} == {"weights", "config", FILES}
    fill(one.folder / "export", weights="abcd")
    fill(one.folder, run="2")
    one.send("export", "run")
    one.flush(10)
    assert two.fetch_folder("export") and (two.folder / "export" / "weights").read_text() == "abcd"
    assert two.fetch("run") and (two.folder / "run").read_text() == "2"


def test_what_is_not_sent_yet_is_newer_than_storage_and_outlives_its_process(
    pair: tuple[Mirror, Mirror],
) -> None:
    one, two = pair
    for machine, text in ((one, "old"), (two, "new")):
        fill(machine.folder, run=text)
        fill(machine.folder / "export", weights=text)
    one.send("run", "export")
    one.flush(10)
    stuck = threading.Event()
    two.uploader.add("something slow", lambda _: stuck.wait() and None)
    two.send("run", "export")
    assert two.fetch("run") and (two.folder / "run").read_text() == "new"
    assert two.fetch_folder("export") and (two.folder / "export" / "weights").read_text() == "new"
    assert two.flush(0.2) == ["export", "run"]
    again = Mirror(two.uri, two.folder)
    assert again.unsent() == ["export", "run"]
    again.resend()
    assert again.flush(10) == [] and one.fetch("run") and (one.folder / "run").read_text() == "new"
    stuck.set()
    assert two.flush(10) == []


def test_what_another_machine_brought_since_is_not_overwritten(pair: tuple[Mirror, Mirror]) -> None:
    one, two = pair
    stuck = threading.Event()
    two.uploader.add("something slow", lambda _: stuck.wait() and None)
    for name in ("run", "export/weights"):
        fill((two.folder / name).parent, **{Path(name).name: "older"})
        fill((one.folder / name).parent, **{Path(name).name: "newer"})
    two.send("run", "export")
    one.send("run", "export")
    assert one.flush(10) == []
    again = Mirror(two.uri, two.folder)
    again.resend()
    assert again.flush(10) == [] and again.fetch("run") and again.fetch_folder("export")
    assert [(two.folder / name).read_text() for name in ("run", "export/weights")] == ["newer", "newer"]


@pytest.mark.parametrize("ahead_s", [300, -300])
def test_who_was_last_is_known_whatever_the_clock_of_storage_says(pair, monkeypatch, ahead_s: int) -> None:
    one, two = pair

    def by_another_clock(write: Callable[..., None], fs: FileSystem, path: str, data: object) -> None:
        write(fs, path, data)
        os.utime(path, (time.time() + ahead_s,) * 2)

    for write in ("write_atomic", "write_bytes_atomic"):
        original = getattr(mirror_module, write)
        monkeypatch.setattr(mirror_module, write, functools.partial(by_another_clock, original))

    def bring(machine: Mirror, text: str) -> None:
        for name in ("run", "export/weights"):
            fill((machine.folder / name).parent, **{Path(name).name: text})
        machine.send("run", "export")

    def after_a_new_start() -> list[str]:
        again = Mirror(one.uri, one.folder)
        again.resend()
        assert again.flush(10) == [] and again.fetch("run") and again.fetch_folder("export")
        return [(one.folder / name).read_text() for name in ("run", "export/weights")]

    bring(one, "old")
    assert one.flush(10) == []
    one.uploader.add("something slow", lambda _: threading.Event().wait() and None)
    bring(one, "new")
    assert after_a_new_start() == ["new", "new"]
    bring(one, "newer")
    bring(two, "by another machine")
    assert two.flush(10) == []
    assert after_a_new_start() == ["by another machine"] * 2


def test_a_folder_without_its_list_or_with_a_short_file_is_no_whole(pair: tuple[Mirror, Mirror]) -> None:
    one, two = pair
    fill(one.folder / "export", weights="abc")
    one.send("export")
    one.flush(10)
    write_bytes_atomic(one.fs, one.path("export/weights"), b"ab")
    with pytest.raises(UnreachableError, match=r"cannot read from file://.*has 2 bytes, 3 were written"):
        two.fetch_folder("export")
    assert not (two.folder / "export").exists()
    one.fs.delete_file(one.path(f"export/{FILES}"))
    assert not two.fetch_folder("export")


def test_a_folder_that_changes_while_it_is_read_is_not_kept(pair: tuple[Mirror, Mirror]) -> None:
    one, two = pair
    fill(one.folder / "export", weights="abc")
    one.send("export")
    one.flush(10)
    older = json.dumps({"mark": "older", "files": {"weights": 3}}).encode()
    with pytest.raises(RunError, match="changed while it was read"):
        two._fetch_files("export", older)
    assert list(two.folder.iterdir()) == []


def test_a_file_that_is_gone_by_now_holds_nothing_up(pair: tuple[Mirror, Mirror]) -> None:
    one, _ = pair
    one.send("never there")
    fill(one.folder, run="1")
    one.send("run")
    assert one.flush(10) == [] and exists(one.fs, one.path("run"))


def test_trouble_is_reported_once_and_each_lane_keeps_its_order() -> None:
    said: list[str] = []
    done: list[str] = []
    failures = iter([OSError("no route"), OSError("still none")])
    uploader = Uploader("s3://toys", said.append)

    def twice(_: object) -> None:
        for failure in failures:
            raise failure
        done.append("first")

    errands = [
        uploader.add("first", twice),
        uploader.add("second", lambda _: done.append("second"), lane="first"),
        uploader.add("third", lambda _: done.append("third")),
    ]
    assert uploader.flush(20) == []
    assert done == ["third", "first", "second"] and all(errand.done for errand in errands)
    assert said == ["first does not reach s3://toys, which is tried again: no route"]


def test_the_cache_has_a_folder_of_its_own_for_every_place(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path))
    uri = "s3://bucket/my%20runs/demo?endpoint_override=host:9000&scheme=http"
    assert cached(uri) == tmp_path / "s3@host%3A9000" / "bucket" / "my runs" / "demo"
    assert cached("s3://bucket/../demo") == tmp_path / "s3" / "bucket" / "demo"
    assert (join("s3://b?region=x", "demo"), parent("s3://b/demo?region=x")) == (
        "s3://b/demo?region=x",
        ("s3://b?region=x", "demo"),
    )
    monkeypatch.delenv("MMDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached("gs://b/c") == tmp_path / "mmdiff_ray" / "gs" / "b" / "c"


@pytest.mark.parametrize("by", ["this process", "another process"])
def test_file_that_is_sent_again_while_its_upload_ends_stays_noted_as_unsent(
    tmp_path: Path, monkeypatch, by: str
) -> None:
    one = Mirror(f"file://{tmp_path}/storage/run", tmp_path / "one")
    sender = one if by == "this process" else Mirror(one.uri, one.folder)
    blocked, unlink = threading.Event(), Path.unlink

    def send_again_first(note: Path, missing_ok: bool = False) -> None:
        if note.parent.name == UNSENT:
            monkeypatch.setattr(Path, "unlink", unlink)
            sender.uploader.add("something slow", lambda _: blocked.wait() and None)
            fill(one.folder, run="2")
            sender.send("run")
        unlink(note, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", send_again_first)
    fill(one.folder, run="1")
    one.send("run")
    assert one.flush(0.5) == ["run"]
    blocked.set()
    assert sender.flush(10) == [] and read_bytes(one.fs, one.path("run")) == b"2"


def test_note_of_an_earlier_release_is_sent(pair: tuple[Mirror, Mirror]) -> None:
    one, _ = pair
    fill(one.folder, run="1")
    fill(one.folder / UNSENT, run="")
    assert one.unsent() == ["run"]
    one.resend()
    assert one.flush(10) == [] and exists(one.fs, one.path("run"))


@pytest.mark.slow
def test_file_that_storage_refuses_holds_up_no_other(bucket: s3.Bucket, tmp_path: Path) -> None:
    one, said = Mirror(bucket.uri("denied"), tmp_path), []
    one.uploader.say = said.append
    bucket.deny("denied/pictures/*")
    for name in ("pictures", "checkpoints/16"):
        fill(one.folder / name, a="1", b="2")
    one.send("pictures/a", "pictures/b")
    checkpoint = [one.send_file(f"checkpoints/16/{name}", "checkpoint 16") for name in "ab"]
    assert one.flush(3) == ["pictures/a", "pictures/b"]
    assert all(errand.done for errand in checkpoint)
    assert one.names() == {"checkpoints/16/a": 1, "checkpoints/16/b": 1}
    assert len(said) == 1 and "pictures/a" in said[0] and "ACCESS_DENIED" in said[0]
    bucket.allow_all()
    assert one.flush(30) == [] and len(one.names()) == 4


# --- a faulty network ------------------------------------------------------------------------------------


@pytest.fixture
def network(bucket: s3.Bucket) -> Iterator[Faults]:
    with faulty(bucket.port) as faults:
        yield faults


def over(network: Faults, bucket: s3.Bucket, folder: Path) -> Mirror:
    """Return a mirror of a folder at an address that only the faulty network reaches."""
    return Mirror(bucket.uri(folder.parent.name, network.port), folder)


@pytest.mark.slow
def test_nobody_waits_for_a_slow_upload(network: Faults, bucket: s3.Bucket, tmp_path: Path) -> None:
    one = over(network, bucket, tmp_path / "one")
    fill(one.folder, run="1")
    network.delay_s = 1.0
    one.send("run")
    assert one.uploader.waiting() == one.unsent() == ["run"]
    assert one.flush(20) == [] and exists(one.fs, one.path("run"))


@pytest.mark.slow
def test_uploads_that_fail_or_break_off_are_tried_until_they_are_whole(
    network: Faults, bucket: s3.Bucket, tmp_path: Path
) -> None:
    one, said = over(network, bucket, tmp_path / "one"), []
    one.uploader.say = said.append
    one.folder.mkdir()
    (one.folder / "big").write_bytes(BIG)
    network.cut_after = len(BIG) // 3
    one.send("big")
    while not one.uploader.trouble:
        assert one.flush(0.2) == ["big"]
    assert network.cut > 0 and not exists(one.fs, one.path("big"))
    network.cut_after, network.fail_next = None, 2
    assert one.flush(30) == [] and one.names() == {"big": len(BIG)}
    assert len(said) == 1 and said[0].startswith(f"big does not reach {one.uri}, which is tried again: ")
    download(one.fs, one.path("big"), tmp_path / "back", len(BIG))
    assert (tmp_path / "back").read_bytes() == BIG


@pytest.mark.slow
def test_a_dead_server_costs_a_bounded_wait_and_nothing_that_is_here(
    network: Faults, bucket: s3.Bucket, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("MMDIFF_CACHE", str(tmp_path / "cache"))
    uri = bucket.uri("dead", network.port)
    one = mirror(uri, cached(uri))
    fill(one.folder / "export", weights="abc")
    network.down = True
    one.send("export")
    assert one.flush(1) == ["export"]
    assert (fetched(join(uri, "export")) / "weights").read_text() == "abc"
    network.down = False
    assert one.flush(30) == []
    shutil.rmtree(one.folder)
    assert (fetched(join(uri, "export")) / "weights").read_text() == "abc"


def test_files_for_s3_are_not_held_in_memory_as_a_whole() -> None:
    fs, _ = filesystem("s3://toys/x?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:9")
    options = [made.__reduce__()[1][0] for made in (fs, frugal(fs))]
    assert options[0].pop("background_writes") and not options[1].pop("background_writes")
    assert options[0] == options[1]
