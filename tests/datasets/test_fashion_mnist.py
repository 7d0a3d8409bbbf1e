"""Fashion-MNIST from IDX files that the tests write: pictures, classes, masks, and files that are no such."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.build import build, make_pipeline
from mmdiff_ray.datasets.fashion_mnist import NAMES, read_idx
from tests.datasets.reading import decode, read_rows

FILES = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")}
FILES["test"] = tuple(name.replace("train", "t10k") for name in FILES["train"])


def write_idx(file: Path, values: np.ndarray, kind: int = 8) -> None:
    head = bytes([0, 0, kind, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    file.write_bytes(gzip.compress(head + values.tobytes()))


def some_clothes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    pictures = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    pictures[:, :, :9] = 0
    return pictures, generator.integers(0, 10, count, dtype=np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for seed, (part, count) in enumerate([("train", 12), ("test", 5)]):
        for name, values in zip(FILES[part], some_clothes(count, seed), strict=True):
            write_idx(folder / name, values)
    return folder


def test_pictures_are_embedded_where_one_asks_for_it(source, tmp_path):
    out, options = str(tmp_path / "set"), {"source": str(source), "look": "efficientnet-lite0", "limit": 3}
    built = build("fashion_mnist", out, options, workers=0, progress=False)
    dim = built.manifest.columns["look"]["dim"]
    assert [np.shape(row["look"]) for row in read_rows(out).values()] == [(dim,)] * 3


def test_rows_are_the_pictures_and_classes_of_both_parts(source, tmp_path):
    out = str(tmp_path / "set")
    built = build("fashion_mnist", out, {"source": str(source)}, workers=0, progress=False)
    assert built.manifest.columns["label"]["names"] == list(NAMES) and len(NAMES) == 10
    assert built.manifest.columns["pixels"]["size"] == [32, 32]
    rows = read_rows(out)
    expected = {
        f"{part}/{index:05d}": row
        for seed, (part, count) in enumerate([("train", 12), ("test", 5)])
        for index, row in enumerate(zip(*some_clothes(count, seed), strict=True))
    }
    assert rows.keys() == expected.keys()
    for key, (picture, label) in expected.items():
        pixels = decode(rows[key]["pixels"])
        assert rows[key]["label"] == label
        assert all(np.array_equal(pixels[2:30, 2:30, channel], picture) for channel in range(3))
        assert pixels.sum() == 3 * picture.sum(dtype=int)  # all around is black
        assert np.array_equal(decode(rows[key]["alpha"]), pixels[..., 0] > 0)


def test_pictures_stay_as_they_are_at_their_own_size(source, tmp_path):
    out = str(tmp_path / "set")
    build("fashion_mnist", out, {"source": str(source), "size": 28}, workers=0, progress=False)
    picture = some_clothes(12, 0)[0][3]
    assert np.array_equal(decode(read_rows(out)["train/00003"]["pixels"])[..., 1], picture)


def test_sizes_below_the_pictures_are_refused(source):
    with pytest.raises(ConfigError, match=r"size \(24\) must be at least 28"):
        make_pipeline("fashion_mnist", {"source": str(source), "size": 24})


def test_a_missing_file_is_named_with_what_installs_it(source):
    (source / FILES["test"][1]).unlink()
    with pytest.raises(ConfigError, match=r"t10k-labels-idx1-ubyte.gz; install .*dataset-fashion-mnist"):
        make_pipeline("fashion_mnist", {"source": str(source)}).items()


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip at all",
        gzip.compress(b"")[:-4],
        gzip.compress(b"\0\0"),
        gzip.compress(b"\0\0\x08\x02\0\0\0\x02\0\0"),
        gzip.compress(b"\0\0\x08\x01\0\0\0\x03ab"),
        gzip.compress(b"\0\0\x08\x01\0\0\0\x03abcd"),
        gzip.compress(b"\0\0\x0d\x01\0\0\0\x03abc"),
    ],
    ids=["no gzip", "cut gzip", "no head", "cut head", "too short", "too long", "floats"],
)
def test_other_files_are_refused_by_name(tmp_path, content):
    file = tmp_path / "labels.gz"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"source: .*labels\.gz"):
        read_idx(file)


def test_pictures_and_classes_that_do_not_belong_together_are_refused(source):
    write_idx(source / FILES["train"][1], np.zeros(11, np.uint8))
    with pytest.raises(ConfigError, match=r"hold \(12, 28, 28\) and \(11,\)"):
        make_pipeline("fashion_mnist", {"source": str(source)}).items()
    write_idx(source / FILES["train"][1], np.full(12, 10, np.uint8))
    with pytest.raises(ConfigError, match="holds class 10; want 0 to 9"):
        make_pipeline("fashion_mnist", {"source": str(source)}).items()
