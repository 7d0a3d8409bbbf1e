"""Registration: names are unique, homes are searched once, errors say what there is."""

import sys

import pytest

from mmdiff_ray import registry
from mmdiff_ray.registry import look_up, names, register


def test_an_unknown_name_is_an_error_that_lists_and_suggests():
    with pytest.raises(KeyError) as error:
        look_up("schedule", "cosin")
    assert error.value.args[0].startswith("unknown schedule 'cosin'; registered: cosine, linear, ")
    assert error.value.args[0].endswith("; did you mean 'cosine'?")


def test_what_is_registered_is_found_by_its_name(monkeypatch):
    monkeypatch.setitem(
        registry._parts, "sampler", {name: look_up("sampler", name) for name in names("sampler")}
    )

    @register("sampler", "test_registered")
    def part() -> None: ...

    assert look_up("sampler", "test_registered") is part
    assert "test_registered" in names("sampler") and names("sampler") == sorted(names("sampler"))


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match=r"schedule 'cosine' is registered twice: .*schedule and "):

        @register("schedule", "cosine")
        def other() -> None: ...


def test_a_module_that_is_imported_again_may_register_its_part_again():
    part = look_up("schedule", "cosine")
    assert register("schedule", "cosine")(part) is part


@pytest.mark.parametrize("kind", ["modality", "backbone", "schedule", "profile", "sampler"])
def test_every_home_registers_something(kind):
    assert names(kind)


def test_every_modality_type_of_the_package_is_found_by_its_file_alone():
    assert {"image", "mask", "label", "embedding", "masked_image"} <= set(names("modality"))


def test_a_broken_module_is_reported_each_time_and_not_as_an_unknown_name(tmp_path, monkeypatch):
    package = tmp_path / "broken_home"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "bad.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.HOMES, "broken", "broken_home")
    monkeypatch.setitem(registry._parts, "broken", {})
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            look_up("broken", "anything")
    sys.modules.pop("broken_home")
