"""Images: 8-bit RGB, standardised pixels as code. Transparent ones are drawn over a background when read."""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdiff_ray.config import ConfigError, ModalityConfig, decoding
from mmdiff_ray.modalities.backgrounds import draw_background
from mmdiff_ray.modalities.base import DenseModality, Mean, RowContext, need_column
from mmdiff_ray.registry import register

ORIENTATION = 0x0112
"""The EXIF tag of how a camera was held."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageOptions(ModalityConfig):
    """The keys of an image.

    column: Parquet column; null: the modality's name.
    sigma: standard deviation of the likelihood if the image is not the anchor, in pixel units of [-1, 1].
    """

    column: str | None = None
    sigma: float = 0.5


@register("modality", "image")
class ImageModality(DenseModality):
    """RGB images. data: uint8 (B, 3, H, W); code and prediction: (B, 3, H, W), standardised per channel.

    Likelihood: a Gaussian discretised to the 256 grey levels (Ho et al., 2020, equation 13).
    """

    Options = ImageOptions
    likelihood = "discretised Gaussian"
    code_channels = 3
    prediction_channels = 3
    code_mean: Tensor
    code_scale: Tensor

    def __init__(self, name: str, options: ImageOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        if not options.sigma > 0:
            raise ConfigError(f"modalities.{name}.sigma ({options.sigma}) must be above 0")
        self.register_buffer("code_mean", torch.zeros(3))
        self.register_buffer("code_scale", torch.full((3,), 0.5))

    @classmethod
    def resolve(
        cls, name: str, options: ImageOptions, columns: Mapping[str, Mapping[str, Any]]
    ) -> ImageOptions:
        column = options.column or name
        need_column(name, column, columns, ("image",))
        return dataclasses.replace(options, column=column)

    @property
    def data_type(self) -> type:
        return np.uint8

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        if row[self.column] is None:
            return None
        return resized(Image.open(io.BytesIO(row[self.column])), self.size)

    def augment(self, decoded: np.ndarray, context: RowContext) -> np.ndarray:
        return draw(decoded, context, self.name)

    def calibrate(self, data: Tensor) -> None:
        """Fix mean and standard deviation per channel from a sample of images."""
        pixels = to_float(data).double()
        self.code_mean.copy_(pixels.mean(dim=(0, 2, 3)))
        self.code_scale.copy_(pixels.std(dim=(0, 2, 3)).clamp_min(1e-2))

    def encode(self, data: Tensor) -> Tensor:
        return (to_float(data) - _per_channel(self.code_mean)) / _per_channel(self.code_scale)

    def from_code(self, code: Tensor) -> Tensor:
        return to_bytes(code.float() * _per_channel(self.code_scale) + _per_channel(self.code_mean))

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        std = self.options.sigma / _per_channel(self.code_scale)
        return self.code_negative_log_likelihood(prediction, std, data)

    def code_negative_log_likelihood(
        self, mean: Tensor, std: Tensor, data: Tensor, known: Tensor | None = None
    ) -> Tensor:
        """Return -log p(data) in nats under N(mean, std^2) on the code, discretised to grey levels, (B,).

        mean: (B, 3, H, W); std: a number per sample or channel that broadcasts to it, in code units; known:
        cells that do not count, bool (B, H, W).
        """
        scale, half = _per_channel(self.code_scale), 1 / 255
        centre = to_float(data)
        deviation = centre - (mean.float() * scale + _per_channel(self.code_mean))
        sigma = (std * scale).clamp_min(1e-4)
        # The outermost levels take the whole tails; a finite end keeps gradients finite.
        below = deviation - torch.where(centre < -1 + half, 1e6, half)
        above = deviation + torch.where(centre > 1 - half, 1e6, half)
        nats = -_log_normal_mass(below / sigma, above / sigma)
        return (nats if known is None else nats.masked_fill(known[:, None], 0)).flatten(1).sum(1)

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        difference = (to_float(answer) - to_float(data)).abs()
        return {"l1": Mean(float(difference.sum()), difference.numel())}

    def pixels(self, data: Tensor) -> Tensor:
        return data

    def picture(self, data: Tensor) -> np.ndarray:
        return data.permute(0, 2, 3, 1).cpu().numpy()

    def parse(self, text: str) -> np.ndarray:
        context = RowContext(self.size, seed=0, visit=0, row_id=0, backgrounds="white", flip=False)
        return draw(resized(open_image(text, self.name), self.size), context, self.name)

    def entry(self) -> dict[str, Any]:
        return {"kind": "image"}

    def stored(self, data: Tensor) -> bytes:
        return to_png(data.permute(1, 2, 0).cpu().numpy())

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.png")
        Image.fromarray(data.permute(1, 2, 0).cpu().numpy()).save(path)
        return path


def resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return the middle of an image (`fitted`) at a size (height, width): uint8 (H, W, 3), or (H, W, 4) with
    premultiplied colours if it has transparency."""
    height, width = size
    image = fitted(image, size)
    transparent = "A" in image.getbands() or "transparency" in image.info
    pixels = image.convert("RGBA").convert("RGBa") if transparent else image.convert("RGB")
    if pixels.size != (width, height):
        shrinks = pixels.size[0] >= width and pixels.size[1] >= height
        pixels = pixels.resize((width, height), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
    return np.asarray(pixels)


def draw(pixels: np.ndarray, context: RowContext, name: str) -> np.ndarray:
    """Return `resized` pixels as uint8 (3, H, W), mirrored, and over a background if there is transparency.

    name: the instance's, which keys the background (`RowContext.backgrounds`).
    """
    if context.mirrored:
        pixels = pixels[:, ::-1]
    if pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    array = pixels.astype(np.float32) / 255
    generator = context.generator(f"background of {name}")
    background = draw_background(generator, pixels.shape[:2]) if context.backgrounds == "random" else 1.0
    array = array[..., :3] + (1 - array[..., 3:]) * background  # premultiplied colours
    return np.ascontiguousarray((array * 255).round().clip(0, 255).astype(np.uint8).transpose(2, 0, 1))


def to_png(image: Image.Image | np.ndarray) -> bytes:
    """Return an image as the bytes of a PNG file. Arrays are uint8 (H, W), (H, W, 3) or (H, W, 4)."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the largest middle part of an image with the proportions of a size (height, width)."""
    height, width = size
    share = min(image.width / width, image.height / height)
    cut = max(1, round(width * share)), max(1, round(height * share))
    left, top = (image.width - cut[0]) // 2, (image.height - cut[1]) // 2
    return image.crop((left, top, left + cut[0], top + cut[1]))


def open_image(path: str, name: str, scale: bool = True) -> Image.Image:
    """Return the picture in a file, upright. Raises ConfigError if there is none.

    scale: whether one of more than 8 bits is brought to 8, else a mode of I or F is refused.
    """
    try:
        register_heif(path)
        with decoding():
            image: Image.Image = Image.open(in_memory(Path(path)))
            image.load()
            if image.mode in ("I", "F") and not scale:
                raise ValueError(f"it has more than 16 bits a channel (mode {image.mode})")
            image, _ = upright(in_8_bits(image) if scale else image)
    except FileNotFoundError:
        raise ConfigError(f"{name}: no file {path!r}; a picture is given as a file") from None
    except IsADirectoryError:
        raise ConfigError(f"{name}: {path!r} is a folder; a picture is given as a file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot read a picture from {path!r}: {error}") from None
    return image


def in_memory(file: Path) -> io.BytesIO:
    """Return a file's content. Pillow 12 misreads uncompressed TIFF files that it maps and turns upright."""
    return io.BytesIO(file.read_bytes())


def upright(image: Image.Image) -> tuple[Image.Image, Image.Transpose | None]:
    """Return an image as its EXIF orientation says that people see it, and what made it so."""
    image.load()  # Pillow turns TIFF files by itself then
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    return (image if turn is None else image.transpose(turn)), turn


def in_8_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16 bits, or of floats in [0, 1], in 8 bits; one of 8 bits as it is."""
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image).astype(np.float64)
    values = values * 255 if image.mode[0] == "F" else values / 257
    scaled = Image.fromarray(np.clip(np.nan_to_num(values).round(), 0, 255).astype(np.uint8))
    scaled.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    return scaled


def register_heif(file: str | Path) -> None:
    """Make Pillow read a .heic or .heif file. Raises ValueError where the package is missing."""
    if Path(file).suffix.lower() in (".heic", ".heif"):
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ValueError(f"{file}: reading HEIC needs a package: pip install pillow-heif") from None
        register: Callable[[], None] = register_heif_opener
        register()


def to_float(data: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1]."""
    return data.float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as uint8, rounded."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _per_channel(value: Tensor) -> Tensor:
    return value[:, None, None]


def _log_normal_mass(low: Tensor, high: Tensor) -> Tensor:
    """Return log(Phi(high) - Phi(low)), low < high; values and gradients are accurate in both tails.

    By Phi(x) = exp(-x^2 / 2) erfcx(-x / sqrt 2) / 2 for x < 0, since the gradient of torch's log_ndtr is
    wrong from about 1,000 standard deviations on.
    """
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    root, around = math.sqrt(0.5), high > 0
    mass = torch.where(around, torch.erf(root * high) - torch.erf(root * low), 1.0)
    low, high = torch.where(around, -2.0, low), torch.where(around, -1.0, high)  # not used: 0 is in between
    log_low, log_high = (torch.special.erfcx(-root * x).log() for x in (low, high))
    log_ratio = (0.5 * (high - low) * (high + low) + log_low - log_high).clamp(max=-1e-7)
    tail = log_high - 0.5 * high.square() + torch.log(-torch.expm1(log_ratio))
    return torch.where(around, mass.log(), tail) - math.log(2)
