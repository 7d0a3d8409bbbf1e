"""Dense maps of real numbers (depth, normals, flow, heat maps): one prediction per cell and channel."""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError, ModalityConfig, decoding
from mmdiff_ray.modalities.base import DenseModality, Mean, Modality, RowContext, need_column
from mmdiff_ray.modalities.image import fitted
from mmdiff_ray.modalities.mask import VOID_COLOR
from mmdiff_ray.plotting import colored
from mmdiff_ray.registry import register

CONTENTS = {"values": None, "normals": 3, "flow": 2}
"""What a map holds -> its number of channels, or None for any. A mirrored x component changes its sign."""
LIKELIHOODS = ("gaussian", "laplace")
NPY = b"\x93NUMPY"
"""The first bytes of a .npy file."""


@dataclass(frozen=True)
class MapOptions(ModalityConfig):
    """The keys of a map.

    column: Parquet column; null: the modality's name.
    dim: numbers per cell; null: the data set's.
    range: lowest and highest value; null: the data set's. Values outside are unknown.
    content: values, normals (unit vectors, 3 channels) or flow (2 channels); null: the data set's.
    unit: value of one level of a 16-bit picture that is given; null: the data set's.
    likelihood: gaussian or laplace.
    sigma: standard deviation of the likelihood, in standard deviations of the channel.
    """

    column: str | None = None
    dim: int | None = None
    range: list[float] | None = None
    content: str | None = None
    unit: float | None = None
    likelihood: str = "gaussian"
    sigma: float = 1.0


