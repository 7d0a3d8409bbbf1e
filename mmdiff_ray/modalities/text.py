"""Texts: a sequence of tokens, an analog-bit code per position, a categorical head per position."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiff_ray.config import ConfigError, ModalityConfig
from mmdiff_ray.modalities.base import Features, Mean, Modality, RowContext, class_codes, need_column
from mmdiff_ray.modalities.tokens import END, Tokens, read_tokenizer, tokens_of
from mmdiff_ray.registry import register

MOST_FAR_CODES = 4096
"""Up to so many tokens have codes that are chosen far apart; more have the bits of their numbers."""


@dataclass(frozen=True)
class TextOptions(ModalityConfig):
    """The keys of a text.

    column: Parquet column; null: the modality's name.
    length: most tokens of a text; what is longer is cut.
    tokens: bytes (of UTF-8), words, or the path of a tokenizer.json (of the tokenizers library), whose
        content the run keeps; null: words where the data set lists them, else bytes.
    words: the vocabulary of tokens: words; null: the data set's.
    context_channels: channels of the tokens that the network attends to where the text is given; 0: it sees
        the code alone.
    code_channels: channels of the code; null: as few as hold every position's bits.
    """

    column: str | None = None
    length: int = 64
    tokens: str | None = None
    words: list[str] | None = None
    context_channels: int = 64
    code_channels: int | None = None


@register("modality", "text")
class TextModality(Modality):
    """Texts of L tokens, of a vocabulary of V. data: int64 (B, L), filled up with END; prediction: logits
    (B, V, L). Likelihood: categorical, summed over all positions, so END is predicted as any token.

    code: (B, c, H, W). Each token has log2(V) bits of +1 and -1 or more ("analog bits": Chen et al., 2022).
    The numbers of the space, cell by cell and in a cell channel by channel, are cut into L runs, one per
    position in order, and each run repeats its token's bits to its end. So a position has neighbouring cells,
    and its head reads their features. At the usual scale, a token is as loud as an image's pixel.
    """

    Options = TextOptions
    likelihood = "categorical"
    codes: Tensor
    slots: Tensor
    cells: Tensor

    def __init__(self, name: str, options: TextOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        key = f"modalities.{name}"
        if options.length < 1 or options.context_channels < 0:
            raise ConfigError(
                f"{key}: length ({options.length}) must be at least 1, context_channels "
                f"({options.context_channels}) at least 0"
            )
        self.vocabulary: Tokens = tokens_of(options.tokens or "bytes", options.words, key)
        self.prediction_channels = tokens = self.vocabulary.size
        far = tokens <= MOST_FAR_CODES
        codes = class_codes(tokens) if far else number_bits(tokens)  # (V, bits)
        bits = codes.shape[1]
        least = math.ceil(options.length * bits / math.prod(size))
        self.code_channels = least if options.code_channels is None else options.code_channels
        if self.code_channels < least:
            raise ConfigError(
                f"{key}.code_channels ({self.code_channels}) cannot hold {options.length} tokens of {bits} "
                f"bits in {size[0]} x {size[1]} cells; at least {least}, or a smaller length"
            )
        total = self.code_channels * math.prod(size)
        at = torch.arange(total)
        position = at * options.length // total  # (S,), the position whose run holds a number of the space
        first = -(-position * total // options.length)
        cells = F.one_hot(position, options.length).float()  # (S, L)
        cells = cells.unflatten(0, (-1, self.code_channels)).sum(1)  # (H W, L)
        self.register_buffer("codes", codes)
        self.register_buffer("slots", position * bits + (at - first) % bits, persistent=False)
        self.register_buffer("cells", cells / cells.sum(0), persistent=False)
        self.encoder = None
        if options.context_channels:
            self.context_shape = (options.length, options.context_channels)
            self.encoder = TokenEncoder(tokens, options.length, options.context_channels)

    @classmethod
    def resolve(
        cls, name: str, options: TextOptions, columns: Mapping[str, Mapping[str, Any]]
    ) -> TextOptions:
        column = options.column or name
        words = options.words or need_column(name, column, columns, ("text",)).get("words")
        tokens = options.tokens or ("words" if words else "bytes")
        if tokens not in ("bytes", "words"):
            tokens = read_tokenizer(tokens, f"modalities.{name}.tokens")
        return dataclasses.replace(
            options, column=column, tokens=tokens, words=words if tokens == "words" else None
        )

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (self.options.length,)

    @property
    def data_type(self) -> type:
        return np.int64

    @property
    def usual_scale(self) -> float:
        return math.sqrt(self.options.length) * self.scale_of_one_thing

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        """Return all texts of a row, (n, L), or None where it has none."""
        value = row[self.column]
        texts = [value] if isinstance(value, str) else value
        texts = [] if texts is None else [text for text in texts if text is not None]
        return np.stack([self._of(text) for text in texts]) if texts else None

    def augment(self, decoded: np.ndarray, context: RowContext) -> np.ndarray:
        """Return one of a row's texts, drawn anew on every visit."""
        if len(decoded) == 1:
            return decoded[0]
        return decoded[context.generator(f"text {self.name}").integers(len(decoded))]

    def _of(self, text: str) -> np.ndarray:
        data = np.full(self.options.length, END, dtype=np.int64)
        found = self.vocabulary.encode(text)[: self.options.length]
        data[: len(found)] = found
        return data

    # The code.

    def _spread(self, bits: Tensor) -> Tensor:
        """Return every position's numbers (B, L, bits) in the space, (B, c, H, W)."""
        laid = bits.flatten(1)[:, self.slots]  # (B, H W c)
        return laid.unflatten(1, (*self.size, self.code_channels)).permute(0, 3, 1, 2)

    def encode(self, data: Tensor) -> Tensor:
        return self._spread(self.codes[data])

    def from_code(self, code: Tensor) -> Tensor:
        laid = code.float().permute(0, 2, 3, 1).flatten(1)  # (B, H W c)
        bits = laid.new_zeros(len(laid), self.options.length * self.codes.shape[1])
        bits = bits.index_add(1, self.slots, laid).unflatten(1, (self.options.length, -1))
        return (bits @ self.codes.T).argmax(2)

    def tokens(self, data: Tensor) -> Tensor:
        assert self.encoder is not None, "context_channels is 0"
        return self.encoder(data)

    # The head's side.

    def make_head(self, feature_channels: int, pooled_channels: int) -> nn.Module:
        return TextHead(feature_channels, pooled_channels, self.cells, self.prediction_channels)

    def expected_code(self, prediction: Tensor) -> Tensor:
        return self._spread(prediction.float().softmax(1).transpose(1, 2) @ self.codes)

    def answer(self, prediction: Tensor) -> Tensor:
        """Return the most likely token of each position; what follows the first END is END, too."""
        data = prediction.argmax(1)
        return data.masked_fill((data == END).cumsum(1) > 0, END)

    def negative_log_likelihood(self, prediction: Tensor, data: Tensor) -> Tensor:
        return F.cross_entropy(prediction.float(), data, reduction="none").sum(1)

    # What people see and type.

    def texts(self, data: Tensor) -> list[str]:
        """Return data as texts."""
        return [self.vocabulary.decode(row[: row.index(END)] if END in row else row) for row in data.tolist()]

    def metrics(self, answer: Tensor, data: Tensor) -> dict[str, Mean]:
        right, count = token_hits(answer, data)
        return {"token_accuracy": Mean(float(right.sum()), float(count.sum()))}

    def picture(self, data: Tensor) -> list[str]:
        return self.texts(data)

    def entry(self) -> dict[str, Any]:
        return {"kind": "text", **({"words": self.options.words} if self.options.words else {})}

    def stored(self, data: Tensor) -> str:
        return self.texts(data[None])[0]

    def parse(self, text: str) -> np.ndarray:
        """Return a text's tokens. Raises ConfigError for an empty one, and for unknown words."""
        if not text.strip():
            raise ConfigError(f"{self.name}: the text is empty; leave it out to have it generated")
        self.vocabulary.check(text, self.name)
        return self._of(text)

    def write(self, data: Tensor, stem: Path) -> Path:
        path = Path(f"{stem}.txt")
        path.write_text(self.stored(data) + "\n", encoding="utf8")
        return path


