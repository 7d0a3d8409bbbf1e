"""The example for Ray Serve answers over HTTP, on a local Ray cluster, what the model itself samples."""

import base64
import io
import json
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray import load_pipeline
from mmdiff_ray.cli import main
from tests.test_ui import free_port

serve = pytest.importorskip("ray.serve", reason="no extra serve")
pytestmark = [pytest.mark.ray, pytest.mark.slow]
EXAMPLES = Path(__file__).parents[2] / "cluster"


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("serve") / "model"
    assert main(["export", str(finished.folder), "--out", str(out)]) == 0
    return str(out)


@pytest.fixture(scope="module")
def address(folder, ray_cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import serve_model
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(serve_model)
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(serve_model.build({"model": folder}))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        sys.modules.pop("serve_model")


def ask(address: str, **asked) -> bytes:
    request = urllib.request.Request(address, json.dumps(asked).encode())
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()


def test_answers_are_the_models_samples_however_requests_are_batched(address, folder):
    model = load_pipeline(folder)
    names = model.config.modalities["shape"].names[:2] * 4
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: json.loads(ask(address, given={"shape": name}, num=2)), names))
    for name, answer in zip(names, answers, strict=True):
        expected = model.sample({"shape": [name] * 2}, num=2)["pixels"]
        for text, pixels in zip(answer["pixels"], expected, strict=True):
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).transpose(2, 0, 1)
            assert np.abs(found.astype(int) - pixels).max() <= 1, name  # sums differ by the batch's size


def test_pictures_are_given_as_files_and_answered_as_png(address, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    text = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    answer = ask(address, given={"pixels": {"file": text, "name": "red.png"}}, png="shapes")
    assert Image.open(io.BytesIO(answer)).size == (8, 8)
    assert Image.open(io.BytesIO(ask(address, png="pixels"))).mode == "RGB"


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"given": {"shape": "teapot"}}, "teapot"),
        ({"given": {"pixels": "/etc/hostname"}}, "want a file"),
        ({"given": {"colour": "red"}}, "the model has no modality 'colour'"),
        ({"num": "many"}, "many"),
        ({"given": {"pixels": {"name": "x.png"}}}, "'file' is missing"),
        ({"seed": float("inf")}, "infinity"),
        ({"png": "shape"}, "png: shape is no picture"),
    ],
)
def test_mistakes_are_answered_with_400_in_one_line(address, asked, message):
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(address, **asked)
    assert caught.value.code == 400 and message in json.loads(caught.value.read())["error"]
