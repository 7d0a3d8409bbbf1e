import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest

from mmdiff_ray.tracking import models
from mmdiff_ray.tracking.sender import replay
from mmdiff_ray.tracking.tracker import Tracker

LABELS = ["cat", "dog"]
LOADER = f"{__name__}:load_painter"


class Painter:
    """A sampler with a known answer: the picture's colour is the label's, the mask covers what is given."""

    def __init__(self, scale: int):
        self._scale = scale

    def sample(self, given, num, steps, sampler, guidance, seed, likely):
        labels = given.get("label", [LABELS[seed % 2]] * num)
        images = given.get(
            "pixels", [np.full((3, 4, 6), self._scale * LABELS.index(name), np.uint8) for name in labels]
        )
        masks = [(image[0] > 0).astype(np.uint8) for image in images]
        looks = [np.array([guidance, steps or 0], np.float32)] * num
        return {"pixels": images, "alpha": masks, "label": labels, "look": looks, "sampler": [sampler] * num}


def load_painter(folder: Path) -> Painter:
    return Painter(json.loads((folder / "export.json").read_text())["scale"])


@pytest.fixture
def export(tmp_path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "export.json").write_text('{"scale": 7}')
    return folder


def png(array: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def predict(tmp_path_factory):
    import mlflow.pyfunc

    folder = tmp_path_factory.mktemp("model")
    (folder / "export").mkdir()
    (folder / "export" / "export.json").write_text('{"scale": 7}')
    models.save_model(folder / "model", folder / "export", LOADER)
    return mlflow.pyfunc.load_model(str(folder / "model")).predict


def test_each_row_gives_as_many_samples_as_asked_for(predict):
    import pandas as pd

    samples = predict(pd.DataFrame({"label": ["dog", "cat"]}), params={"num": 2})
    assert samples["label"].tolist() == ["dog", "dog", "cat", "cat"]
    assert [pixels(data).shape for data in samples["pixels"]] == [(4, 6, 3)] * 4
    assert [int(pixels(data).max()) for data in samples["pixels"]] == [7, 7, 0, 0]
    assert predict([], params={"num": 3, "seed": 1})["label"].tolist() == ["dog"] * 3, "joint samples"


def test_a_given_picture_may_be_a_png_or_its_base64_text(predict):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    for given in (png(picture), base64.b64encode(png(picture)).decode()):
        samples = predict([{"pixels": given}])
        assert (pixels(samples["pixels"][0]) == picture).all()
        assert (pixels(samples["alpha"][0]) == (picture[..., 0] > 0)).all()


def test_settings_reach_the_sampler_and_have_defaults(predict):
    samples = predict([], params={"steps": 50, "guidance": 3.0, "sampler": "ddim"})
    assert samples["look"][0] == [3.0, 50.0] and samples["sampler"][0] == "ddim"
    with pytest.raises(ValueError, match="readout 'best' must be sample or likely"):
        predict([], params={"readout": "best"})
    with pytest.raises(ValueError, match="same instances"):
        predict([{"label": "dog"}, {"pixels": png(np.zeros((4, 6, 3), np.uint8))}])
    assert predict([])["look"][0] == [models.PARAMS["guidance"], models.PARAMS["steps"]]


def test_a_run_holds_its_model_and_its_name_loads_it(uri, client, run_id, export, tmp_path, monkeypatch):
    import mlflow

    tracker = Tracker(uri, run_id, tmp_path / "tracking")
    models.log_model(tracker, export, LOADER, step=1000)
    assert tracker.close(60) == 0
    outputs = client.get_run(run_id).outputs.model_outputs
    assert [output.step for output in outputs] == [1000]
    model = client.get_logged_model(outputs[0].model_id)
    assert (model.name, model.status, model.source_run_id) == ("model", "READY", run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    loaded = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
    assert loaded.metadata.run_id == run_id and loaded.metadata.model_id == model.model_id
    assert loaded.predict([{"label": "dog"}])["label"].tolist() == ["dog"]


def test_a_model_recorded_while_the_store_is_away_arrives_once(
    uri, client, dead_uri, run_id, export, tmp_path
):
    import shutil

    tracker = Tracker(dead_uri, run_id, tmp_path / "once")
    models.log_model(tracker, export, LOADER, step=5)
    assert tracker.close(timeout_s=0.1) == 1
    shutil.copytree(tmp_path / "once", tmp_path / "again")
    for copy in ("once", "again"):
        assert replay(tmp_path / copy, uri).waiting == 0
    assert len(client.get_run(run_id).outputs.model_outputs) == 1
    assert export.exists()
