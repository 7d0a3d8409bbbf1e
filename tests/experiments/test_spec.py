"""Experiments as they are written: cells, what asks whose model, and mistakes by their name."""

import copy
import dataclasses
from pathlib import Path

import pytest
import yaml
from torch import Tensor

from mmdiff_ray import registry
from mmdiff_ray.config import Config, ConfigError, load, shipped, to_plain
from mmdiff_ray.experiments.digest import digest, training_digest
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.experiments.parts import DataSet
from mmdiff_ray.experiments.table import refusals
from mmdiff_ray.modalities.base import Modality
from mmdiff_ray.models.denoiser import Denoiser, build_denoiser

PLAIN = {
    "name": "small",
    "base": {
        "modalities": {"pixels": {"type": "image"}, "masked": {"type": "masked_image"}},
        "tasks": {
            "generate": {"roles": {"pixels": "generated"}},
            "restore": {"roles": {"masked": "given", "pixels": "generated"}},
        },
        "train": {"samples": 1000, "global_batch": 8},
    },
    "presets": {"smoke": {"seeds": [3, 4], "overrides": ["train.samples=64"]}},
    "methods": {
        "both": {"title": "both"},
        "half": {"title": "half", "share": 0.5, "seeds": 1, "overrides": ["tasks.generate.frequency=0"]},
        "asked": {"title": "asked", "model": "both", "overrides": ["evaluate.inpaint=repaint"]},
    },
    "measures": {
        "thirty": {"evaluators": ["restoration"], "overrides": ["modalities.masked.ratio=[0.3, 0.3]"]},
        "joint": {"evaluators": ["joint"], "methods": ["both"]},
    },
}

COLUMNS = {
    "pixels": {"kind": "image", "channels": 4},
    "alpha": {"kind": "mask", "classes": 2},
    "palette": {"kind": "mask", "classes": 25},
    "category": {"kind": "label", "names": [f"category {index}" for index in range(12)]},
    "label": {"kind": "label", "names": [f"label {index}" for index in range(10)]},
    "look": {"kind": "embedding", "dim": 1280},
    "caption": {"kind": "embedding", "dim": 384},
}
"""The columns of the data sets that experiments are shipped with."""
SAME_AT_ANY_SIZE = {"own_strong", "shared_strong", "literal"}
"""Methods whose point is a scale as it is: as loud as a pixel, the paper's."""
PRESETS = [
    (file, preset)
    for file in sorted((shipped.root() / shipped.EXPERIMENTS).glob("*.yaml"))
    for preset in yaml.safe_load(file.read_text())["presets"]
]
ON_GPU = pytest.mark.parametrize(
    "file", [file for file, preset in PRESETS if preset == "gpu"], ids=lambda file: file.stem
)


def written(folder: Path, **changes) -> str:
    plain = copy.deepcopy(PLAIN)
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = plain
        for parent in parents:
            place = place[parent]
        place[last] = value
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(plain, sort_keys=False))
    return str(file)


def test_cells_are_chosen_by_patterns_and_a_judge_comes_with_them(tmp_path):
    experiment = load_experiment(written(tmp_path), "smoke")
    assert [cell.key for cell in experiment.select(["*-4", "half-*"])] == ["half-3", "both-4"]
    judged = load_experiment(written(tmp_path, judge="half"), "smoke")
    assert [cell.key for cell in judged.select(["both-4"])] == ["half-3", "both-4"]
    with pytest.raises(ConfigError, match="cells: unknown 'asked-3'"):
        experiment.select(["both-3", "asked-3"])


def test_a_preset_leaves_methods_out(tmp_path):
    file = Path(written(tmp_path))
    plain = yaml.safe_load(file.read_text())
    plain["presets"]["smoke"]["methods"] = {"half": None}
    file.write_text(yaml.safe_dump(plain))
    assert [cell.key for cell in load_experiment(str(file), "smoke").cells()] == ["both-3", "both-4"]


def test_cells_are_methods_by_seeds_the_first_seed_of_all_first(tmp_path):
    experiment = load_experiment(written(tmp_path), "smoke")
    assert [cell.key for cell in experiment.cells()] == ["both-3", "half-3", "both-4"]
    assert [m.name for m in experiment.evaluated_on(experiment.methods["both"])] == ["both", "asked"]
    assert [m.name for m in experiment.evaluated_on(experiment.methods["half"])] == ["half"]
    assert [m.name for m in experiment.measures_of(experiment.methods["half"])] == ["thirty"]


def test_a_cell_trains_with_its_own_overrides_seed_and_share(tmp_path):
    experiment = load_experiment(written(tmp_path), "smoke")
    both, half = (experiment.config(cell, tmp_path) for cell in experiment.cells()[:2])
    assert (both.seed, both.train.samples, both.tasks["generate"].frequency) == (3, 64, 1)
    assert (half.seed, half.train.samples, half.tasks["generate"].frequency) == (3, 32, 0)


