"""The configuration: what is read, what wins, and what every error says."""

import dataclasses
import json
import re
import sys
import textwrap

import pytest

from mmdiff_ray import config as configuration
from mmdiff_ray import registry
from mmdiff_ray.config import (
    Config,
    ConfigError,
    RunError,
    ScheduleConfig,
    TrainConfig,
    decoding,
    flatten,
    load,
    options,
    to_plain,
    to_yaml,
)
from mmdiff_ray.modalities.label import LabelOptions
from mmdiff_ray.modalities.mask import MaskOptions
from tests.modalities import tiny

BASE = """
model: {backbone: tiny_test}
modalities:
  pixels: {type: image}
  alpha: {type: mask, classes: 2, weights: {family: clock, shape: 0.5}}
  category: {type: label, classes: 4}
tasks:
  joint: {roles: {pixels: generated, alpha: generated, category: generated}}
  masks: {frequency: 0.5, roles: {pixels: given, alpha: generated}}
  any: {roles: {pixels: generated, alpha: [given, absent], category: [generated, given]}}
loss: {modalities: {alpha: 0.5, category: 2}, channels: {alpha: 0.25}}
data: {sources: [{uri: data/emoji}, {uri: data/more, weight: 0.2}]}
"""


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base.yaml", BASE)


def write(path, text: str):
    path.write_text(textwrap.dedent(text))
    return path


def message(*overrides: str, base, files=()) -> str:
    with pytest.raises(ConfigError) as error:
        load([base, *files], overrides)
    return str(error.value)


def test_sections_become_their_dataclasses_and_modalities_those_of_their_types(base):
    config = load([base])
    assert isinstance(config, Config) and isinstance(config.train, TrainConfig)
    assert isinstance(config.modalities["alpha"], MaskOptions)
    assert config.modalities["alpha"].weights.shape == 0.5
    assert isinstance(config.modalities["category"], LabelOptions)
    assert config.tasks["masks"].frequency == 0.5 and config.tasks["joint"].frequency == 1.0
    assert config.data.sources[1].weight == 0.2 and config.data.sources[0].weight == 1.0
    assert config.schedule == ScheduleConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_overrides_win_over_later_files_and_those_over_earlier_ones_and_the_base(base, tmp_path):
    second = write(tmp_path / "b.yaml", "{seed: 2, name: second, train: {samples: 7}, model: {preset: b}}")
    config = load([base, second], ["name=third", "name=fourth"], base={"seed": 1, "runs": "elsewhere"})
    assert (config.runs, config.seed, config.name, config.train.samples) == ("elsewhere", 2, "fourth", 7)
    assert config.model.preset == "b" and config.model.backbone == "tiny_test"  # sections are merged


def test_lists_are_replaced_whole_and_their_entries_set_by_number(base):
    assert load([base], ["train.betas=[0.8, 0.9]"]).train.betas == [0.8, 0.9]
    assert [s.uri for s in load([base], ["data.sources=[{uri: x}]"]).data.sources] == ["x"]
    assert [s.uri for s in load([base], ["data.sources.1.uri=y"]).data.sources] == ["data/emoji", "y"]
    knots = (
        load([base], ["modalities.alpha.weights.knots=[[0, 1], [1, 0]]"]).modalities["alpha"].weights.knots
    )
    assert knots == [[0.0, 1.0], [1.0, 0.0]]


def test_overrides_are_read_as_yaml(base):
    config = load(
        [base], ["train.max_minutes=4", "train.compile=true", "name=a=b", "train.learning_rate=1e-4"]
    )
    assert (config.train.max_minutes, config.train.compile, config.name) == (4.0, True, "a=b")
    assert config.train.learning_rate == 1e-4
    assert load([base], ["train.max_minutes=null"]).train.max_minutes is None
    assert load([base], ["tracking.uri=http://host:5000"]).tracking.uri == "http://host:5000"


def test_a_new_modality_and_task_may_come_from_the_command_line(base):
    added = ["modalities.look={type: embedding, dim: 9}", "tasks.look.roles={pixels: given, look: generated}"]
    config = load([base], added)
    assert config.modalities["look"].dim == 9 and config.tasks["look"].roles["look"] == "generated"


