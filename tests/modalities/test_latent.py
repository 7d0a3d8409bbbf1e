"""Latents: encoded once by a build, trained as the anchor, given and shown as pictures."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from mmdiff_ray import config as configuration
from mmdiff_ray.codecs.autoencoder import CONFIG, WEIGHTS, load_codec
from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.datasets.build import build
from mmdiff_ray.datasets.embedders import over_white
from mmdiff_ray.datasets.inspect import draw_rows
from mmdiff_ray.evaluation.fidelity import frechet_distance, shuffled_pixels
from mmdiff_ray.evaluation.gallery import parse_given, write_gallery
from mmdiff_ray.evaluation.judge import judged
from mmdiff_ray.evaluation.lpips import Lpips
from mmdiff_ray.evaluation.run import evaluate
from mmdiff_ray.evaluation.weights import convolutions
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.latent import LatentModality, LatentOptions
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.runs.find import Model
from mmdiff_ray.runs.publish import publish
from mmdiff_ray.sampling.export import load_export, save_export
from mmdiff_ray.sampling.generator import Generator
from tests import sprites
from tests.codecs.tiny import save_codec
from tests.datasets.reading import decode, read_rows

PLAIN = {
    "space": {"height": 8, "width": 8, "anchor": "latent"},
    "model": sprites.MODEL,
    "modalities": {"latent": {"type": "latent"}, "shape": {"type": "label"}},
    "tasks": {"joint": {"roles": {"latent": "generated", "shape": "generated"}}},
    "train": {"samples": 32, "global_batch": 16},
    "evaluate": {"evaluators": []},
    "workers": {"count": 0},
}


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> str:
    return save_codec(tmp_path_factory.mktemp("codec"), channels=3, factor=2)


@pytest.fixture(scope="module")
def data(codec, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("sprites") / "set"
    options = {"count": 60, "size": 16, "latent": codec}
    build("sprites", str(out), options, workers=0, progress=False)
    return str(out)


@pytest.fixture(scope="module")
def entry(data) -> dict:
    return read_manifest(data).columns["latent"]


def modality(entry: dict, **options) -> LatentModality:
    given = LatentOptions(type="latent", **options)
    return LatentModality("latent", LatentModality.resolve("latent", given, {"latent": entry}), (8, 8))


def test_a_build_encodes_every_picture_and_its_mirror_image(data, codec, entry):
    rows = read_rows(data)
    made, codes = modality(entry), []
    for key, row in rows.items():
        shown = torch.from_numpy(decode(row["pixels"]).copy()).permute(2, 0, 1)[None]
        for flip in (False, True):
            context = RowContext((8, 8), 0, 0, 0, flip=flip)
            context.__dict__["mirrored"] = flip
            read = made.read(row, context, {})
            wanted = load_codec(codec).encode(shown.flip(-1) if flip else shown)[0]
            torch.testing.assert_close(torch.from_numpy(read), wanted, atol=1e-3, rtol=2e-3, msg=key)
            codes.append(made.encode(torch.from_numpy(read))[None])
    assert entry["codec"] == load_codec(codec).codec_id and entry["size"] == [8, 8] and entry["channels"] == 3
    code = torch.cat(codes)
    torch.testing.assert_close(code.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(code.square().mean((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    assert draw_rows(data).width > 100


@pytest.mark.ray
def test_ray_actors_encode_what_this_process_encodes(ray_cluster, data, codec, tmp_path):
    options = {"count": 60, "size": 16, "latent": codec}
    build("sprites", str(tmp_path / "set"), options, workers=1, progress=False)
    here, there = read_rows(data), read_rows(str(tmp_path / "set"))
    assert list(here) == list(there)
    for key, row in here.items():
        latents = [np.load(io.BytesIO(one["latent"])).astype(float) for one in (row, there[key])]
        np.testing.assert_allclose(*latents, atol=1e-3)


def test_transparent_pictures_are_encoded_over_white(codec, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    Image.fromarray(rng.integers(0, 256, (16, 16, 4), np.uint8)).save(tmp_path / "in" / "a.png")
    options = {"source": str(tmp_path / "in"), "size": 16, "latent": codec}
    build("folder", str(tmp_path / "set"), options, workers=0, progress=False)
    (row,) = read_rows(str(tmp_path / "set")).values()
    white = np.asarray(over_white(Image.fromarray(decode(row["pixels"]))))
    made = modality(read_manifest(str(tmp_path / "set")).columns["latent"])
    wanted = load_codec(codec).encode(torch.from_numpy(white.copy()).permute(2, 0, 1)[None])[0].numpy()
    read = made.read(row, RowContext((8, 8), 0, 0, 0, flip=False), {})
    np.testing.assert_allclose(read, wanted, atol=1e-3, rtol=2e-3)
    np.testing.assert_allclose(made.parse(str(tmp_path / "in" / "a.png")), wanted, atol=1e-3, rtol=2e-3)


def test_latents_are_the_anchor_and_samples_are_pictures(data, codec, tmp_path):
    overrides = [f"data.sources=[{{uri: {data}}}]", "loss.weighting=elbo", "loss.coefficients.l3=1"]
    job = jobs.prepare(configuration.load(base=PLAIN, overrides=overrides), tmp_path)
    trainer = sprites.trainer(job)
    before = sprites.weights(trainer.denoiser)
    report = trainer.advance(sprites.batches(job), 32)
    assert np.isfinite(list(report.values())).all() and trainer.denoiser.anchor == "latent"
    assert not sprites.same(before, sprites.weights(trainer.denoiser))
    model, (key, row) = Generator(job.config, trainer.ema.model), next(iter(read_rows(data).items()))
    (tmp_path / "given.png").write_bytes(row["pixels"])
    given = parse_given(model, [f"latent={tmp_path / 'given.png'}"])
    pixels = torch.from_numpy(decode(row["pixels"]).copy()).permute(2, 0, 1)[None]
    np.testing.assert_allclose(given["latent"], load_codec(codec).encode(pixels)[0], atol=1e-6, err_msg=key)
    gallery = write_gallery(model, {}, 2, tmp_path / "drawn", steps=2)
    shown = model.denoiser.modalities["latent"].picture(gallery.samples.data["latent"])
    for index in range(2):
        written = Image.open(tmp_path / "drawn" / f"{index:04d}_latent.png")
        assert written.size == (16, 16) and np.array_equal(np.asarray(written), shown[index])


def test_fidelity_compares_decoded_latents(data, tmp_path):
    try:
        convolutions("alex")
    except ConfigError as error:
        pytest.skip(str(error))
    overrides = [f"data.sources=[{{uri: {data}}}]", "evaluate.evaluators=[fidelity]", "evaluate.steps=2"]
    job = jobs.prepare(configuration.load(base=PLAIN, overrides=overrides), tmp_path)
    model = Generator(job.config, job.denoiser())
    splits = [manifest.splits["train"] for manifest in job.manifests]
    batches = list(split_batches(job.reader(job.denoiser()), splits, 8, 8))
    figures = {one.key: one for one in evaluate(model, batches, job.columns).figures}
    pixels = model.modality("latent").pixels(batches[0].data["latent"])
    found = Lpips("alex").features(shuffled_pixels(pixels, job.config.seed)).double().numpy()
    real = Lpips("alex").features(pixels).double().numpy()
    floors = figures["latent/frechet_lpips_alex"].floors
    assert floors["shuffled pixels"] == pytest.approx(frechet_distance(real, found), rel=1e-6)


def test_pictures_and_files_are_decoded_and_given_ones_encoded(entry, codec, tmp_path):
    made = modality(entry)
    data = made.from_code(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    shown = load_codec(codec).decode(data)
    assert made.picture(data).shape == (2, 16, 16, 3)
    assert np.array_equal(made.picture(data), shown.permute(0, 2, 3, 1).numpy())
    path = made.write(data[1], tmp_path / "out")
    assert path.suffix == ".png" and np.array_equal(np.asarray(Image.open(path)), made.picture(data)[1])
    torch.testing.assert_close(torch.from_numpy(made.parse(str(path))), load_codec(codec).encode(shown)[1])
    with pytest.raises(ConfigError, match="latent: no file"):
        made.parse(str(tmp_path / "absent.png"))


def test_a_judge_of_images_sees_decoded_latents(data, tmp_path):
    sources = f"data.sources=[{{uri: {data}}}]"
    space = ["space.height=16", "space.width=16", "evaluate.evaluators=[]"]
    judge = jobs.prepare(configuration.load(base=sprites.PLAIN, overrides=[sources, *space]), tmp_path)
    save_export(tmp_path / "judge", judge.config, judge.denoiser(), {})
    overrides = [
        sources,
        "evaluate.evaluators=[judge]",
        "evaluate.steps=2",
        f"evaluate.judge={tmp_path / 'judge'}",
    ]
    job = jobs.prepare(configuration.load(base=PLAIN, overrides=overrides), tmp_path)
    splits = [manifest.splits["train"] for manifest in job.manifests]
    batches = list(split_batches(job.reader(job.denoiser()), splits, 8, 8))
    model = Generator(job.config, job.denoiser())
    found = {one.key: one.value for one in evaluate(model, batches, job.columns).figures}
    pixels = model.modality("latent").pixels(batches[0].data["latent"])
    predicted = judged(load_export(tmp_path / "judge"), pixels)["shape"]
    right = (predicted == batches[0].data["shape"].numpy()).mean()
    assert found["shape/judged_real"] == pytest.approx(right) and "shape/judged" in found


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_a_published_model_holds_its_codec(data, codec, tmp_path, form):
    job = jobs.prepare(
        configuration.load(base=PLAIN, overrides=[f"data.sources=[{{uri: {data}}}]"]), tmp_path
    )
    save_export(tmp_path / "run", job.config, job.denoiser(), {"progress": {"samples_seen": 0}})
    (Path(codec) / "fit.json").write_text("{}")  # as fit-codec leaves it: whose data it saw
    publish(Model(str(tmp_path / "run"), "toy"), tmp_path / "out", form)
    (held,) = (folder for folder in (tmp_path / "out").rglob("latent_codec"))
    assert {file.name for file in held.iterdir()} == {CONFIG, WEIGHTS}
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    model = load_export(moved)
    assert Path(model.modality("latent").options.codec).is_relative_to(moved)
    assert codec not in next(file for file in moved.rglob("config.json")).read_text()
    (image, _) = model.sample({}, 2, steps=2)["latent"]
    drawn = model.draw({}, 2, steps=2).data["latent"]
    assert np.array_equal(image, load_codec(codec).decode(drawn)[0]) and image.shape == (3, 16, 16)


def test_likelihood_is_the_gaussian_on_the_code(entry):
    made = modality(entry, sigma=0.7)
    code = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prediction = torch.zeros_like(code)
    wanted = -stats.norm.logpdf(code.numpy(), 0, 0.7).sum((1, 2, 3))
    data = made.from_code(code)
    found = made.negative_log_likelihood(prediction, data)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)
    std = torch.tensor([0.7, 0.7])[:, None, None, None]
    torch.testing.assert_close(made.code_negative_log_likelihood(prediction, std, data), found)
    hidden = torch.ones(2, 8, 8, dtype=torch.bool)
    assert made.code_negative_log_likelihood(prediction, std, data, hidden).tolist() == [0, 0]


def test_another_codec_or_none_is_refused_with_the_key_before_anything_starts(entry, codec, tmp_path):
    other = save_codec(tmp_path / "other", seed=1)
    with pytest.raises(
        ConfigError, match=r"modalities\.latent\.codec: .*other holds the codec AutoencoderTiny@"
    ):
        modality(entry, codec=other)
    for pinned, held in (("digest", "0" * 64), ("cells", [4, 4])):
        with pytest.raises(ConfigError, match=rf"latent\.{pinned} \(.*\) differs from the data set's"):
            modality(entry, **{pinned: held})
    with pytest.raises(ConfigError, match=r"modalities\.latent\.codec: no codec in .*gone"):
        modality(entry, codec=str(tmp_path / "gone"))
    moved = shutil.copytree(codec, tmp_path / "moved")
    assert modality(entry, codec=str(moved)).options.codec == str(moved)
    with pytest.raises(
        ConfigError, match=r"space is 16 x 8, the latents of latent are 8 x 8; set space\.height=8"
    ):
        LatentModality("latent", modality(entry).options, (16, 8))
    with pytest.raises(ConfigError, match=r"latent\.sigma"):
        modality(entry, sigma=0)
    with pytest.raises(ConfigError, match=r"must have a number per channel"):
        modality(entry, mean=[0.0])


@pytest.mark.parametrize(
    ("pipeline", "options", "message"),
    [
        ("sprites", {"count": 4, "size": 16, "latent": "absent"}, r"latent: no codec in absent"),
        ("sprites", {"count": 4, "size": 15}, r"pictures of 15 x 15 pixels have no latents"),
    ],
)
def test_a_build_refuses_what_it_cannot_encode(codec, tmp_path, pipeline, options, message):
    with pytest.raises(ConfigError, match=message):
        build(pipeline, str(tmp_path / "set"), {"latent": codec, **options}, workers=0, progress=False)
    assert not list(Path(tmp_path).rglob("*.parquet"))