def test_a_preset_has_values_of_its_own_for_a_method_and_its_overrides_come_last(tmp_path):
    values = {"title": "a half, large", "overrides": ["tasks.restore.frequency=3", "train.global_batch=16"]}
    own = ["tasks.generate.frequency=0", "tasks.restore.frequency=2"]
    file = written(tmp_path, presets__smoke__methods={"half": values}, methods__half__overrides=own)
    experiment = load_experiment(file, "smoke")
    both, half = (experiment.config(cell, tmp_path) for cell in experiment.cells()[:2])
    assert experiment.methods["half"].title == "a half, large" and experiment.methods["half"].share == 0.5
    assert [half.tasks[task].frequency for task in ("generate", "restore")] == [0, 3]
    assert (half.train.global_batch, both.train.global_batch) == (16, 8)


def test_data_sets_are_one_or_several_and_follow_the_seed(tmp_path):
    toy = {"pipeline": "toy", "uri": "data/toy"}
    drawn = {"pipeline": "samples", "uri": "data/drawn-{seed}", "options": {"seed": "{seed}"}}
    fold = {"pipeline": "toy", "uri": "data/fold{fold}", "options": {"fold": "{fold}"}, "folds": 2}
    assert load_experiment(written(tmp_path), "smoke").data_sets() == []
    assert load_experiment(written(tmp_path, data=toy), "smoke").data_sets() == [DataSet(**toy)]
    at_preset = load_experiment(written(tmp_path, data=toy, presets__smoke__data=[drawn]), "smoke")
    assert [one.pipeline for one in at_preset.data_sets()] == ["samples"] * 2
    file = written(
        tmp_path,
        data=[toy, drawn, fold],
        base__data={"sources": [{"uri": "data/fold{fold}"}, {"uri": "data/drawn-{seed}"}]},
        measures__thirty__overrides=["evaluate.split=test"],
        measures__joint__overrides=["data.sources=[{uri: 'data/other{fold}'}]"],
    )
    experiment = load_experiment(file, "smoke")
    assert [(one.uri, one.options) for one in experiment.data_sets()] == [
        ("data/toy", {}),
        *[(f"data/drawn-{seed}", {"seed": seed}) for seed in ("3", "4")],
        *[(f"data/fold{number}", {"fold": number}) for number in ("1", "0")],
    ]
    both, _, later = (experiment.config(cell, tmp_path) for cell in experiment.cells())
    assert [source.uri for source in both.data.sources] == ["data/fold1", "data/drawn-3"]
    assert [source.uri for source in later.data.sources] == ["data/fold0", "data/drawn-4"]
    assert training_digest(both) != training_digest(dataclasses.replace(later, seed=both.seed))
    thirty, joint = (
        experiment.evaluation_config(later, experiment.methods["both"], experiment.measures[name])
        for name in ("thirty", "joint")
    )
    assert (thirty.evaluate.split, later.evaluate.split) == ("test", "val")
    assert thirty.data == later.data
    assert [source.uri for source in joint.data.sources] == ["data/other0"]


def test_a_configuration_is_checked_once(tmp_path):
    experiment = load_experiment(written(tmp_path), "smoke")
    one = experiment.load(["seed=1"], PLAIN["base"])
    assert experiment.load(["seed=1"], PLAIN["base"]) is one
    assert experiment.load(["seed=2"], PLAIN["base"]).seed == 2


def test_a_model_is_evaluated_under_the_overrides_of_method_and_measure(tmp_path):
    experiment = load_experiment(written(tmp_path), "smoke")
    config = experiment.config(experiment.cells()[0], tmp_path)
    measure = experiment.measures["thirty"]
    config_of_measure = experiment.evaluation_config(config, experiment.methods["asked"], measure)
    assert config_of_measure.evaluate.inpaint == "repaint" and config_of_measure.evaluate.evaluators == [
        "restoration"
    ]
    assert config_of_measure.modalities["masked"].ratio == [0.3, 0.3]
    assert (
        experiment.evaluation_config(config, experiment.methods["both"], measure).evaluate.inpaint == "given"
    )