def test_a_modality_set_to_null_is_gone_everywhere(base):
    config = load([base], ["modalities.alpha=null"])
    assert "alpha" not in config.modalities and "alpha" not in config.loss.modalities
    assert all("alpha" not in task.roles for task in config.tasks.values())
    assert list(config.tasks) == ["joint", "any"]  # masks generated nothing else
    assert config.loss.modalities == {"category": 2} and config.loss.channels == {}


def test_a_task_set_to_null_is_gone(base):
    assert list(load([base], ["tasks.masks=null"]).tasks) == ["joint", "any"]


def test_what_is_written_is_read_back_equal(base, tmp_path):
    config = load([base], ["modalities.alpha.weights.knots=[[0, 1], [1, 0]]", "train.max_minutes=2"])
    assert load(base=to_plain(config)) == config
    assert load([write(tmp_path / "again.yaml", to_yaml(config))]) == config
    as_json = write(tmp_path / "config.json", json.dumps(to_plain(config)))
    assert configuration.read_json(as_json) == config
    tiny_config = tiny.config()
    assert load(base=to_plain(tiny_config)) == tiny_config


def test_flat_keys_reach_every_value(base):
    flat = flatten(load([base]))
    assert flat["train.samples"] == 100_000 and flat["modalities.alpha.weights.shape"] == 0.5
    assert flat["tasks.any.roles.category"] == ["generated", "given"] and flat["model.options"] == {}
    assert not any(isinstance(value, dict) and value for value in flat.values())


def test_interpolations_are_resolved(base, tmp_path):
    more = write(tmp_path / "b.yaml", "{seed: 3, name: 'run-${seed}'}")
    assert load([base, more]).name == "run-3"


