"""Embeddings: unit vectors of a frozen model. The code is their leading principal components, whitened."""

import dataclasses
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError, ModalityConfig, decoding
from mmdiff_ray.modalities.base import Mean, Modality, PooledHead, need_column
from mmdiff_ray.registry import register


@dataclass(frozen=True)
class EmbeddingOptions(ModalityConfig):
    """The keys of an embedding.

    column: Parquet column; null: the modality's name.
    dim: dimensions; null: the data set's.
    code_channels: number of principal components in the code.
    sigma: standard deviation of the likelihood, in units of the embedding's root mean square deviation
        per dimension.
    """

    column: str | None = None
    dim: int | None = None
    code_channels: int = 8
    sigma: float = 1.0


@register("modality", "embedding")
class EmbeddingModality(Modality):
    """Embeddings. data: float32 (B, D) of unit norm; code: (B, c, H, W), the same in every cell; prediction:
    the standardised embedding (B, D). Likelihood: Gaussian on the standardised embedding.

    The code is linear in the data, so that the expected code is the code of the expected embedding; it keeps
    c of D dimensions, the head recovers the rest.
    """

    Options = EmbeddingOptions
    likelihood = "Gaussian"
    usual_scale = Modality.scale_of_one_thing
    mean: Tensor
    scale: Tensor
    basis: Tensor

    def __init__(self, name: str, options: EmbeddingOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        if not options.dim or not 1 <= options.code_channels <= options.dim:
            raise ConfigError(
                f"modalities.{name}.code_channels ({options.code_channels}) must be between 1 and dim "
                f"({options.dim})"
            )
        if not options.sigma > 0:
            raise ConfigError(f"modalities.{name}.sigma ({options.sigma}) must be above 0")
        self.prediction_channels = options.dim
        self.code_channels = options.code_channels
        self.register_buffer("mean", torch.zeros(options.dim))
        self.register_buffer("scale", torch.tensor(1 / math.sqrt(options.dim)))
        self.register_buffer("basis", torch.eye(options.code_channels, options.dim))

    @classmethod
    def resolve(
        cls, name: str, options: EmbeddingOptions, columns: Mapping[str, Mapping[str, Any]]
    ) -> EmbeddingOptions:
        column = options.column or name
        try:
            entry = need_column(name, column, columns, ("embedding",))
        except ConfigError as error:
            raise ConfigError(f"{error}{_note_of_text(column, columns)}") from None
        if options.dim not in (None, entry["dim"]):
            raise ConfigError(
                f"modalities.{name}.dim ({options.dim}) differs from the data set's {entry['dim']} in column "
                f"{column!r}; leave it out to take the data set's"
            )
        return dataclasses.replace(options, column=column, dim=entry["dim"])

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (self.prediction_channels,)

    @property
    def data_type(self) -> type:
        return np.float32

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        if row[self.column] is None:
            return None
        vector = np.asarray(row[self.column], dtype=np.float32)
        norm = float(np.linalg.norm(vector))
        if vector.shape != self.data_shape or not math.isfinite(norm) or norm == 0:
            raise ValueError(
                f"embedding {self.name}: got shape {vector.shape}, norm {norm}, want {self.data_shape}"
            )
        return vector / norm

    def calibrate(self, data: Tensor) -> None:
        """Fix mean, scale and the whitened principal components from a sample of embeddings.

        Raises ConfigError if they vary in fewer directions than the code has channels.
        """
        vectors = data.double()
        self.mean.copy_(vectors.mean(0))
        centred = vectors - vectors.mean(0)
        self.scale.copy_(centred.square().mean().sqrt().clamp_min(1e-6))
        _, values, directions = torch.linalg.svd(centred / self.scale.double(), full_matrices=False)
        deviation = values / math.sqrt(len(vectors))
        directions, deviation = directions[: self.code_channels], deviation[: self.code_channels, None]
        varying = int((deviation > 1e-3).sum())
        if varying < self.code_channels:
            raise ConfigError(
                f"modalities.{self.name}.code_channels ({self.code_channels}): the {len(vectors)} embeddings "
                f"looked at vary in {varying} directions only; want at most {varying}"
            )
        signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()  # svd leaves them open
        self.basis.copy_(signs * directions / deviation)

    def standardise(self, data: Tensor) -> Tensor:
        """Return embeddings with mean 0 and root mean square 1 per dimension over the data set, (B, D)."""
        return (data - self.mean) / self.scale

    def encode(self, data: Tensor) -> Tensor:
        return self.expected_code(self.standardise(data))

    def from_code(self, code: Tensor) -> Tensor:
        return self.answer(code.float().mean((2, 3)) @ torch.linalg.pinv(self.basis).T)

    def make_head(self, feature_channels: int, pooled_channels: int) -> nn.Module:
        return PooledHead(pooled_channels, self.prediction_channels)

    def expected_code(self, prediction: Tensor) -> Tensor:
        return self.broadcast(prediction.float() @ self.basis.T)

    def answer(self, prediction: Tensor) -> Tensor:
        return nn.functional.normalize(prediction.float() * self.scale + self.mean, dim=1)

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        deviation = (prediction.float() - self.standardise(data)) / self.options.sigma
        constant = math.log(2 * math.pi * self.options.sigma**2)
        return 0.5 * (deviation.square() + constant).sum(1)

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        return {"cosine": Mean(float(nn.functional.cosine_similarity(answer, data).sum()), len(data))}

    def picture(self, data: Tensor) -> np.ndarray:
        """Return the leading components as tiles: orange above the data set's mean, blue below."""
        components = (self.standardise(data.float()) @ self.basis.T).cpu().numpy()
        side = math.ceil(math.sqrt(components.shape[1]))
        padded = np.zeros((len(components), side * side), dtype=np.float32)
        padded[:, : components.shape[1]] = np.clip(components / 2, -1, 1)
        strength = padded.reshape(-1, side, side, 1)
        target = np.where(strength > 0, np.array([222, 110, 40]), np.array([40, 90, 190]))
        return (245 + (target - 245) * np.abs(strength)).astype(np.uint8)

    def entry(self) -> dict[str, Any]:
        return {"kind": "embedding", "dim": self.prediction_channels}

    def stored(self, data: Tensor) -> np.ndarray:
        return data.float().cpu().numpy()

    def parse(self, text: str) -> np.ndarray:
        try:
            with (
                decoding()
            ):  # a map never takes more memory than the file has bytes, whatever its header says
                stored = np.load(text, mmap_mode="r", allow_pickle=False)
                if stored.dtype.kind not in "fiu":
                    raise ValueError(f"it holds {stored.dtype}")
                vector = stored.astype(np.float32).reshape(-1)
        except FileNotFoundError:
            raise ConfigError(
                f"{self.name}: no file {text!r}; an embedding is given as a .npy file of "
                f"{self.prediction_channels} numbers. This makes one of a text or a picture, with the "
                f"embedder that `mmdiff data inspect` names for {self.column}, such as minilm: "
                f"mmdiff data embed EMBEDDER {shlex.quote(text)} --out {self.name}.npy"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.name}: cannot read an embedding (.npy) from {text!r}: {error}"
            ) from None
        if vector.shape != self.data_shape or not 0 < np.linalg.norm(vector) < math.inf:
            raise ConfigError(
                f"{self.name}: {text} holds shape {vector.shape}, want {self.data_shape}, finite, not all 0"
            )
        return vector / np.linalg.norm(vector)

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.npy")
        np.save(path, data.cpu().numpy())
        return path


def _note_of_text(column: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how a text becomes an embedding, where a text was named or no column is an embedding yet."""
    texts = [other for other, entry in columns.items() if entry["kind"] == "text"]
    if not texts or (column not in texts and any(e["kind"] == "embedding" for e in columns.values())):
        return ""
    text = column if column in texts else texts[0]
    return (
        f". Model the text {text!r} with type: text, or by its embedding, a column that the build makes: "
        "`mmdiff data build folder` makes the column 'caption' with embed_captions=on"
    )