@pytest.mark.parametrize(
    ("changes", "preset", "words"),
    [
        ({}, "large", r"preset: unknown 'large'; known: smoke"),
        ({"metods": {}}, "smoke", r"experiment: unknown key 'metods'.*did you mean 'methods'"),
        ({"measures": {}}, "smoke", r"measures is missing"),
        ({"name": "../x"}, "smoke", r"name: '../x' cannot name a file"),
        ({"methods": {7: {}}}, "smoke", r"methods: got 7, want text; put the name in quotes"),
        ({"measures": {"a/b": {}}}, "smoke", r"measures: 'a/b' cannot name a file"),
        ({"curves": [{"name": "../x"}]}, "smoke", r"curves: '../x' cannot name a file"),
        ({"methods__half__shre": 1}, "smoke", r"methods.half: unknown key 'shre'.*did you mean 'share'"),
        ({"methods__asked__model": "bth"}, "smoke", r"methods.asked.model: unknown 'bth'; known: both, half"),
        ({"methods__asked__model": "asked"}, "smoke", r"methods.asked.model: unknown 'asked'"),
        ({"main": "ours"}, "smoke", r"main: unknown 'ours'; known: both, half, asked"),
        ({"measures__joint__methods": ["bot"]}, "smoke", r"measures.joint.methods: unknown 'bot'"),
        ({"presets__smoke__measures": ["x"]}, "smoke", r"presets.smoke.measures: unknown 'x'"),
        ({"presets__smoke__methods": {"bot": {}}}, "smoke", r"presets.smoke.methods: unknown 'bot'"),
        ({"presets__smoke__methods": {"half": {"shre": 1}}}, "smoke", r"methods.half: unknown key 'shre'"),
        ({"measures__joint": {}}, "smoke", r"measures.joint.evaluators: missing"),
        ({"measures__joint": 3}, "smoke", r"measures.joint: got 3, want a section"),
        ({"methods": ["both"]}, "smoke", r"methods: got \['both'\], want a section"),
        ({"methods__half__share": "much"}, "smoke", r"methods.half.share: got 'much', want a number"),
        ({"methods__half__share": 0}, "smoke", r"methods.half.share \(0.0\) must be above 0"),
        ({"curves": ["x"]}, "smoke", r"curves\[0\]: got 'x', want a section"),
        ({"presets__smoke__seeds": []}, "smoke", r"presets.smoke.seeds \(\[\]\) must be one or more"),
        ({"base": [1]}, "smoke", r"base: got \[1\], want a section"),
        (
            {"overview": {"IoU": {"measure": "tirty", "figure": "pixels/x"}}},
            "smoke",
            r"overview.IoU.measure: unknown 'tirty'.*did you mean 'thirty'",
        ),
        (
            {"overview": {"IoU": {"measure": "thirty", "figure": "pixel_from_masked/x"}}},
            "smoke",
            r"overview.IoU.figure: unknown 'pixel'; known: pixels, masked",
        ),
        (
            {"overview": {"IoU": {"measure": "thirty", "figur": "x"}}},
            "smoke",
            r"overview.IoU: unknown key 'figur'",
        ),
        ({"overview": {"IoU": {"measure": "thirty"}}}, "smoke", r"overview.IoU.figure: missing"),
        (
            {"goals": [{"name": "IoU", "measure": "joint", "figure": "x", "a": "both", "b": "hlf"}]},
            "smoke",
            r"goals.IoU: unknown 'hlf'.*did you mean 'half'",
        ),
        (
            {"goals": [{"measure": "joint", "figure": "x", "a": "both", "b": "half", "kind": "best"}]},
            "smoke",
            r"kind: got 'best', want better, not worse or within N %",
        ),
        (
            {"data": {"pipeline": "toy", "uri": "x", "folds": 0}},
            "smoke",
            r"data.folds \(0\) must be a whole number of at least 1",
        ),
        (
            {"data": [{"pipeline": "toy", "url": "x"}]},
            "smoke",
            r"data: unknown key 'url'.*did you mean 'uri'",
        ),
        (
            {"task_words": {"draw": "images"}},
            "smoke",
            r"task_words: unknown 'draw'; known: generate, restore",
        ),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path, changes, preset, words):
    with pytest.raises(ConfigError, match=rf"small\.yaml: {words}"):
        load_experiment(written(tmp_path, **changes), preset)


def test_a_wrong_override_is_named_with_its_method(tmp_path):
    experiment = load_experiment(written(tmp_path, methods__half__overrides=["train.smples=3"]), "smoke")
    with pytest.raises(ConfigError, match=r"small, method half: train.smples: unknown key"):
        experiment.config(experiment.cells()[1], tmp_path)


def test_an_unknown_experiment_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown 'masked_imge'; known: .*did you mean 'masked_image'"):
        load_experiment("masked_imge", "smoke")


@pytest.mark.parametrize(("file", "preset"), PRESETS, ids=[f"{file.stem}-{p}" for file, p in PRESETS])
def test_shipped_experiments_make_a_checked_configuration_for_every_cell_and_measure(file, preset):
    experiment = load_experiment(str(file), preset)
    assert experiment.name == file.stem and experiment.question and experiment.title
    for cell in experiment.cells():
        if cell.seed != experiment.preset.seeds[0]:
            continue
        config = experiment.config(cell, Path("runs"))
        for method in experiment.evaluated_on(cell.method):
            for measure in experiment.measures_of(method):
                experiment.evaluation_config(config, method, measure)
    for curve in experiment.curves:
        assert set(curve["points"]) <= set(experiment.measures)


def shipped(file: Path, preset: str) -> dict[str, Config]:
    """Return a shipped experiment's trainings of its first seed, their modalities resolved: method -> it."""
    experiment, found = load_experiment(str(file), preset), {}
    for cell in experiment.cells():
        if cell.seed == experiment.preset.seeds[0]:
            config = experiment.config(cell, Path("runs"))
            modalities = {
                name: registry.look_up("modality", options.type).resolve(name, options, COLUMNS)
                for name, options in config.modalities.items()
            }
            found[cell.method.name] = dataclasses.replace(config, modalities=modalities)
    return found


def built(file: Path, preset: str) -> dict[str, Denoiser]:
    """Return a denoiser for every method; those that differ in training alone share one."""
    made: dict[str, Denoiser] = {}
    found = {}
    for name, config in shipped(file, preset).items():
        key = digest(config.space, config.modalities, config.model, config.given)
        if key not in made:
            made[key] = build_denoiser(config)
        found[name] = made[key]
    return found


@ON_GPU
def test_models_for_a_gpu_are_large_equally_sized_and_have_codes_of_usual_scale(file):
    experiment = load_experiment(str(file), "gpu")
    small, large = built(file, "small"), built(file, "gpu")
    sizes = {name: sum(map(Tensor.numel, denoiser.parameters())) for name, denoiser in large.items()}
    for name, denoiser in large.items():
        assert sizes[name] > 5 * sum(map(Tensor.numel, small[name].parameters())), name
        if name == experiment.judge:
            assert sizes[name] > 0.97 * sizes[experiment.main]
        else:
            assert sizes[name] == pytest.approx(sizes[experiment.main], rel=0.03), name
        if name not in SAME_AT_ANY_SIZE:
            for one, modality in denoiser.modalities.items():
                assert 0.5 < loudness(modality) / loudness(small[name].modalities[one]) < 2, (name, one)
    assert all(0.5 < loudness(modality) < 1.5 for modality in large[experiment.main].modalities.values())


def loudness(modality: Modality) -> float:
    """Return a code's scale in usual ones."""
    return modality.weights.scale / modality.usual_scale


@ON_GPU
def test_training_on_a_gpu_warms_up_and_averages_in_proportion(file):
    experiment = load_experiment(str(file), "gpu")
    for name, config in shipped(file, "gpu").items():
        train = config.train
        assert train.warmup_samples >= 500 * train.global_batch, name
        whole = train.samples / experiment.methods[name].share
        for part in (train.warmup_samples, train.ema_samples):
            assert 0.01 * whole <= part <= 0.03 * whole, name


def test_a_digest_changes_with_any_setting_and_not_with_a_new_one_at_its_default(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Old:
        size: int = 3
        names: list = dataclasses.field(default_factory=list)

    @dataclasses.dataclass(frozen=True)
    class New(Old):
        more: bool = False

    @dataclasses.dataclass(frozen=True)
    class Changed(Old):
        size: int = dataclasses.field(default=5, metadata={"reference": 3})

    assert digest(Old()) == digest(New()) == digest(Old(size=3))
    assert len({digest(one) for one in (Old(), Old(size=4), Old(names=["a"]), New(more=True))}) == 4
    assert digest({"a": Old()}) == digest({"a": New()}) != digest({"a": Old(size=4)})
    experiment = load_experiment(written(tmp_path), "smoke")
    configs = [experiment.config(cell, tmp_path) for cell in experiment.cells()]
    assert len({training_digest(config) for config in configs}) == 3
    config_of_measure = experiment.evaluation_config(
        configs[0], experiment.methods["asked"], experiment.measures["thirty"]
    )
    assert training_digest(config_of_measure) != training_digest(configs[0])  # its holes are other ones
    assert digest(Changed(size=3)) == digest(Old()) != digest(Changed()) == digest(Old(size=5))
    same = ["name=other", "runs=x", "checkpoint.keep_last=3", "train.log_every_samples=7", "evaluate.steps=9"]
    plain = to_plain(configs[0])
    assert training_digest(load((), same, plain)) == training_digest(configs[0])
    assert training_digest(load((), ["train.clip_norm=7"], plain)) != training_digest(configs[0])


def test_missing_data_do_not_count_as_a_refused_method(tmp_path, monkeypatch):
    experiment = load_experiment("weights", "smoke")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no data set at data/digits"):
        refusals(experiment)