def test_plugins_are_imported_before_their_parts_are_looked_up(base, tmp_path, monkeypatch):
    (tmp_path / "my_schedule.py").write_text(
        "from mmdiff_ray.registry import register\n"
        "@register('schedule', 'mine')\ndef mine():\n    return lambda t: 1 - t\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    known = {name: registry.look_up("schedule", name) for name in registry.names("schedule")}
    monkeypatch.setitem(registry._parts, "schedule", known)
    assert "unknown 'mine'" in message("schedule.family=mine", base=base)
    assert load([base], ["schedule.family=mine", "plugins=[my_schedule]"]).schedule.family == "mine"


def test_plugins_in_the_working_folder_are_found_though_it_is_not_on_the_path(base, tmp_path, monkeypatch):
    (tmp_path / "plugin_beside_the_run.py").write_text("")
    elsewhere = [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", elsewhere)
    assert "cannot import" in message("plugins=[plugin_beside_the_run]", base=base)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        load([base], ["plugins=[plugin_beside_the_run]"])
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("train.lernrate=1", "train.lernrate", "learning_rate"),
        ("trian.samples=1", "trian", "train"),
        ("modalities.alpha.clases=3", "modalities.alpha.clases", "classes"),
        ("modalities.alpha.weights.scal=3", "modalities.alpha.weights.scal", "scale"),
        ("tasks.joint.frequncy=3", "tasks.joint.frequncy", "frequency"),
        ("data.sources=[{uri: a}, {url: b}]", "data.sources[1].url", "uri"),
        ("data.sources.0.wieght=2", "data.sources[0].wieght", "weight"),
        ("modalities.alpha.type=msk", "modalities.alpha.type", "mask"),
        ("space.anchor=pixel", "space.anchor", "pixels"),
        ("modalities.alpha.channels=pixls", "modalities.alpha.channels", "pixels"),
        ("loss.modalities.alfa=1", "loss.modalities", "alpha"),
        ("loss.channels.alfa=1", "loss.channels", "alpha"),
        ("tasks.joint.roles.alfa=given", "tasks.joint.roles", "alpha"),
        ("tasks.joint.roles.alpha=gven", "tasks.joint.roles.alpha", "given"),
        ("tasks.joint.roles.alpha=[given, gnerated]", "tasks.joint.roles.alpha", "generated"),
        ("schedule.family=cosin", "schedule.family", "cosine"),
        ("model.backbone=tiny_tst", "model.backbone", "tiny_test"),
        ("evaluate.sampler=ddm", "evaluate.sampler", "ddim"),
        ("evaluate.split=vall", "evaluate.split", "val"),
        ("train.precision=bfloat", "train.precision", "bfloat16"),
        ("train.decay=linar", "train.decay", "linear"),
        ("given.input=u_plus_cod", "given.input", "u_plus_code"),
        ("loss.prediction=x_0", "loss.prediction", "x0"),
        ("loss.weighting=elb", "loss.weighting", "elbo"),
        ("data.backgrounds=rndom", "data.backgrounds", "random"),
    ],
)
def test_an_unknown_key_or_name_is_an_error_with_the_whole_key_and_a_suggestion(base, override, key, hint):
    text = message(override, base=base)
    assert text.startswith(f"{key}: unknown ")
    assert f"did you mean {hint!r}?" in text


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.samples=many", "train.samples"),
        ("train.samples=null", "train.samples"),
        ("train=3", "train"),
        ("train=null", "train"),
        ("train.betas=3", "train.betas"),
        ("train.betas=[a, b]", "train.betas[0]"),
        ("loss.coefficients=1", "loss.coefficients"),
        ("loss.coefficients.l1=x", "loss.coefficients.l1"),
        ("modalities=3", "modalities"),
        ("modalities.alpha=3", "modalities.alpha"),
        ("modalities.alpha.type=null", "modalities.alpha"),
        ("modalities.alpha.type=[mask]", "modalities.alpha"),
        ("modalities.alpha.classes=two", "modalities.alpha.classes"),
        ("modalities.alpha.weights=3", "modalities.alpha.weights"),
        ("modalities.alpha.weights.scale=big", "modalities.alpha.weights.scale"),
        ("modalities.alpha.weights.knots=[[0, 1], [1, x]]", "modalities.alpha.weights.knots[1][1]"),
        ("tasks=3", "tasks"),
        ("tasks.joint=3", "tasks.joint"),
        ("tasks.joint.roles=3", "tasks.joint.roles"),
        ("tasks.joint.roles.alpha=[]", "tasks.joint.roles.alpha"),
        ("tasks.joint.drop=x", "tasks.joint.drop"),
        ("data.sources=3", "data.sources"),
        ("data.sources=[3]", "data.sources[0]"),
        ("data.sources=[{weight: 1}]", "data.sources[0].uri"),
        ("data.sources=[{uri: a, weight: x}]", "data.sources[0].weight"),
        ("plugins=my_module", "plugins"),
        ("plugins=[3]", "plugins"),
        ("plugins=[no_such_module]", "plugins"),
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error_that_begins_with_its_key(base, override, key):
    text = message(override, base=base)
    assert text.startswith((f"{key}:", f"{key} ")), text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["modalities=null"], "modalities is empty"),
        (["tasks=null"], "tasks is empty"),
        (["modalities.a-b={type: image}"], "modalities: 'a-b' is not a valid name"),
        (["tasks.x.roles={pixels: given}"], "tasks.x generates nothing"),
        (["tasks.joint.drop=1"], "tasks.joint: frequency (1.0) must be finite and >= 0, and drop (1.0)"),
        (["tasks.joint.one_pass=2"], "tasks.joint.one_pass (2.0) must be between 0 and 1"),
        (["tasks.joint.frequency=-1"], "tasks.joint: frequency (-1.0)"),
        (["tasks.joint.frequency=.nan"], "tasks.joint: frequency (nan)"),
        (["seed=-1"], "seed (-1) must be at least 0"),
        (["space.width=0"], "space.width (0) must be at least 1"),
        (["schedule.steps=0"], "schedule.steps (0)"),
        (["train.samples=0"], "train.samples (0)"),
        (["train.learning_rate=0"], "train.learning_rate (0.0) must be above 0"),
        (["train.clip_norm=.nan"], "train.clip_norm (nan) must be a number"),
        (["train.max_minutes=-1"], "train.max_minutes (-1.0) must be above 0"),
        (["loss.coefficients.l1=.nan"], "loss.coefficients.l1 (nan) must be a number"),
        (
            ["modalities.alpha.weights.knots=[[0, 1], [.nan, 0]]"],
            "modalities.alpha.weights.knots[1][0] (nan)",
        ),
        (["loss.modalities.alpha=.nan"], "loss.modalities.alpha (nan) must be a number"),
        (["tasks.joint.frequency=.inf"], "tasks.joint: frequency (inf)"),
        ([f"seed={2**63}"], f"seed ({2**63}) must be below 2**63"),
        (["train.weight_decay=-1"], "train.weight_decay (-1.0) must be at least 0"),
        (["train.final_lr_ratio=-1"], "train.final_lr_ratio (-1.0) must be at least 0"),
        (["evaluate.guidance=-2"], "evaluate.guidance (-2.0) must be at least 0"),
        (["evaluate.grid_rows=0"], "evaluate.grid_rows (0) must be at least 1"),
        (["workers.data_workers=-1"], "workers.data_workers (-1) must be at least 0"),
        (["workers.count=1", "workers.data_workers=0"], "workers.data_workers (0) must be at least 1"),
        (["workers.threads=0"], "workers.threads (0) must be at least 1"),
        (["workers.max_failures=-1"], "workers.max_failures (-1) must be at least 0"),
        (["train.changes=[{at: -5}]"], "train.changes[0].at (-5) must be at least 0"),
        (["workers.cpus=0"], "workers.cpus (0) must be above 0"),
        (["workers.gpus=1.5"], "workers.gpus (1.5) must be 0, a part of 1, or a whole number"),
        (["workers.resources={fast: 0}"], "workers.resources: fast=0.0 must be above 0"),
        (["workers.resources={GPU: 1}"], "workers.resources: GPU=1.0 must be above 0 and a custom resource"),
        (["train.betas=[0.9]"], "train.betas ([0.9]) must be two numbers"),
        (["train.betas=[0.9, 1.0]"], "train.betas ([0.9, 1.0])"),
        (["train.times=[0.5, 0.2]"], "train.times ([0.5, 0.2]) must be two numbers in [0, 1]"),
        (["train.times=[0, 0]"], "train.times ([0.0, 0.0]) must reach the schedule's first step, t = 1/1000"),
        (["train.times=[0, 0.01]", "schedule.steps=20"], "train.times ([0.0, 0.01]) must reach"),
        (["train.micro_batch=0"], "train.micro_batch (0) must be at least 1"),
        (["workers.count=-1"], "workers.count (-1) must be at least 0"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last (0)"),
        (["evaluate.steps=0"], "evaluate.steps (0)"),
    ],
)
def test_values_that_cannot_be_are_refused_with_key_and_value(base, overrides, expected):
    assert message(*overrides, base=base).startswith(expected)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "", "a\\b", "a\nb", "x" * 151, "-x"])