@register("modality", "map")
class MapModality(DenseModality):
    """Maps. data: float32 (B, C, H, W), NaN in all channels of an unknown cell; code and prediction:
    (B, C, H, W), standardised per channel. Likelihood: Gaussian or Laplace.
    """

    Options: ClassVar[type] = MapOptions
    usual_scale = Modality.scale_of_regions
    mean: Tensor
    scale: Tensor

    def __init__(self, name: str, options: Any, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        key, content = f"modalities.{name}", options.content or "values"
        if not options.dim or options.dim < 1:
            raise ConfigError(f"{key}.dim ({options.dim}) must be at least 1")
        if content not in CONTENTS or CONTENTS[content] not in (None, options.dim):
            wanted = ", ".join(f"{known} (dim {dim or 'any'})" for known, dim in CONTENTS.items())
            raise ConfigError(f"{key}: got content {content!r} with dim {options.dim}, want {wanted}")
        if options.likelihood not in LIKELIHOODS:
            known = " or ".join(LIKELIHOODS)
            raise ConfigError(f"{key}.likelihood: got {options.likelihood!r}, want {known}")
        if not options.sigma > 0:
            raise ConfigError(f"{key}.sigma ({options.sigma}) must be above 0")
        self.low, self.high = checked_range(options.range, f"{key}.range")
        self.content = content
        self.likelihood = options.likelihood.capitalize()
        self.code_channels = self.prediction_channels = options.dim
        self.register_buffer("mean", torch.zeros(options.dim, 1, 1))
        self.register_buffer("scale", torch.ones(options.dim, 1, 1))

    @classmethod
    def resolve(cls, name: str, options: Any, columns: Mapping[str, Mapping[str, Any]]) -> Any:
        column = options.column or name
        entry = need_column(name, column, columns, ("map",))
        if options.dim not in (None, entry["channels"]):
            raise ConfigError(
                f"modalities.{name}.dim ({options.dim}) differs from the data set's {entry['channels']} "
                f"channels in column {column!r}; leave it out to take the data set's"
            )
        return dataclasses.replace(
            options,
            column=column,
            dim=entry["channels"],
            range=options.range or entry["range"],
            content=options.content or entry.get("content"),
            unit=options.unit or entry.get("unit"),
        )

    @property
    def data_type(self) -> type:
        return np.float32

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        stored = row[self.column]
        return None if stored is None else self._fit(np.load(io.BytesIO(stored)), self.size)

    def augment(self, decoded: np.ndarray, context: RowContext) -> np.ndarray:
        if not context.mirrored:
            return decoded
        mirrored = decoded[..., ::-1].copy()
        if self.content != "values":
            mirrored[0] *= -1
        return mirrored

    def _fit(self, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return a map (C, h, w) at the space's size. Raises ValueError for another number of channels."""
        if len(values) != self.code_channels:
            raise ValueError(f"map {self.name}: got {len(values)} channels, want {self.code_channels}")
        if values.shape[1:] != size:
            box = Image.Resampling.BOX
            values = resized(values, lambda part: fitted(part, size).resize(size[::-1], box), self.content)
        return known_within(values, self.low, self.high)

    def calibrate(self, data: Tensor) -> None:
        """Fix mean and standard deviation per channel from the known cells of a sample of maps."""
        values = data.double().movedim(1, 0).flatten(1)  # (C, B * H * W)
        values = values[:, ~values.isnan().any(0)]
        if values.shape[1] > 1:
            self.mean.copy_(values.mean(1)[:, None, None])
            self.scale.copy_(values.std(1).clamp_min(1e-6)[:, None, None])

    def void(self, data: Tensor) -> Tensor | None:
        return data.isnan().any(1)

    def encode(self, data: Tensor) -> Tensor:
        return torch.nan_to_num((data - self.mean) / self.scale)  # 0: an unknown cell says nothing

    def from_code(self, code: Tensor) -> Tensor:
        values = (code.float() * self.scale + self.mean).clamp(self.low, self.high)
        return nn.functional.normalize(values, dim=1) if self.content == "normals" else values

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        sigma = self.options.sigma
        deviation = (prediction.float() - self.encode(data)) / sigma
        if self.options.likelihood == "laplace":
            nats = math.sqrt(2) * deviation.abs() + math.log(math.sqrt(2) * sigma)
        else:
            nats = 0.5 * (deviation.square() + math.log(2 * math.pi * sigma**2))
        return nats.masked_fill(data.isnan(), 0).flatten(1).sum(1)

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        difference = (answer - data).abs()
        known = ~difference.isnan()
        return {"absolute_error": Mean(float(difference[known].sum()), int(known.sum()))}

    def picture(self, data: Tensor) -> np.ndarray:
        return paint(data.cpu().numpy(), (self.low, self.high), self.content)

    def entry(self) -> dict[str, Any]:
        unit = {} if self.options.unit is None else {"unit": self.options.unit}
        shared = {"channels": self.code_channels, "range": [self.low, self.high], "content": self.content}
        return {"kind": "map", **shared, **unit}

    def stored(self, data: Tensor) -> np.ndarray:
        return data.float().cpu().numpy()

    def parse(self, text: str) -> np.ndarray:
        """Return the map in a .npy file or a picture. Raises ConfigError."""
        try:
            values = self._fit(read_map(Path(text), self.content, self.options.unit or 1.0), self.size)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.name}: cannot read a map from {text!r}: {error}; a map is given as a .npy file or a "
                "16-bit picture"
            ) from None
        if np.isnan(values).all():
            raise ConfigError(f"{self.name}: {text} holds no value from {self.low:g} to {self.high:g}")
        return values

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.npy")
        np.save(path, data.cpu().numpy())
        return path


def checked_range(limits: Any, key: str) -> tuple[float, float]:
    """Return a map's range. Raises ConfigError, naming the key, unless it is [low, high]."""
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{key}: got {limits!r}, want [lowest, highest], as [0.5, 80]")
    return low, high


