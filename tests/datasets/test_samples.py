"""Samples of a trained model as a data set: whole rows, the same however many are drawn and wherever."""

import io

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray.cli import main
from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.data.shards import ShardWriter
from mmdiff_ray.datasets.build import build
from mmdiff_ray.sampling.export import load_export, weights_digest
from tests.datasets.reading import read_rows


def drawn(finished, folder, num: int, workers: int = 0, **options) -> dict[str, dict]:
    settings = {"model": str(finished.folder / "export"), "num": num, "steps": 2, **options}
    build("samples", str(folder), settings, workers=workers, progress=False)
    return read_rows(str(folder))


def test_every_sample_is_a_row_of_all_that_the_model_generates(finished, tmp_path):
    rows = drawn(finished, tmp_path / "a", 40)
    model = load_export(finished.folder / "export")
    assert sorted(rows) == [f"{number:09d}" for number in range(40)]
    for row in rows.values():
        assert set(row) >= {"pixels", "shapes", "shape", "factors"} and "masked" not in row
        assert np.asarray(Image.open(io.BytesIO(row["pixels"]))).shape == (8, 8, 3)
        assert len(row["factors"]) == model.modality("factors").prediction_channels
    manifest = read_manifest(str(tmp_path / "a"))
    assert manifest.columns["shape"]["names"] == model.config.modalities["shape"].names
    assert "samples of tiny" in manifest.description


def test_a_sample_depends_on_its_number_and_the_seed_alone(finished, tmp_path):
    few, many = drawn(finished, tmp_path / "few", 5), drawn(finished, tmp_path / "many", 70)
    other = drawn(finished, tmp_path / "other", 5, seed=1)
    for key, row in few.items():
        assert row["pixels"] == many[key]["pixels"] and row["shape"] == many[key]["shape"]
    assert any(row["pixels"] != other[key]["pixels"] for key, row in few.items())


@pytest.mark.slow
@pytest.mark.ray
def test_a_pool_of_models_draws_what_one_process_draws(ray_cluster, finished, tmp_path):
    alone, pool = drawn(finished, tmp_path / "a", 70), drawn(finished, tmp_path / "b", 70, workers=2)
    assert {key: row["pixels"] for key, row in alone.items()} == {k: row["pixels"] for k, row in pool.items()}


def test_what_is_given_is_in_every_row(finished, tmp_path, capsys):
    out = str(tmp_path / "stars")
    words = ["generate", str(finished.folder), "--num", "6", "--out", out, "--workers", "0", "--steps", "2"]
    assert main([*words, "--given", "shape=star"]) == 0
    assert "6 samples. Look at them: mmdiff data inspect" in capsys.readouterr().out
    names = read_manifest(out).columns["shape"]["names"]
    assert {row["shape"] for row in read_rows(out).values()} == {names.index("star")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "nowhere"}, "model: 'nowhere' holds no exported model"),
        ({"num": 0}, r"num \(0\) must be at least 1"),
        ({"given": "shape=sta"}, "shape: no label 'sta'; did you mean 'star'"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_anything_is_written(finished, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        drawn(finished, tmp_path / "a", **{"num": 3, **options})
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_a_model_completes_the_rows_of_a_data_set(finished, sprites, tmp_path, capsys):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    build(
        "sprites",
        source,
        {"count": "40", "annotated": "0.5", "lacks": "shapes,shape"},
        workers=0,
        progress=False,
    )
    words = ["generate", str(finished.folder), "--rows", source, "--given", "pixels", "--out", out]
    assert main([*words, "--workers", "0"]) == 0
    assert "40 completed rows. Look at them: mmdiff data inspect" in capsys.readouterr().out
    before, after = read_rows(source), read_rows(out)
    filled = {row["pixels"]: row for row in after.values()}
    lacking = [row for row in before.values() if row["shape"] is None]
    assert lacking and all(filled[row["pixels"]]["shape"] is not None for row in lacking)
    for row in before.values():
        if row["shape"] is not None:
            assert filled[row["pixels"]]["shapes"] == row["shapes"]
            assert filled[row["pixels"]]["shape"] == row["shape"]
    old, new = read_manifest(source), read_manifest(out)
    assert {name: split.rows for name, split in old.splits.items()} == {
        name: split.rows for name, split in new.splits.items()
    }
    model = load_export(finished.folder / "export")
    made_by = f"{model.config.name} (weights {weights_digest(finished.folder / 'export')})"
    assert f"Completed by {made_by}, given pixels." in new.description


def only(columns: dict, rows: dict, out: str) -> str:
    """Write some columns of rows, the first ten for training, ten for validation."""
    writer = ShardWriter(out, "part", columns)
    for index, row in enumerate(list(rows.values())[:20]):
        part = {name: row[name] for name in columns}
        writer.add({"key": str(index), **part}, "train" if index < 10 else "val")
    writer.close()
    return out


def test_held_out_rows_are_completed_on_request_alone(finished, sprites, tmp_path):
    rows = only({"pixels": {"kind": "image"}}, read_rows(sprites), str(tmp_path / "pictures"))
    settings = {"model": str(finished.folder / "export"), "rows": rows, "given": "pixels"}
    for splits, held_out in (("train", 0), ("train,val", 10)):
        out = str(tmp_path / splits)
        build("predictions", out, settings | {"splits": splits}, workers=0, progress=False)
        lacking = [row["shape"] is None for row in read_rows(out).values()]
        assert lacking.count(False) == 10 + held_out
    with pytest.raises(ConfigError, match="splits: unknown"):
        build("predictions", str(tmp_path / "a"), settings | {"splits": "dev"}, workers=0, progress=False)


def test_labels_of_other_classes_are_not_mixed(finished, sprites, tmp_path):
    source = {
        key: row | {"shape": None if int(row["id"]) % 2 else 0} for key, row in read_rows(sprites).items()
    }
    columns = {"pixels": {"kind": "image"}, "shape": {"kind": "label", "names": ["round", "square"]}}
    rows = only(columns, source, str(tmp_path / "other"))
    settings = {"model": str(finished.folder / "export"), "rows": rows, "given": "pixels"}
    with pytest.raises(ConfigError, match=r"column 'shape' of .* has another names \(round, square\) than"):
        build("predictions", str(tmp_path / "out"), settings, workers=0, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_completing_rows_needs_instances_that_they_have(finished, sprites, tmp_path, capsys):
    words = [
        "generate",
        str(finished.folder),
        "--rows",
        sprites,
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "0",
    ]
    assert main(words) == 2
    assert "--rows wants the instances that rows have" in capsys.readouterr().err
    assert main([*words, "--given", "colour"]) == 2
    assert "the model has no modality 'colour'; it has:" in capsys.readouterr().err