def test_a_name_that_is_not_one_file_name_is_refused(base, name):
    for values, key in (
        ({"name": name}, "name"),
        ({"tasks": {name: {"roles": {"pixels": "generated"}}}}, "tasks"),
    ):
        with pytest.raises(ConfigError, match=rf"^{key}: {re.escape(repr(name))} cannot name a file"):
            load([base], base=values) if key == "tasks" else load(
                [], base={**to_plain(load([base])), **values}
            )


def test_names_in_storage_must_fit_into_a_uri(base):
    assert load([base], ["name=my run é"]).name == "my run é"
    for name in ("my run", "a#b", "a?b", "é"):
        assert message(f"name={name}", "runs=s3://bucket/runs", base=base).startswith(
            f"name: {name!r} cannot"
        )


@pytest.mark.parametrize("name", ["007", "1e3", "2026_01", "true", "12"])
def test_a_name_that_reads_as_a_number_stays_as_it_is_written(base, tmp_path, name):
    assert load([base], [f"name={name}"]).name == name
    config = load([base, write(tmp_path / "named.yaml", f"name: {name}  # a comment")])
    assert config.name == name
    assert load([write(tmp_path / "again.yaml", to_yaml(config))]) == config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.global_batch=100"],
            "train.global_batch (100) must be a multiple of data.lanes (8); try 96 or 104",
        ),
        (["workers.count=16", "workers.least=1", "train.micro_batch=5"], None),
        (["workers.count=65"], "train.global_batch (64) must have a row for each of 65 workers"),
        (["workers.count=2", "workers.least=4"], "workers.least (4) must be at most workers.count (2)"),
        (["workers.least=0"], "workers.least (0) must be at least 1"),
        (["workers.least=1"], "workers.least (1) must be at most workers.count (0)"),
        (
            ["workers.strategy=fsd"],
            "workers.strategy: unknown 'fsd'; known: ddp, fsdp; did you mean 'fsdp'?",
        ),
    ],
)
def test_a_batch_that_cannot_be_dealt_is_refused_with_numbers_that_can(base, overrides, expected):
    if expected is None:
        assert load([base], overrides).workers.count == 16
    else:
        assert message(*overrides, base=base) == expected


