"""The configuration against its data sets, before anything starts."""

from pathlib import Path

import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.check import read_sources, resolve_modalities
from mmdiff_ray.data.shards import ShardWriter
from tests.data.samples import COLUMNS, MODALITIES, config, row, write


def resolve(uris: list[str], **changes):
    configured = config(uris, **changes)
    return resolve_modalities(configured, read_sources(configured))


def write_columns(uri: str, columns: dict, rows: int = 30) -> str:
    writer = ShardWriter(uri, "other", columns, val_share=0.2)
    for number in range(rows):
        writer.add({key: value for key, value in row(number).items() if key == "key" or key in columns})
    writer.close()
    return uri


def test_what_only_the_data_set_knows_is_filled_in(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, range(30))
    resolved = resolve([uri])
    assert resolved.modalities["look"].dim == 4
    assert resolved.modalities["alpha"].classes == 2
    assert resolved.modalities["category"].names == COLUMNS["category"]["names"]
    assert resolved.data == config([uri]).data


def test_no_sources_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data.sources is empty"):
        resolve([])


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    uri = write_columns(str(tmp_path / "toy"), {"pixels": COLUMNS["pixels"]})
    with pytest.raises(ConfigError, match=r"modalities.alpha needs the column 'alpha'.*it has: pixels"):
        resolve([uri])


def test_a_column_without_a_value_is_named(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, [2, 7, 12, 17, 22])
    with pytest.raises(ConfigError, match=r"needs the column 'look'.*in no row there is a value of: look"):
        resolve([uri])


def test_one_source_may_lack_a_column_that_another_has(tmp_path: Path) -> None:
    poor = write_columns(str(tmp_path / "poor"), {"pixels": COLUMNS["pixels"]})
    rich = str(tmp_path / "rich")
    write(rich, range(30))
    empty = str(tmp_path / "empty")
    write(empty, [2, 7, 12, 17, 22])
    assert resolve([poor, rich, empty]).modalities["look"].dim == 4


def test_sources_that_disagree_on_labels_are_refused(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    write(one, range(30))
    write_columns(two, {**COLUMNS, "category": {"kind": "label", "names": ["bee", "ant", "cat"]}})
    with pytest.raises(
        ConfigError, match=r"modalities.category: the data sets disagree on names of column 'category'"
    ):
        resolve([one, two])
    kept = {name: entry for name, entry in MODALITIES.items() if name != "category"}
    assert set(resolve([one, two], modalities=kept).modalities) == set(kept)


def test_an_empty_training_split_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, range(30), val_share=1.0)
    with pytest.raises(ConfigError, match=f"data.sources: {uri} has no rows to train on"):
        resolve([uri])


def test_an_empty_evaluation_split_is_refused_only_where_it_is_used(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, range(30), val_share=0.0)
    assert resolve([uri]).evaluate.split == "val"
    with pytest.raises(ConfigError, match=r"the split 'val' has no rows; .*evaluate.split=train"):
        resolve([uri], evaluate={"evaluators": ["bound"]})
    with pytest.raises(ConfigError, match=r"the split 'test' has no rows; .* a larger test_share"):
        resolve([uri], evaluate={"evaluators": ["bound"], "split": "test"})


def test_a_source_of_no_weight_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, range(30))
    with pytest.raises(ConfigError, match=rf"the weight of {uri} \(0.0\) must be above 0"):
        resolve([uri], data={"sources": [{"uri": uri, "weight": 0.0}]})


def test_an_instance_made_from_one_that_is_not_configured_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "toy")
    write(uri, range(30))
    changed = {**MODALITIES, "masked": {"type": "masked_image", "source": "alpha_only"}}
    with pytest.raises(ConfigError, match=r"modalities.masked is made from 'alpha_only'"):
        resolve([uri], modalities=changed)
