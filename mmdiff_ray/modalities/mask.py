"""Segmentation masks of K classes: binary codes per cell, one class distribution per cell as head."""

import colorsys
import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError, ModalityConfig
from mmdiff_ray.modalities.base import DenseHead, Mean, Modality, RowContext, class_codes, need_column
from mmdiff_ray.modalities.image import fitted, open_image, to_png
from mmdiff_ray.registry import register

VOID_COLOR = np.array((255, 0, 255), dtype=np.uint8)


@dataclass(frozen=True)
class MaskOptions(ModalityConfig):
    """The keys of a mask.

    column: Parquet column; null: the modality's name.
    classes: number of classes; null: the data set's.
    names: class names; null: the data set's.
    colors: one [red, green, blue] or null per class; null: the data set's.
    code_channels: channels of the code, at least log2 of the classes; null: as few as possible.
    void: value of pixels that are neither learned nor measured; null: the data set's.
    """

    column: str | None = None
    classes: int | None = None
    names: list[str] | None = None
    colors: list[Any] | None = None
    code_channels: int | None = None
    void: int | None = None


@register("modality", "mask")
class MaskModality(Modality):
    """Class masks. data: uint8 (B, H, W); code: (B, c, H, W) of +1 and -1; prediction: logits (B, K, H, W).

    Likelihood: categorical in every cell.
    """

    Options = MaskOptions
    likelihood = "categorical"
    usual_scale = Modality.scale_of_regions
    codes: Tensor

    def __init__(self, name: str, options: MaskOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        if not options.classes or not 2 <= options.classes <= 256:
            raise ConfigError(f"modalities.{name}.classes ({options.classes}) must be between 2 and 256")
        self.prediction_channels = options.classes
        if options.colors is not None and len(options.colors) != options.classes:
            raise ConfigError(
                f"modalities.{name}.colors: got {len(options.colors)}, want {options.classes}, one per class"
            )
        codes = class_codes(options.classes, options.code_channels, f"modalities.{name}.code_channels")
        self.code_channels = codes.shape[1]
        self.register_buffer("codes", codes)

    @classmethod
    def resolve(
        cls, name: str, options: MaskOptions, columns: Mapping[str, Mapping[str, Any]]
    ) -> MaskOptions:
        column = options.column or name
        entry = need_column(name, column, columns, ("mask",))
        if options.classes not in (None, entry["classes"]):
            raise ConfigError(
                f"modalities.{name}.classes ({options.classes}) differs from the data set's "
                f"{entry['classes']} classes in column {column!r}; leave it out to take the data set's"
            )
        return dataclasses.replace(
            options,
            column=column,
            classes=entry["classes"],
            names=options.names or entry.get("names"),
            colors=options.colors or entry.get("colors"),
            void=entry.get("void"),
        )

    @property
    def data_shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def data_type(self) -> type:
        return np.uint8

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        if row[self.column] is None:
            return None
        image = fitted(Image.open(io.BytesIO(row[self.column])), self.size)
        return self._fit(np.asarray(image), self.size)

    def augment(self, decoded: np.ndarray, context: RowContext) -> np.ndarray:
        return np.ascontiguousarray(decoded[:, ::-1]) if context.mirrored else decoded

    def _fit(self, array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return class indices (h, w) at the space's size.

        Every cell takes the class that most of its known pixels have, of equals the first; it is void where
        all of them are. Raises ValueError for what is no mask of these classes.
        """
        classes, void = self.prediction_channels, self.options.void
        largest = int(array[array != void].max(initial=0))
        if array.ndim != 2 or largest >= classes:
            raise ValueError(
                f"mask {self.name}: got shape {array.shape} with classes up to {largest}, "
                f"want (h, w) with classes below {classes}"
            )
        array = array.astype(np.uint8)
        if array.shape == size:
            return array
        times = [-(-pixels // cells) for pixels, cells in zip(array.shape, size, strict=True)]
        height, width = size[0] * times[0], size[1] * times[1]  # the next size that the cells divide
        array = np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST))
        cell = np.arange(size[0] * size[1]).reshape(size).repeat(times[0], 0).repeat(times[1], 1)
        known = array != void
        votes = np.bincount((cell * classes + array)[known], minlength=size[0] * size[1] * classes)
        votes = votes.reshape(*size, classes)
        fitted = votes.argmax(-1).astype(np.uint8)
        return fitted if void is None else np.where(votes.sum(-1) > 0, fitted, np.uint8(void))

    def void(self, data: Tensor) -> Tensor | None:
        return None if self.options.void is None else data == self.options.void

    def encode(self, data: Tensor) -> Tensor:
        if (void := self.void(data)) is None:
            return self.codes[data.long()].permute(0, 3, 1, 2)
        codes = self.codes[torch.where(void, 0, data).long()].permute(0, 3, 1, 2)
        return codes * ~void[:, None]  # (B, c, H, W): a void cell says nothing

    def from_code(self, code: Tensor) -> Tensor:
        return torch.einsum("bchw,kc->bkhw", code.float(), self.codes).argmax(1).to(torch.uint8)

    def make_head(self, feature_channels: int, pooled_channels: int) -> nn.Module:
        return DenseHead(feature_channels, self.prediction_channels)

    def expected_code(self, prediction: Tensor) -> Tensor:
        return torch.einsum("bkhw,kc->bchw", prediction.float().softmax(1), self.codes)

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(1).to(torch.uint8)

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        ignored = -100 if self.options.void is None else self.options.void
        nats = nn.functional.cross_entropy(
            prediction.float(), data.long(), reduction="none", ignore_index=ignored
        )
        return nats.sum((1, 2))

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        void = self.void(data)
        known = data.numel() if void is None else int((~void).sum())
        return {"cell_accuracy": Mean(float((answer == data).sum()), known)}

    def picture(self, data: Tensor) -> np.ndarray:
        classes = data.cpu().numpy()
        shown = self.palette[np.minimum(classes, self.prediction_channels - 1)]
        if self.options.void is None:
            return shown
        return np.where((classes == self.options.void)[..., None], VOID_COLOR, shown)

    @property
    def palette(self) -> np.ndarray:
        """Return one colour per class, uint8 (K, 3): the data set's where it names them."""
        colors = self.options.colors or [None] * self.prediction_channels
        plain = [(20, 20, 24), (245, 245, 245)] if self.prediction_channels == 2 else None
        return np.array(
            [c or (plain[i] if plain else _colour(i)) for i, c in enumerate(colors)], dtype=np.uint8
        )

    def entry(self) -> dict[str, Any]:
        known = {"names": self.options.names, "colors": self.options.colors, "void": self.options.void}
        given = {key: value for key, value in known.items() if value is not None}
        return {"kind": "mask", "classes": self.prediction_channels, **given}

    def stored(self, data: Tensor) -> bytes:
        return to_png(data.cpu().numpy())

    def parse(self, text: str) -> np.ndarray:
        """Return the mask in a picture of class indices; of two classes, in any picture: white is class 1."""
        picture = fitted(open_image(text, self.name, scale=False), self.size)
        if self.prediction_channels == 2 and picture.mode not in ("1", "L", "P"):
            picture = picture.convert("L")
        array = np.asarray(picture)
        if self.prediction_channels == 2 and array.max(initial=0) > 1:
            array = (array >= 128).astype(np.uint8)
        try:
            return self._fit(array, self.size)
        except ValueError as error:
            raise ConfigError(f"{text}: {error}") from None

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.png")
        image = Image.fromarray(data.cpu().numpy())
        image.putpalette(self.palette.flatten().tolist())
        image.save(path)
        return path


def _colour(index: int) -> tuple[int, int, int]:
    """Return a colour for a class without one: dark grey for class 0, then hues a golden angle apart."""
    if index == 0:
        return (40, 40, 46)
    red, green, blue = colorsys.hsv_to_rgb(
        index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), 0.95 - 0.2 * (index % 3)
    )
    return int(red * 255), int(green * 255), int(blue * 255)
