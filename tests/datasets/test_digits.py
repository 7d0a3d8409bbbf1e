"""Digits: every row is the one of scikit-learn."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mmdiff_ray.datasets.build import build, make_pipeline
from mmdiff_ray.datasets.embedders import make_embedder
from tests.datasets.reading import decode, read_rows


def test_rows_are_scikit_learns_digits_in_full_contrast(tmp_path):
    out = str(tmp_path / "set")
    built = build("digits", out, {"limit": 40}, workers=0, progress=False)
    assert built.written == 40
    digits = load_digits()
    names = built.manifest.columns["label"]["names"]
    for key, row in read_rows(out).items():
        levels = digits.images[int(key)]
        pixels = decode(row["pixels"])
        assert pixels.shape == (8, 8, 3)
        assert all(np.allclose(pixels[..., channel] * (16 / 255), levels, atol=0.04) for channel in range(3))
        assert names[row["label"]] == str(digits.target[int(key)])


def test_pictures_are_embedded_where_one_asks_for_it(tmp_path):
    out = str(tmp_path / "set")
    options = {"limit": 12, "look": "efficientnet-lite0"}
    built = build("digits", out, options, workers=0, progress=False)
    rows = read_rows(out)
    assert built.manifest.columns["look"]["kind"] == "embedding" and len(rows) == 12
    looks = np.stack([row["look"] for row in rows.values()])
    embedder = make_embedder("efficientnet-lite0", "image")
    pictures = [Image.fromarray(decode(row["pixels"])) for row in rows.values()]
    assert looks.shape == (12, embedder.dim) and np.allclose(looks, embedder(pictures), atol=1e-4)


def test_there_are_all_of_them_and_the_brightest_is_white():
    pipeline = make_pipeline("digits")
    items = pipeline.items()
    assert len(items) == 1797
    assert max(decode(pipeline.row(item)["pixels"]).max() for item in items[:20]) == 255
