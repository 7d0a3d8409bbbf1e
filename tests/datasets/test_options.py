"""Options of pipelines: read in every form, and all of them told."""

import dataclasses

import pytest

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.base import Options
from mmdiff_ray.datasets.options import describe, meanings, pipeline_options


def test_pipeline_options_are_read_in_every_form():
    words = ["a=1", "--b", "2", "--c-d=3", "--e", "x=y"]
    assert pipeline_options(words) == {"a": "1", "b": "2", "c_d": "3", "e": "x=y"}
    for words in (["alone"], ["--last"]):
        with pytest.raises(ConfigError, match="must have the form key=value"):
            pipeline_options(words)


@pytest.mark.parametrize("name", registry.names("pipeline"))
def test_every_option_has_a_meaning_and_a_line_with_its_default(name):
    options, told = registry.look_up("pipeline", name).Options, describe(name)
    lines = [" ".join(line.split()) for line in told.replace("\n" + " " * 18, " ").splitlines()]
    for field in dataclasses.fields(options):
        meaning = meanings(options).get(field.name, "")
        assert len(meaning.split()) > 1, field.name
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        assert f"{field.name} {meaning}{default}" in lines, field.name
    assert max(len(line) for line in told.splitlines()) <= 100


def test_an_option_begins_where_its_name_stands_at_the_beginning_of_a_part():
    @dataclasses.dataclass(frozen=True)
    class Own(Options):
        """What it is. size: pixels a side, not depth: ever; depth: bits a
        pixel. limit: another meaning."""

        size: int = 1
        depth: int = 2

    found = meanings(Own)
    assert {key: found[key] for key in ("size", "depth", "limit")} == {
        "size": "pixels a side, not depth: ever",
        "depth": "bits a pixel",
        "limit": "another meaning",
    }
    assert found["val_share"] == meanings(Options)["val_share"]
