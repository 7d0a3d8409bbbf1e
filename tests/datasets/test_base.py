"""Building: order, limits, restarts, refusals, bad rows, and Ray against this process."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.data.parquet import read_row_group
from mmdiff_ray.data.shards import row_id, split_of, verify
from mmdiff_ray.datasets.base import BadRow, Item
from mmdiff_ray.datasets.build import build, choose, make_pipeline
from mmdiff_ray.datasets.sprites import Sprites, SpritesOptions
from tests.datasets.reading import read_rows


@dataclasses.dataclass(frozen=True)
class FragileOptions(SpritesOptions):
    """breaks_at: the scene at which the build is interrupted; bad: every so many scenes one is unreadable."""

    breaks_at: int | None = None
    bad: int | None = None


@registry.register("pipeline", "fragile")
class Fragile(Sprites):
    """Sprites from a source that has bad files and can be interrupted."""

    Options = FragileOptions

    def row(self, item: Item):
        if item.source == self.options.breaks_at:
            raise KeyboardInterrupt
        if self.options.bad and item.source % self.options.bad == 0:
            raise BadRow(f"scene {item.source} is torn")
        return super().row(item)


def make(out, **options):
    return build("fragile", str(out), {"size": 8, **options}, workers=0, progress=False)


def test_order_depends_on_keys_alone():
    items = [Item(f"k{index}", index) for index in range(50)]
    assert choose(items, None) == choose(items[::-1], None)
    assert choose(items, None) != items


def test_limit_takes_the_first_of_the_same_order():
    items = [Item(f"k{index}", index) for index in range(50)]
    assert choose(items, 7) == choose(items, None)[:7]


def test_two_items_of_one_key_are_refused():
    with pytest.raises(ConfigError, match="same key 'a'"):
        choose([Item("a", 1), Item("b", 2), Item("a", 3)], None)


def test_source_without_items_is_refused():
    with pytest.raises(ConfigError, match="no items"):
        choose([], None)


def test_options_arrive_from_text_with_their_types():
    options = make_pipeline("sprites", {"size": "12", "limit": "3", "val_share": "0.25"}).options
    assert (options.size, options.limit, options.val_share) == (12, 3, 0.25)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"openmoji.*did you mean 'sprites'"):
        make_pipeline("sprits")
    with pytest.raises(ConfigError, match="sise"):
        make_pipeline("sprites", {"sise": 3})


def test_interrupted_build_continues_to_the_same_data_set(tmp_path):
    whole = make(tmp_path / "whole", count=1400)
    keys = [item.key for item in choose(make_pipeline("sprites", {"count": 1400}).items(), None)]
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "broken", count=1400, breaks_at=int(keys[1300].split("/")[-1]))
    with pytest.raises(ConfigError, match="interrupted"):
        read_manifest(str(tmp_path / "broken"))
    again = make(tmp_path / "broken", count=1400)
    assert (again.kept, again.written) == (1024, 1400 - 1024)
    assert again.manifest == whole.manifest
    assert verify(str(tmp_path / "broken")) == []


@dataclasses.dataclass(frozen=True)
class GroupedOptions(FragileOptions):
    """named: the split of the first ten scenes."""

    named: str = "test"


@registry.register("pipeline", "grouped")
class Grouped(Fragile):
    """Sprites whose rows stay together in fives, and some of which name their split."""

    Options = GroupedOptions

    def items(self):
        named = self.options.named
        return [
            item._replace(group=f"group {item.source // 5}", split=named if item.source < 10 else None)
            for item in super().items()
        ]


def splits_of_scenes(uri: str) -> dict[int, str]:
    manifest, found = read_manifest(uri), {}
    for split in manifest.splits.values():
        for shard in split.shards:
            for group in range(len(shard.row_groups)):
                for key in read_row_group(uri, shard.row_group(group), ["key"])["key"]:
                    found[int(key.split("/")[-1])] = shard.path.split("/")[0]
    return found


def test_items_of_a_group_share_a_split_and_a_named_split_is_kept(tmp_path):
    options = {"count": 100, "size": 8, "val_share": 0.3, "test_share": 0.3}
    build("grouped", str(tmp_path / "set"), options, workers=0, progress=False)
    found = splits_of_scenes(str(tmp_path / "set"))
    assert len(found) == 100 and set(found.values()) == {"train", "val", "test"}
    assert {found[number] for number in range(10)} == {"test"}
    for number in range(10, 100):
        assert found[number] == split_of(row_id(f"group {number // 5}"), 0.3, 0.3)


def test_an_interrupted_build_is_not_continued_with_other_splits(tmp_path):
    options = {"count": 1400, "size": 8}
    last = choose(make_pipeline("grouped", options).items(), None)[-1].source
    first = options | {"named": "train", "breaks_at": last}
    with pytest.raises(KeyboardInterrupt):
        build("grouped", str(tmp_path / "set"), first, workers=0, progress=False)
    with pytest.raises(ConfigError, match=r"interrupted build with .* in the split 'train', now 'test'"):
        build("grouped", str(tmp_path / "set"), options, workers=0, progress=False)


def test_finished_data_set_is_not_overwritten_without_force(tmp_path):
    make(tmp_path / "set", count=20)
    before = read_rows(str(tmp_path / "set"))
    with pytest.raises(ConfigError, match="force"):
        make(tmp_path / "set", count=30)
    assert read_rows(str(tmp_path / "set")).keys() == before.keys()
    build("fragile", str(tmp_path / "set"), {"count": 30, "size": 8}, force=True, workers=0, progress=False)
    assert len(read_rows(str(tmp_path / "set"))) == 30


def test_place_that_cannot_be_written_to_is_told_before_the_source_is_looked_at():
    with pytest.raises(ConfigError, match="out: cannot write to /proc/x"):
        build("folder", "/proc/x", {"source": "nowhere"}, workers=0, progress=False)


def test_bad_rows_are_left_out_and_reported(tmp_path):
    built = make(tmp_path / "set", count=40, bad=10, bad_limit=4)
    assert len(built.bad) == 4
    assert set(built.bad.values()) == {f"scene {index} is torn" for index in (0, 10, 20, 30)}
    assert built.written == len(read_rows(str(tmp_path / "set"))) == 36


def test_more_bad_rows_than_the_limit_stop_the_build(tmp_path):
    with pytest.raises(ConfigError, match=r"more than bad_limit \(3\)[\s\S]*is torn"):
        make(tmp_path / "set", count=40, bad=10, bad_limit=3)


def test_manifest_carries_description_and_credit(tmp_path):
    manifest = make(tmp_path / "set", count=5).manifest
    assert manifest.name == "fragile"
    assert manifest.description.startswith("Sprites from a source")
    assert "free to use" in manifest.credit


@pytest.mark.ray
def test_ray_and_this_process_give_the_same_rows(ray_cluster, tmp_path):
    options = {"size": 32, "limit": 70, "captions": "off"}
    build("openmoji", str(tmp_path / "here"), options, workers=0, progress=False)
    build("openmoji", str(tmp_path / "ray"), options, workers=1, progress=False)
    here, ray = read_rows(str(tmp_path / "here")), read_rows(str(tmp_path / "ray"))
    assert list(here) == list(ray)
    assert len(here) == 70
    for key, row in here.items():
        np.testing.assert_allclose(row.pop("look"), ray[key].pop("look"), atol=2e-6)
        assert row == ray[key]


@pytest.mark.ray
def test_build_on_its_own_ray_is_silent_and_leaves_none_behind(tmp_path):
    program = f"""
        import ray
        from mmdiff_ray.datasets.build import build
        build("sprites", {str(tmp_path / "set")!r}, {{"count": 40, "size": 8}}, workers=1, progress=False)
        assert not ray.is_initialized()
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert len(read_rows(str(tmp_path / "set"))) == 40