@pytest.mark.parametrize(
    "text", ["[a, b]", "a: [1", "3", "seed: 1\nseed: 2", "train:\n  samples: 1\n  samples: 2"]
)
def test_files_that_hold_no_keys_and_values_are_errors_that_name_the_file(base, tmp_path, text):
    bad = tmp_path / "bad.yaml"
    bad.write_text(text)
    found = message(base=base, files=[bad])
    assert "bad.yaml" in found
    if text.count("seed") == 2:
        assert "duplicate key seed" in found


def test_a_json_file_is_checked_like_yaml(tmp_path):
    for text, said in (
        ("{", "cannot read the config file"),
        ('{"seed": "x"}', "seed: got 'x', want a whole"),
    ):
        with pytest.raises(ConfigError, match=said):
            configuration.read_json(write(tmp_path / "bad.json", text))


@pytest.mark.parametrize(
    "override, found",
    [("train.samples=1e5", 100_000), ("train.compile=on", True), ("train.clip_norm=2", 2.0)],
)
def test_a_value_takes_the_type_of_its_key(base, override, found):
    key = override.partition("=")[0]
    value = flatten(load([base], [override]))[key]
    assert value == found and type(value) is type(found)


@pytest.mark.parametrize("override", ["train.samples=1.5", "train.samples=true", "train.compile=3"])
def test_a_number_is_never_rounded_to_fit(base, override):
    assert message(override, base=base).startswith(f"{override.partition('=')[0]}: got ")


def test_a_file_that_is_not_there_is_named(base, tmp_path):
    assert message(base=base, files=[tmp_path / "none.yaml"]) == f"no config file {tmp_path / 'none.yaml'}"
    assert str(tmp_path) in message(base=base, files=[tmp_path])


def test_an_empty_file_changes_nothing(base, tmp_path):
    assert load([base, write(tmp_path / "empty.yaml", "")]) == load([base])


def test_files_that_contradict_in_kind_are_errors_that_name_the_second(base, tmp_path):
    other = write(tmp_path / "other.yaml", "data: {sources: {uri: x}}")
    assert "other.yaml" in message(base=base, files=[other])


@pytest.mark.parametrize("override", ["train.samples", "=3", "a..b=3", "train=[1", "seed=${no_such_key}"])
def test_overrides_that_cannot_be_read_are_quoted(base, override):
    text = message(override, base=base)
    assert override.split("=")[0] in text or override in text


def test_open_options_are_checked_against_a_dataclass_with_their_prefix():
    @dataclasses.dataclass(frozen=True)
    class Sizes:
        width: int
        levels: list[int] = dataclasses.field(default_factory=lambda: [1, 2])

    assert options(Sizes, {"width": 3}, "model.options") == Sizes(3)
    with pytest.raises(ConfigError, match=r"^model\.options\.widht: unknown key 'widht'.*'width'"):
        options(Sizes, {"widht": 3}, "model.options")
    with pytest.raises(ConfigError, match=r"^model\.options\.width: "):
        options(Sizes, {}, "model.options")
    with pytest.raises(ConfigError, match=r"^model\.options\.levels: got 2, want a list"):
        options(Sizes, {"width": 3, "levels": 2}, "model.options")


def sections(schema: type = Config):
    """Yield every dataclass of the configuration."""
    yield schema
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.default_factory):
            yield from sections(field.default_factory)


