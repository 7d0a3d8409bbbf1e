"""The tokens of texts: bytes, words, or those of a tokenizer's file."""

import base64
import difflib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mmdiff_ray.config import ConfigError

END = 0
"""The token that ends a text and fills it up."""
MOST_TOKENS = 8192
"""Tokens of a vocabulary: the head has a logit for each at every position."""


PACKED = "tokenizer:"
"""What a packed tokenizer.json begins with."""


class Tokens(Protocol):
    """A vocabulary. size: how many tokens it has, with END."""

    size: int

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without END."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens that are not END."""

    def check(self, text: str, name: str) -> None:
        """Raise ConfigError for a text with words that the vocabulary lacks."""


class Bytes:
    """The bytes of UTF-8, each plus one. Bytes that are no text are decoded as U+FFFD."""

    size = 257

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in text.encode("utf8", errors="replace")]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token - 1 for token in tokens).decode("utf8", errors="replace")

    def check(self, text: str, name: str) -> None:
        pass


class Words:
    """A list of words, separated by white space; the last token is any other word, shown as U+FFFD."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.index = {word: number for number, word in enumerate(words, start=1)}
        self.size = len(words) + 2

    def encode(self, text: str) -> list[int]:
        return [self.index.get(word, self.size - 1) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join([*self.words, "\ufffd"][token - 1] for token in tokens)

    def check(self, text: str, name: str) -> None:
        for word in text.split():
            if word not in self.index:
                near = difflib.get_close_matches(word, self.words, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.words[:20])}"
                raise ConfigError(f"{name}: no word {word!r}; {hint}")


class Subwords:
    """The tokens of a tokenizer, each plus one, without its special ones. packed: by `read_tokenizer`."""

    def __init__(self, packed: str) -> None:
        content = zlib.decompress(base64.b64decode(packed.removeprefix(PACKED)))
        self.tokenizer: Any = _library().Tokenizer.from_str(content.decode())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.size = self.tokenizer.get_vocab_size() + 1

    def encode(self, text: str) -> list[int]:
        return [token + 1 for token in self.tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode([token - 1 for token in tokens], skip_special_tokens=True)

    def check(self, text: str, name: str) -> None:
        pass


def tokens_of(kind: str, words: Sequence[str] | None, key: str) -> Tokens:
    """Return a vocabulary. kind: bytes, words, or a packed tokenizer. Raises ConfigError."""
    if kind == "bytes":
        return Bytes()
    if kind == "words":
        if not words or len(set(words)) < len(words) or any(len(word.split()) != 1 for word in words):
            raise ConfigError(f"{key}.words: want different words without spaces, got {words!r}")
        made: Tokens = Words(words)
    elif kind.startswith(PACKED):
        made = Subwords(kind)
    else:
        raise ConfigError(f"{key}.tokens: got {kind!r}, want bytes, words or the path of a tokenizer.json")
    if made.size > MOST_TOKENS:
        raise ConfigError(f"{key}: a vocabulary of {made.size:,} tokens; at most {MOST_TOKENS:,}")
    return made


def read_tokenizer(path: str, key: str) -> str:
    """Return the content of a tokenizer.json, packed into one word for a config; a packed one stays.

    Raises ConfigError, naming the key.
    """
    if path.startswith(PACKED):
        return path
    try:
        content = Path(path).read_text(encoding="utf8")
        _library().Tokenizer.from_str(content)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises no narrower one
        raise ConfigError(f"{key}: {path!r} is not bytes, words or a tokenizer.json: {error}") from None
    return PACKED + base64.b64encode(zlib.compress(content.encode(), 9)).decode()


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("a tokenizer.json needs tokenizers: pip install tokenizers") from None
    return tokenizers
