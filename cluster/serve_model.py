"""Serve a trained model over HTTP with Ray Serve. Copy this file and change what you need.

    pip install 'mmdiff-ray[serve]'
    mmdiff export demo --out models/demo
    cd cluster && serve run serve_model:build model=../models/demo
    curl localhost:8000 -d '{"given": {"category": "Food & Drink"}, "num": 2, "seed": 1}'
    curl localhost:8000 -d '{"png": "pixels"}' > sample.png

A request is JSON: `given` (modality -> a name or number; a picture or array as {"file": BASE64, "name":
"x.png"}), `num`, `seed`, `guidance` and `png`, a modality whose first sample is the answer. Requests that
give the same modalities are sampled in one batch; the answer depends on the request alone. Serve listens on
loopback; put a proxy with authentication before it to open it to others.
"""

import base64
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mmdiff_ray import load_pipeline
from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.image import to_png

TEXTS, NUMBERS = ("label", "labels", "text"), ("scalar", "vector")
"""Types given as text or numbers. All others take files, and clients must not name those of this machine."""
PICTURES = ("image", "mask", "latent")
MOST = 64
"""Samples per request."""


@serve.deployment(max_ongoing_requests=64)  # on GPUs: ray_actor_options={"num_gpus": 1}
class Model:
    def __init__(self, folder: str, device: str) -> None:
        self.model = load_pipeline(folder, device)

    async def __call__(self, request: Request) -> Response:
        try:
            asked = await request.json() if await request.body() else {}
            num = min(MOST, max(1, int(asked.get("num", 1))))
            given = {name: [self.parse(name, value)] * num for name, value in asked.get("given", {}).items()}
            settings = int(asked.get("seed", 0)), float(asked.get("guidance", 1.0))
            shown = asked.get("png")
            if shown is not None and self.model.modality(shown).options.type not in PICTURES:
                raise ConfigError(f"png: {shown} is no picture; want one of type {', '.join(PICTURES)}")
        except KeyError as error:
            return JSONResponse({"error": f"{error} is missing"}, status_code=400)
        except (ConfigError, TypeError, ValueError, AttributeError, OverflowError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        samples = await self.sample((given, num, settings))
        if shown in samples:
            return Response(png(samples[shown][0]), media_type="image/png")
        return JSONResponse({name: [plain(value) for value in values] for name, values in samples.items()})

    def parse(self, name: str, value: Any) -> np.ndarray:
        """Return what a client gives of a modality. Raises ConfigError or ValueError."""
        modality = self.model.modality(name)
        if not isinstance(value, dict):
            if modality.options.type in NUMBERS:
                numbers = value if isinstance(value, list) else [value]
                return modality.parse(",".join(str(float(number)) for number in numbers))
            if modality.options.type not in TEXTS:
                raise ConfigError(f"given {name}: want a file, {{'file': BASE64, 'name': 'x.png'}}")
            return modality.parse(str(value))
        suffix = Path(str(value.get("name", "x.png"))).suffix
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            Path(file.name).write_bytes(base64.b64decode(value["file"], validate=True))
            return modality.parse(file.name)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.02)
    async def sample(self, requests: list[tuple[dict, int, tuple]]) -> list[dict[str, list]]:
        """Return the samples of requests; those that give the same modalities are sampled together."""
        groups: dict[tuple, list[int]] = {}
        for index, (given, _, settings) in enumerate(requests):
            groups.setdefault((tuple(sorted(given)), settings), []).append(index)
        answers: list[dict[str, list]] = [{} for _ in requests]
        for (names, (seed, guidance)), members in groups.items():
            given = {name: [row for index in members for row in requests[index][0][name]] for name in names}
            ids = [number for index in members for number in range(requests[index][1])]
            drawn = self.model.sample(given, len(ids), seed=seed, guidance=guidance, ids=ids)
            start = 0
            for index in members:
                stop = start + requests[index][1]
                answers[index] = {name: values[start:stop] for name, values in drawn.items()}
                start = stop
        return answers


def png(value: np.ndarray) -> bytes:
    """Return an image (C, H, W) or a mask (H, W), uint8, as PNG."""
    return to_png(Image.fromarray(value if value.ndim == 2 else value.transpose(1, 2, 0)))


def plain(value: Any) -> Any:
    """Return a sample as JSON: pictures as base64 PNG, other arrays as lists."""
    if isinstance(value, np.ndarray):
        is_picture = value.dtype == np.uint8 and value.ndim in (2, 3)
        return base64.b64encode(png(value)).decode() if is_picture else value.tolist()
    return value


def build(args: dict[str, str]) -> serve.Application:
    """Return the application. args: model, a folder of `mmdiff export` or `pretrained:NAME`; device."""
    return Model.bind(args["model"], args.get("device", "cpu"))  # type: ignore[attr-defined]