def test_every_key_is_explained_by_the_docstring_of_its_section():
    types = ("image", "mask", "label", "embedding", "masked_image")
    kinds = [registry.look_up("modality", name).Options for name in types]
    others = [configuration.ModalityConfig, configuration.SourceConfig, configuration.TaskConfig]
    for section in [*sections(), *others, *kinds]:
        inherited = {field.name for base in section.__mro__[1:-1] for field in dataclasses.fields(base)}
        for field in dataclasses.fields(section):
            subsection = section is Config and dataclasses.is_dataclass(field.default_factory)
            explained = re.search(rf"\b{field.name}\b", section.__doc__)
            assert explained or subsection or field.name in inherited, f"{section.__name__}.{field.name}"


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.samplez=3", "train.samplez: unknown key 'samplez'"),
        ("tasks.joint.drops=0.5", "tasks.joint.drops: unknown key 'drops'"),
        ("workers=3", "workers: got 3, want a section"),
        ("train.samples=many", "train.samples: "),
        ("train.samples", "must have the form key=value"),
    ],
)
def test_override_that_no_configuration_takes_is_told_without_one(override, said):
    with pytest.raises(ConfigError) as error:
        configuration.check_overrides(["train.global_batch=8", override])
    assert said in str(error.value)


def test_override_that_some_configuration_takes_is_none_to_be_told():
    configuration.check_overrides(
        [
            "modalities.pixels=null",
            "modalities.alpha.weights.scale=0.3",
            "tasks.joint=null",
            "tasks.mine.frequency=2",
            "train.betas.0=0.8",
            "data.sources.0.uri=x",
            "data.sources[0].weight=2",
            "train.max_minutes=${train.samples}",
            "loss.modalities.alpha=2",
        ]
    )


@pytest.mark.parametrize(
    "override, key, variable",
    [
        (
            "data.sources=[{uri: data/x}, {uri: 's3://KEY:hidden@bucket/x'}]",
            "data.sources[1].uri",
            "AWS_ACCESS",
        ),
        ("data.sources=[{uri: 's3://KEY:hid/den@bucket/x'}]", "data.sources[0].uri", "AWS_ACCESS"),
        ("data.sources=[{uri: 's3://hidden@bucket/x'}]", "data.sources[0].uri", "AWS_ACCESS"),
        ("data.sources=[{uri: 'abfs://box@me/x?client_secret=hidden'}]", "data.sources[0].uri", "AWS_ACCESS"),
        ("tracking.uri=http://me:hidden@host:5000", "tracking.uri", "MLFLOW_TRACKING_PASSWORD"),
        ("tracking.uri=http://hidden@host:5000", "tracking.uri", "MLFLOW_TRACKING_TOKEN"),
        ("tracking.uri=postgresql://host/db?password=hidden", "tracking.uri", "MLFLOW_TRACKING_URI"),
    ],
)
def test_password_in_an_address_is_refused_and_not_repeated(base, override, key, variable):
    said = message(override, base=base)
    assert said.startswith(f"{key}: a key in a URI would be recorded") and variable in said
    assert "hidden" not in said and "hid/den" not in said


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a@b?scheme=http&endpoint_override=host:9000",
        "gs://anonymous@bucket/x",
        "abfs://box@account.dfs.core.windows.net/x",
        "file:///data/a@b",
        "http://[::1]:9000/a@b",
        "data/a:b@c",
    ],
)
def test_address_without_a_password_is_taken_as_it_is(base, uri):
    assert load([base], [f"data.sources=[{{uri: '{uri}'}}]"]).data.sources[0].uri == uri


def test_every_message_is_one_printable_line(base, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: {2")
    with pytest.raises(ConfigError) as caught:
        load([broken])
    for error in (caught.value, RunError("a\n  b\x1b[31m\udcff")):
        assert str(error).isprintable()
    assert str(RunError("a\n  b\x1b[31m\udcff")) == "a b\\x1b[31m\\udcff"


@pytest.mark.parametrize("override", ["name=a\udcff", "runs=\udcff", "model.options={'\udcff': 1}"])
def test_text_that_is_not_unicode_is_refused_before_it_is_written(base, override):
    assert "\\udcff" in message(override, base=base)


@pytest.mark.parametrize("error", [KeyError("x"), SyntaxError("x"), RecursionError("x"), MemoryError("x")])
def test_whatever_a_decoder_raises_is_a_value_error(error):
    with pytest.raises(ValueError, match=f"{type(error).__name__}: '?x"), decoding():
        raise error
