"""Sets of labels (attributes): each label is there or not, by an independent Bernoulli."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError, ModalityConfig
from mmdiff_ray.modalities.base import Mean, Modality, PooledHead, need_column
from mmdiff_ray.registry import register

NONE = "none"
"""What stands for the empty set."""


@dataclass(frozen=True)
class LabelsOptions(ModalityConfig):
    """The keys of labels.

    column: Parquet column; null: the modality's name.
    names: the labels' names, from the data set.
    pattern: constant: a channel per label; or noise: orthogonal random signs of all labels in
        `code_channels`.
    code_channels: channels of the code with pattern noise; null: 1.
    """

    column: str | None = None
    names: list[str] | None = None
    pattern: str = "constant"
    code_channels: int | None = None


@register("modality", "labels")
class LabelsModality(Modality):
    """Sets of K labels. data: uint8 (B, K), 1 = the row has the label; code: (B, c, H, W), the sum over
    labels of +1 or -1 times the label's pattern, of unit RMS; prediction: logits (B, K). Likelihood: K
    Bernoullis.
    """

    Options = LabelsOptions
    likelihood = "Bernoulli"
    patterns: Tensor

    def __init__(self, name: str, options: LabelsOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        if not options.names:
            raise ConfigError(f"modalities.{name}.names is empty; want the labels' names")
        if options.pattern not in ("constant", "noise"):
            raise ConfigError(f"modalities.{name}.pattern: got {options.pattern!r}, want constant or noise")
        self.prediction_channels = len(options.names)
        patterns = self._patterns()
        self.code_channels = patterns.shape[1]
        self.register_buffer("patterns", patterns)

    def _patterns(self) -> Tensor:
        """Return the labels' patterns, (K, c, 1, 1) or (K, c, H, W).

        They are orthogonal, and their sum, with any signs, has unit RMS.
        """
        count, channels = self.prediction_channels, self.options.code_channels
        if self.options.pattern == "constant":
            if channels not in (None, count):
                raise ConfigError(
                    f"modalities.{self.name}.code_channels ({channels}): pattern constant has one per label, "
                    f"{count}; leave it out or take pattern noise"
                )
            return torch.eye(count)[:, :, None, None]
        channels = 1 if channels is None else channels
        cells = channels * math.prod(self.size)
        if not 1 <= count <= cells:
            raise ConfigError(
                f"modalities.{self.name}.code_channels ({channels}) holds {cells} cells for {count} labels; "
                "want as many or more"
            )
        drawn = torch.randn(cells, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        orthogonal = torch.linalg.qr(drawn).Q.T * math.sqrt(cells / count)  # (K, cells)
        return orthogonal.float().reshape(count, channels, *self.size)

    @classmethod
    def resolve(
        cls, name: str, options: LabelsOptions, columns: Mapping[str, Mapping[str, Any]]
    ) -> LabelsOptions:
        column = options.column or name
        entry = need_column(name, column, columns, ("labels",))
        return dataclasses.replace(options, column=column, names=entry["names"])

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (self.prediction_channels,)

    @property
    def data_type(self) -> type:
        return np.uint8

    @property
    def usual_scale(self) -> float:
        """Return the scale at which each label says one thing, as loudly as an image says a pixel."""
        return self.scale_of_one_thing * math.sqrt(self.prediction_channels)

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        return None if row[self.column] is None else self._of(row[self.column])

    def _of(self, indices: list[int]) -> np.ndarray:
        data = np.zeros(self.data_shape, dtype=np.uint8)
        data[indices] = 1
        return data

    def encode(self, data: Tensor) -> Tensor:
        return self._combined(2 * data.float() - 1)

    def _combined(self, signs: Tensor) -> Tensor:
        code = torch.einsum("bk,kchw->bchw", signs, self.patterns)
        return code.expand(-1, -1, *self.size)

    def from_code(self, code: Tensor) -> Tensor:
        patterns = self.patterns.expand(-1, -1, *self.size)
        return (torch.einsum("bchw,kchw->bk", code.float(), patterns) > 0).to(torch.uint8)

    def make_head(self, feature_channels: int, pooled_channels: int) -> nn.Module:
        return PooledHead(pooled_channels, self.prediction_channels)

    def expected_code(self, prediction: Tensor) -> Tensor:
        return self._combined(2 * prediction.float().sigmoid() - 1)

    def answer(self, prediction: Tensor) -> Tensor:
        return (prediction > 0).to(torch.uint8)

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        nats = nn.functional.binary_cross_entropy_with_logits(
            prediction.float(), data.float(), reduction="none"
        )
        return nats.sum(1)

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        return {"label_accuracy": Mean(float((answer == data).sum()), data.numel())}

    def picture(self, data: Tensor) -> list[str]:
        names = self.options.names
        return [
            ", ".join(name for name, has in zip(names, row, strict=True) if has) or NONE
            for row in data.tolist()
        ]

    def entry(self) -> dict[str, Any]:
        return {"kind": "labels", "names": self.options.names}

    def stored(self, data: Tensor) -> list[int]:
        return data.nonzero().flatten().tolist()

    def parse(self, text: str) -> np.ndarray:
        """Return the set of names separated by commas; `none` is the empty set. Raises ConfigError."""
        names = self.options.names
        words = [text] if text in names else [word.strip() for word in text.split(",")]
        if text == NONE and NONE not in names:
            return self._of([])
        for word in words:
            if word not in names:
                near = difflib.get_close_matches(word, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names[:20])}"
                raise ConfigError(f"{self.name}: no label {word!r}; {hint} (separated by commas, or {NONE})")
        return self._of([names.index(word) for word in words])

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.txt")
        path.write_text(self.picture(data[None])[0] + "\n", encoding="utf8")
        return path
