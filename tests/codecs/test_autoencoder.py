"""Codecs: both kinds of diffusers from local files, tiles, and folders that are refused."""

import json
import pickle
import shutil

import pytest
import torch

from mmdiff_ray.codecs.autoencoder import WEIGHTS, Codec, encoded, load_codec, tiled
from mmdiff_ray.config import ConfigError
from tests.codecs.tiny import save_codec


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("codecs")
    kinds = {"AutoencoderTiny": False, "AutoencoderKL": True}
    return {kind: save_codec(folder / kind, channels=5, factor=4, kl=kl) for kind, kl in kinds.items()}


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(1)) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AutoencoderKL"])
def test_a_codec_codes_as_the_library_does_and_travels_without_its_weights(folders, kind):
    import diffusers

    codec, shown = load_codec(folders[kind]), pictures(11, 16, 24)
    theirs = getattr(diffusers, kind).from_pretrained(folders[kind], low_cpu_mem_usage=False).eval()
    latents = codec.encode(shown)
    assert codec.codec_id.startswith(f"{kind}@") and latents.shape == (11, 5, 4, 6)
    with torch.no_grad():
        found = theirs.encode(shown.float() / 127.5 - 1)
        torch.testing.assert_close(latents, found.latents if "Tiny" in kind else found.latent_dist.mean)
        decoded = ((theirs.decode(latents).sample + 1) * 127.5).round().clamp(0, 255)
    assert (codec.decode(latents).float() - decoded).abs().max() <= 1
    other = pickle.loads(pickle.dumps(codec))
    assert len(pickle.dumps(codec)) < 1000 and torch.equal(other.encode(shown), latents)


def test_large_pictures_are_coded_in_tiles_without_seams(folders):
    codec, shown = load_codec(folders["AutoencoderTiny"]), pictures(1, 540, 1100)
    latents = codec.encode(shown)
    with torch.no_grad():
        whole = encoded(codec.model, shown.float() / 127.5 - 1)
        assert latents.shape == whole.shape == (1, 5, 135, 275)
        assert not torch.equal(latents, whole) and (latents - whole).abs().max() < 0.05 * whole.std()
        pixels = ((codec.model.decode(whole).sample + 1) * 127.5).clamp(0, 255)
    assert (codec.decode(whole).float() - pixels).abs().mean() < 1


def test_tiles_of_a_pointwise_function_give_the_function():
    x = torch.rand(2, 1, 17, 44, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tiled(torch.square, x, 8, 3, 1, 1), x.square())
    grown = tiled(lambda part: part.repeat_interleave(2, 2).repeat_interleave(2, 3), x, 8, 3, 1, 2)
    torch.testing.assert_close(grown, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_pictures_whose_sides_are_no_multiple_of_the_factor_are_refused(folders):
    with pytest.raises(ConfigError, match=r"pictures of 16 x 22 pixels .* multiples of 4 \(size\)"):
        load_codec(folders["AutoencoderTiny"]).encode(pictures(1, 16, 22))


def test_folders_without_the_codec_are_refused_in_one_line(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"no codec in .*absent .*config\.json and diffusion_pytorch_model"):
        Codec(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"holds the codec AutoencoderTiny@.* of one @abcdef01; name"):
        Codec(folders["AutoencoderTiny"], "abcdef01" * 8)
    broken = tmp_path / "broken"
    shutil.copytree(folders["AutoencoderTiny"], broken)
    (broken / WEIGHTS).write_bytes(b"\x80\x04pickle")
    with pytest.raises(ConfigError, match=r"cannot load the codec in .*broken"):
        Codec(str(broken)).encode(pictures(1, 16, 16))
    facts = json.loads((broken / "config.json").read_text())
    for change, message in (
        ({"_class_name": "UNet2DModel"}, "UNet2DModel, want"),
        ({"latent_channels": "x"}, "no autoencoder"),
    ):
        (broken / "config.json").write_text(json.dumps(facts | change))
        with pytest.raises(ConfigError, match=message):
            Codec(str(broken))


def test_weights_that_lack_tensors_are_refused_not_filled_at_random(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["AutoencoderTiny"], tmp_path / "part")
    tensors = load_file(tmp_path / "part" / WEIGHTS)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "part" / WEIGHTS)
    with pytest.raises(ConfigError, match="the weights lack 1 tensors"):
        Codec(str(tmp_path / "part")).encode(pictures(1, 16, 16))
