"""A trained model as an MLflow model: `mlflow.pyfunc.load_model(uri).predict(rows)` draws samples.

The model contains the exported folder and the name of the function that opens it, but no pickled code, so
loading it requires this package.

Input: a data frame or a list of dictionaries, with one row per request and one column per given instance.
Images and masks are PNGs (bytes or base64), labels are names or numbers, embeddings are lists of numbers. An
empty frame draws joint samples. Output: `num` rows per input row and one column per instance, with images and
masks as PNG bytes.
"""

import base64
import importlib
import io
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmdiff_ray.tracking import provenance
from mmdiff_ray.tracking.recorder import Recorder

PARAMS: dict[str, Any] = {
    "num": 1,
    "steps": 0,
    "sampler": "",
    "guidance": 1.0,
    "seed": 0,
    "readout": "",
}
"""Parameters of `predict` and their defaults; 0 and "" select the value in the model's configuration."""
REQUIREMENTS = ("mmdiff-ray", "torch", "numpy")
PNG_MAGIC, PNG_BASE64 = b"\x89PNG", "iVBORw0KGgo"


class Sampler(Protocol):
    """An opened export. Images are uint8 (C, H, W), masks uint8 (H, W)."""

    def sample(
        self,
        given: dict[str, list],
        num: int,
        steps: int | None,
        sampler: str | None,
        guidance: float,
        seed: int,
        likely: bool | None,
    ) -> dict[str, list]:
        """Return `num` values of every instance; each list of `given` has `num` values."""
        ...


def log_model(recorder: Recorder, export: str | Path, loader: str, step: int, name: str = "model") -> None:
    """Record an exported folder as the run's model, `runs:/<run id>/<name>`; works offline.

    loader: "module:function" that opens the folder as a Sampler.
    """
    with tempfile.TemporaryDirectory(prefix="mmdiff-model-") as folder:
        save_model(Path(folder) / name, export, loader)
        recorder.model(Path(folder) / name, name, step)


def save_model(folder: Path, export: str | Path, loader: str) -> None:
    """Write an exported folder as an MLflow model."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec

    kinds, versions = {int: "long", float: "double", str: "string"}, provenance.versions()
    params = [ParamSpec(name, kinds[type(value)], value) for name, value in PARAMS.items()]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*input example was not"
        )  # validating an example would draw samples
        mlflow.pyfunc.save_model(
            folder,
            loader_module=__name__,
            data_path=str(export),
            model_config={"loader": loader},
            signature=ModelSignature(params=ParamSchema(params)),
            pip_requirements=[f"{name}=={versions[name]}" for name in REQUIREMENTS if name in versions],
        )


def _load_pyfunc(path: str, model_config: Mapping[str, Any]) -> "SamplerModel":
    """Open a saved model; MLflow calls this by its name."""
    module, _, function = model_config["loader"].partition(":")
    return SamplerModel(getattr(importlib.import_module(module), function)(Path(path)))


class SamplerModel:
    """A sampler behind MLflow's `predict`."""

    def __init__(self, sampler: Sampler):
        self._sampler = sampler

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Return samples as a data frame.

        params: num (samples per row), steps, sampler, guidance, seed, readout (sample or likely).
        Raises ValueError if rows give different instances, or for an unknown readout.
        """
        import pandas as pd

        rows = pd.DataFrame(model_input)
        if rows.isna().any(axis=None):
            raise ValueError("an empty cell: all rows of one call must give the same instances")
        options = PARAMS | (params or {})
        each, readout = options.pop("num"), options.pop("readout")
        if readout not in ("", "sample", "likely"):
            raise ValueError(f"readout {readout!r} must be sample or likely")
        options |= {key: options[key] or None for key in ("steps", "sampler")}
        options["likely"] = readout == "likely" if readout else None
        given = {str(name): [_from_png(value) for value in rows[name] for _ in range(each)] for name in rows}
        samples = self._sampler.sample(given, num=each * max(1, len(rows)), **options)
        return pd.DataFrame({name: [_to_png(value) for value in values] for name, values in samples.items()})


def _from_png(value: Any) -> Any:
    """Decode a PNG to uint8 (C, H, W), or (H, W) if it has one channel; return other values unchanged."""
    from PIL import Image

    if isinstance(value, str) and value.startswith(PNG_BASE64):
        value = base64.b64decode(value)
    if not (isinstance(value, bytes) and value.startswith(PNG_MAGIC)):
        return value
    image = np.asarray(Image.open(io.BytesIO(value)))
    return image if image.ndim == 2 else image.transpose(2, 0, 1)


def _to_png(value: Any) -> Any:
    """Encode an image or mask as PNG bytes and other arrays as lists; return other values unchanged."""
    from PIL import Image

    if not isinstance(value, np.ndarray):
        return value
    if value.dtype != np.uint8 or value.ndim not in (2, 3):
        return value.tolist()
    buffer = io.BytesIO()
    Image.fromarray(value if value.ndim == 2 else value.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()