def read_map(
    source: Path | bytes | np.ndarray, content: str = "values", unit: float = 1.0, void: float | None = None
) -> np.ndarray:
    """Return the map in a file, its bytes or an array, float32 (C, h, w), NaN where unknown: not finite, or
    `void`.

    Arrays and .npy files have the shape (h, w), (h, w, C) or (C, h, w); pictures are grey, of 8, 16 or 32
    bits. Their numbers, of which `void` is one, are multiplied by the unit. Normals may be pictures in RGB,
    where 0 to 255 is -1 to 1. Raises OSError or ValueError for others.
    """
    with decoding():
        raw = source if isinstance(source, np.ndarray) else _numbers(source, content)
    if raw.dtype.kind not in "fiu" or raw.ndim not in (2, 3):
        raise ValueError(f"got {raw.dtype} of shape {raw.shape}, want numbers (h, w), (h, w, C) or (C, h, w)")
    if raw.ndim == 2:
        raw = raw[None]
    elif raw.shape[2] < raw.shape[0]:
        raw = raw.transpose(2, 0, 1)
    unknown = ~np.isfinite(raw).all(0)
    if void is not None:
        unknown |= (raw == void).all(0)
    return np.where(unknown, np.nan, raw.astype(np.float64) * unit).astype(np.float32)


def _numbers(source: Path | bytes, content: str) -> np.ndarray:
    """Return the numbers in a .npy file or a picture."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    if data.startswith(NPY):
        return np.load(io.BytesIO(data), allow_pickle=False)
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("it is neither a .npy file nor a picture") from None
    with picture:
        deep = "RGB;16" in str(picture.tile)  # Pillow would cut these to 8 bits
        if deep or picture.mode not in ("L", "I", "I;16", "F", "RGB"):
            raise ValueError(f"a picture in {picture.mode} is no map; want a grey one or a .npy file")
        is_vector = content == "normals" and picture.mode == "RGB"
        return np.asarray(picture) / 127.5 - 1 if is_vector else np.asarray(picture)


def resized(
    values: np.ndarray, resize: Callable[[Image.Image], Image.Image], content: str = "values"
) -> np.ndarray:
    """Return a map (C, h, w) resized by averages over its known pixels; unknown where half of them are.

    resize: of a picture in mode F, without negative weights. Averaged normals become unit vectors again.
    """
    unknown = np.isnan(values).any(0)
    parts = [~unknown, *np.where(unknown, 0, values)]
    known, *sums = (np.asarray(resize(Image.fromarray(part.astype(np.float32)))) for part in parts)
    averages = np.stack(sums) / np.maximum(known, 0.5)
    if content == "normals":
        averages = averages / np.maximum(np.linalg.norm(averages, axis=0), 1e-6)
    return np.where(known > 0.5, averages, np.nan).astype(np.float32)


def known_within(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return a map (C, h, w) in float32, unknown where a channel is outside the range, beyond rounding."""
    slack = 1e-3 * (high - low)  # float16 keeps three digits
    with np.errstate(invalid="ignore"):
        inside = ((values >= low - slack) & (values <= high + slack)).all(0)
    return np.where(inside, np.clip(values, low, high), np.nan).astype(np.float32)


def paint(values: np.ndarray, limits: Sequence[float], content: str) -> np.ndarray:
    """Return maps (B, C, H, W) as RGB, uint8 (B, H, W, 3): values in a colour map (of several channels the
    largest), normals as (x, y, z), flow by direction and speed. limits: the range."""
    unknown, values = np.isnan(values).any(1), np.nan_to_num(values)
    low, high = limits
    if content == "normals":
        shown = ((values + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    elif content == "flow":
        x, y = values[:, 0], values[:, 1]
        hue = colored(np.arctan2(y, x) / (2 * np.pi) % 1, "hsv")  # (B, H, W, 3)
        speed = (np.hypot(x, y) / max(abs(low), abs(high))).clip(0, 1)[..., None]
        shown = (255 - speed * (255.0 - hue)).round().astype(np.uint8)
    else:
        shown = colored((values.max(1) - low) / (high - low))
    return np.where(unknown[..., None], VOID_COLOR, shown)
