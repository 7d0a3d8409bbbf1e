"""Class labels: one code per class over all cells, a class distribution from pooled features as head."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError, ModalityConfig
from mmdiff_ray.modalities.base import Mean, Modality, PooledHead, class_codes, need_column
from mmdiff_ray.registry import register


@dataclass(frozen=True)
class LabelOptions(ModalityConfig):
    """The keys of a label.

    column: Parquet column; null: the modality's name.
    classes: number of classes; null: the data set's.
    names: class names, from the data set.
    code: fixed, or learned: starts from the fixed code; each class keeps unit RMS.
    pattern: constant over the cells, or noise: each class has its own random signs, which stay distinct
        from an image if channels overlap.
    code_channels: channels of the code; null: log2 of the classes, or 1 with pattern noise.
    """

    column: str | None = None
    classes: int | None = None
    names: list[str] | None = None
    code: str = "fixed"
    pattern: str = "constant"
    code_channels: int | None = None


@register("modality", "label")
class LabelModality(Modality):
    """Labels. data: int64 (B,); code: (B, c, H, W); prediction: logits (B, K). Likelihood: categorical."""

    Options = LabelOptions
    likelihood = "categorical"
    usual_scale = Modality.scale_of_one_thing
    table: Tensor

    def __init__(self, name: str, options: LabelOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        if not options.classes or options.classes < 2:
            raise ConfigError(f"modalities.{name}.classes ({options.classes}) must be at least 2")
        if options.code not in ("fixed", "learned") or options.pattern not in ("constant", "noise"):
            raise ConfigError(
                f"modalities.{name}: code is fixed or learned, got {options.code!r}; "
                f"pattern is constant or noise, got {options.pattern!r}"
            )
        if options.pattern == "noise" and options.code_channels is not None and options.code_channels < 1:
            raise ConfigError(f"modalities.{name}.code_channels ({options.code_channels}) must be at least 1")
        self.prediction_channels = options.classes
        table = self._first_codes()
        self.code_channels = table.shape[1]
        if options.code == "learned":
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def _first_codes(self) -> Tensor:
        """Return the classes' codes of +1 and -1, (K, c, 1, 1) or (K, c, H, W)."""
        classes, channels = self.options.classes, self.options.code_channels
        if self.options.pattern == "constant":
            key = f"modalities.{self.name}.code_channels"
            return class_codes(classes, channels, key)[:, :, None, None]
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 2, (classes, channels or 1, *self.size), generator=generator) * 2.0 - 1.0

    @property
    def codes(self) -> Tensor:
        """Return the classes' codes, each of unit RMS, (K, c, H, W)."""
        table = self.table / self.table.square().mean((1, 2, 3), keepdim=True).sqrt()
        return table.expand(-1, -1, *self.size)

    @classmethod
    def resolve(
        cls, name: str, options: LabelOptions, columns: Mapping[str, Mapping[str, Any]]
    ) -> LabelOptions:
        column = options.column or name
        entry = need_column(name, column, columns, ("label",))
        if options.classes not in (None, len(entry["names"])):
            raise ConfigError(
                f"modalities.{name}.classes ({options.classes}) differs from the data set's "
                f"{len(entry['names'])} labels in column {column!r}; leave it out to take the data set's"
            )
        return dataclasses.replace(
            options, column=column, classes=len(entry["names"]), names=list(entry["names"])
        )

    @property
    def data_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def data_type(self) -> type:
        return np.int64

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        value = row[self.column]
        if value is None:
            return None
        if not 0 <= value < self.prediction_channels:
            raise ValueError(
                f"label {self.name}: got class {value}, want 0 to {self.prediction_channels - 1}"
            )
        return np.asarray(value, dtype=np.int64)

    def encode(self, data: Tensor) -> Tensor:
        return self.codes[data]

    def from_code(self, code: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", code.float(), self.codes).argmax(1)

    def make_head(self, feature_channels: int, pooled_channels: int) -> nn.Module:
        return PooledHead(pooled_channels, self.prediction_channels)

    def expected_code(self, prediction: Tensor) -> Tensor:
        return torch.einsum("bk,kchw->bchw", prediction.float().softmax(1), self.codes)

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(1)

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        return nn.functional.cross_entropy(prediction.float(), data, reduction="none")

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        return {"accuracy": Mean(float((answer == data).sum()), len(data))}

    def names_of(self, data: Tensor) -> list[str]:
        """Return the class names of data."""
        names = self.options.names or [str(i) for i in range(self.prediction_channels)]
        return [names[int(index)] for index in data]

    def picture(self, data: Tensor) -> list[str]:
        return self.names_of(data)

    def entry(self) -> dict[str, Any]:
        numbered = [str(index) for index in range(self.prediction_channels)]
        return {"kind": "label", "names": self.options.names or numbered}

    def stored(self, data: Tensor) -> int:
        return int(data)

    def parse(self, text: str) -> np.ndarray:
        names = self.options.names or []
        numbered = bool(names) and all(map(str.isdecimal, names))  # so an index is no name
        if text in names:
            return np.asarray(names.index(text), dtype=np.int64)
        if text.isdecimal() and int(text) < self.prediction_channels and not numbered:
            return np.asarray(int(text), dtype=np.int64)
        near = difflib.get_close_matches(text, names, n=1)
        near = [name for name in names if text.isdecimal() and int(name) == int(text)] if numbered else near
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names[:20])}"
        by_index = "" if numbered else f" (or its index, 0 to {self.prediction_channels - 1})"
        raise ConfigError(f"{self.name}: no label {text!r}; {hint}{by_index}")

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.txt")
        path.write_text(self.names_of(data.reshape(1))[0] + "\n", encoding="utf8")
        return path