class TokenEncoder(nn.Module):
    """What the network attends to: embeddings of tokens and positions, mixed with their neighbours."""

    def __init__(self, tokens: int, length: int, channels: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, channels)
        self.position = nn.Parameter(0.5 * torch.randn(channels, length))
        self.mix = nn.ModuleList(nn.Conv1d(channels, channels, 5, padding=2) for _ in range(2))

    def forward(self, data: Tensor) -> Tensor:
        """Return the tokens of data (B, L), (B, L, channels)."""
        x = self.token(data).transpose(1, 2) + self.position  # (B, channels, L)
        for layer in self.mix:
            x = x + layer(F.silu(x))
        return x.transpose(1, 2)


class TextHead(nn.Module):
    """Logits of every position's token from the features of its cells, the pooled features and its
    neighbours.

    cells: (H W, L), the share of each cell in each position, adding up to 1 over cells. The linear bypass is
    as in `DenseHead`.
    """

    cells: Tensor

    def __init__(self, feature_channels: int, pooled_channels: int, cells: Tensor, tokens: int) -> None:
        super().__init__()
        width = 2 * pooled_channels
        self.register_buffer("cells", cells, persistent=False)
        self.norm = nn.GroupNorm(math.gcd(8, feature_channels), feature_channels)
        self.local = nn.Conv1d(feature_channels, width, 1)
        self.pooled = nn.Sequential(nn.LayerNorm(pooled_channels), nn.Linear(pooled_channels, width))
        self.position = nn.Parameter(0.5 * torch.randn(width, cells.shape[1]))
        self.mix = nn.Conv1d(width, width, 5, padding=2)
        self.out = nn.Conv1d(width, tokens, 1)
        self.bypass = nn.Conv1d(feature_channels, tokens, 1, bias=False)

    def forward(self, features: Features) -> Tensor:
        plain = features.map.flatten(2) @ self.cells.to(features.map.dtype)  # (B, F, L)
        shaped = F.silu(self.norm(features.map)).flatten(2) @ self.cells.to(features.map.dtype)
        x = self.local(shaped) + self.pooled(features.pooled)[:, :, None] + self.position  # (B, width, L)
        x = x + self.mix(F.silu(x))
        return self.out(F.silu(x)) + self.bypass(plain)  # (B, V, L)


def number_bits(tokens: int) -> Tensor:
    """Return the bits of the numbers below `tokens` as +1 and -1, (tokens, bits)."""
    bits = torch.arange(tokens)[:, None] >> torch.arange(max(1, math.ceil(math.log2(tokens)))) & 1
    return bits * 2.0 - 1.0


def token_hits(answer: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tokens of each text are right, and how many there are, (B,): the longer of the two
    counts, with its END, so that padding earns nothing. answer, data: (B, L)."""
    real = (answer != END) | (data != END)
    real = real | F.pad(real[:, :-1], (1, 0), value=True)  # the END behind the longer one
    return ((answer == data) & real).sum(1), real.sum(1)
