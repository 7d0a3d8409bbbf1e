"""`mmdiff data fit-codec`: a small autoencoder of a data set's images, ready for a build with latents."""

import json

import pytest
import torch

from mmdiff_ray.cli import main
from mmdiff_ray.codecs.autoencoder import Codec, new_autoencoder
from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.datasets.build import build
from mmdiff_ray.datasets.fit_codec import Fit, fit_codec, measure
from mmdiff_ray.evaluation.weights import convolutions

pytest.importorskip("diffusers", reason="pip install 'mmdiff-ray[latents]'")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("sprites") / "set")
    build("sprites", out, {"count": 60, "size": 64}, workers=0, progress=False)
    return out


def with_lpips() -> float:
    """Return the weight of LPIPS: 0 where its weights are not on this machine."""
    try:
        convolutions("alex")
    except ConfigError:
        return 0.0
    return 1.0


def test_a_command_trains_a_codec_and_another_encodes_64_pixels_to_8_cells(data, tmp_path, capsys):
    folder = tmp_path / "codec"
    words = ["--source", data, "--out", str(folder), "--width", "8", "--samples", "16", "--batch", "8"]
    assert main(["data", "fit-codec", *words, "--lpips", str(with_lpips())]) == 0
    figures = json.loads((folder / "fit.json").read_text())["figures"]
    assert f"psnr {figures['psnr']:.3f}" in capsys.readouterr().out
    encode = ["data", "build", "sprites", "--out", str(tmp_path / "set"), "--workers", "0"]
    assert main([*encode, "count=8", "size=64", f"latent={folder}"]) == 0
    entry = read_manifest(str(tmp_path / "set")).columns["latent"]
    assert (entry["size"], entry["channels"]) == ([8, 8], 4) and entry["codec_digest"] == Codec(folder).digest
    assert main(["data", "fit-codec", *words]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(("kl", "ratio"), [(0.0, 0.6), (1e-4, 0.95)])  # KL begins with latents of noise
def test_training_improves_reconstructions_and_repeats_by_its_seed(tmp_path, kl, ratio):
    build("sprites", str(tmp_path / "set"), {"count": 60, "size": 16}, workers=0, progress=False)
    options = {"factor": 4, "width": 8, "batch": 16, "learning_rate": 3e-3, "kl": kl, "lpips": 0.0}
    found = {}
    for name, samples in (("start", 16), ("start again", 16), ("end", 640)):
        fit = Fit(str(tmp_path / "set"), samples=samples, seed=3, **options)
        found[name] = fit_codec(fit, tmp_path / name, progress=False)
    first, again = (Codec(str(tmp_path / name)) for name in ("start", "start again"))
    assert first.digest == again.digest and found["start"] == found["start again"]
    assert first.kind == ("AutoencoderKL" if kl else "AutoencoderTiny")
    assert found["end"]["l1"] < ratio * found["start"]["l1"], found


def test_figures_are_those_of_the_reconstructed_images(data, tmp_path):
    new_autoencoder(4, 8, 8, kl=False).save_pretrained(tmp_path / "codec")
    codec = Codec(str(tmp_path / "codec"))
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    again = codec.decode(codec.encode(images))
    from skimage.metrics import peak_signal_noise_ratio

    wanted = [peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in zip(images, again, strict=True)]
    assert measure(codec, images, None)["psnr"] == pytest.approx(sum(wanted) / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 6}, r"--factor \(6\) must be a power of 2"),
        ({"factor": 128}, r"--factor \(128\) must divide the sides of the images, 64 x 64"),
        ({"samples": 0}, r"--samples \(0\)"),
        ({"kl": -1}, r"--kl \(-1\)"),
        ({"learning_rate": 0}, r"--learning-rate \(0\)"),
        ({"column": "shapes"}, "wants a column of kind image"),
    ],
)
def test_what_cannot_be_trained_is_refused(data, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        fit_codec(Fit(data, **{"lpips": 0.0, **options}), tmp_path / "out", progress=False)
