"""URIs and files."""

import threading
from pathlib import Path

import pytest

from mmdiff_ray.config import ConfigError, UnreachableError
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.storage.filesystem import (
    absolute,
    check_writable,
    filesystem,
    read_bytes,
    within,
    write_bytes_atomic,
)
from tests.data.samples import write


def test_a_relative_path_and_a_file_uri_name_the_same_data_set(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = write("toy set", range(10))
    assert read_manifest("toy set") == written
    assert read_manifest(f"file://{tmp_path}/toy%20set") == written
    assert absolute("toy set") == str(tmp_path / "toy set")
    monkeypatch.chdir("/")
    assert read_manifest(str(tmp_path / "toy set")) == written


def test_a_rewritten_file_is_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    fs, root = filesystem(str(tmp_path / "new/folder"))
    for data in (b"first", b"second"):
        write_bytes_atomic(fs, f"{root}/file", data)
        assert read_bytes(fs, f"{root}/file") == data
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["file"]


@pytest.mark.parametrize("uri", ["nope://bucket/x", "s3://bucket/x?colour=red"])
def test_a_uri_that_cannot_be_opened_is_named(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot open (nope|s3)://bucket/x.*want a path or"):
        filesystem(uri)


def test_asking_whether_a_folder_can_be_written_to_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep", "empty/new"):
        check_writable(str(tmp_path / name))
    check_writable(f"file://{tmp_path}/other")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    for uri in ("/proc/x/y", str(tmp_path / "file"), str(tmp_path / "file" / "x")):
        with pytest.raises(ConfigError, match=f"^out: cannot write to {uri}: "):
            check_writable(uri)
        with pytest.raises(ConfigError, match=f"^out: cannot write to {uri}: "):
            write(uri, range(1))
    assert (tmp_path / "file").read_text() == "dear"


def test_answer_that_takes_too_long_is_not_waited_for() -> None:
    with pytest.raises(UnreachableError, match=r"the store is silent within 0.05 s"):
        within(0.05, threading.Event().wait, "the store is silent")
    assert within(5.0, lambda: 3, "") == 3
    with pytest.raises(KeyError):
        within(5.0, {}.popitem, "")
