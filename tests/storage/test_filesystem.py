"""Files by URI: read in one version, written whole or not at all."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.storage.filesystem import (
    absolute,
    check_writable,
    download,
    filesystem,
    join,
    list_files,
    parent,
    read_bytes,
    write_atomic,
)
from tests.data.samples import write


def test_a_relative_path_and_a_file_uri_name_the_same_data_set(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = write("toy set", range(10))
    assert read_manifest("toy set") == written
    assert read_manifest(f"file://{tmp_path}/toy%20set") == written
    assert absolute("toy set") == str(tmp_path / "toy set")


def test_options_of_a_uri_stay_behind_its_path() -> None:
    assert join("s3://b?region=x", "demo") == "s3://b/demo?region=x"
    assert parent("s3://b/demo?region=x") == ("s3://b?region=x", "demo")


def test_a_rewritten_file_is_complete_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    fs, root = filesystem(str(tmp_path / "new/folder"))
    for data in (b"first", b"second"):
        write_atomic(fs, f"{root}/file", data)
        assert read_bytes(fs, f"{root}/file") == data
    assert list(list_files(fs, root)) == ["file"]


@pytest.mark.parametrize("uri", ["nope://bucket/x", "s3://bucket/x?colour=red"])
def test_a_uri_that_cannot_be_opened_is_named(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot open (nope|s3)://bucket/x.*want a path or"):
        filesystem(uri)


def test_the_check_whether_a_folder_can_be_written_to_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep", "empty/new"):
        check_writable(str(tmp_path / name))
    check_writable(f"file://{tmp_path}/other")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    for uri in ("/proc/x/y", str(tmp_path / "file"), str(tmp_path / "file" / "x")):
        with pytest.raises(ConfigError, match=f"^out: cannot write to {uri}: "):
            check_writable(uri)
        with pytest.raises(ConfigError, match=f"^out: cannot write to {uri}: "):
            write(uri, range(1))
    assert (tmp_path / "file").read_text() == "dear"


def test_a_file_on_s3_is_not_held_in_memory_while_it_is_written() -> None:
    fs, _ = filesystem("s3://toys/x?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:9")
    options = fs.__reduce__()[1][0]
    assert options["background_writes"] is False and options["endpoint_override"] == "127.0.0.1:9"


@contextlib.contextmanager
def replaced(uri: str, versions: list[bytes]) -> Iterator[None]:
    """Write versions of a file by turns for the block."""
    (fs, path), ended = filesystem(uri), threading.Event()

    def write_all() -> None:
        while not ended.is_set():
            for data in versions:
                write_atomic(fs, path, data)

    write_atomic(fs, path, versions[0])
    thread = threading.Thread(target=write_all)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
def test_a_file_that_is_replaced_during_a_read_is_read_in_one_version(bucket, tmp_path: Path) -> None:
    uri, versions = bucket.uri("journal"), [b"short", b"a longer one", b"the longest of them all"]
    fs, path = filesystem(uri)
    with replaced(uri, versions):
        for _ in range(100):
            assert read_bytes(fs, path) in versions
            download(fs, path, tmp_path / "file")
            assert (tmp_path / "file").read_bytes() in versions
