"""WebDataset: tar files of samples, each a group of files with one stem; img2dataset writes them."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError, decoding
from mmdiff_ray.datasets.base import BadRow, Item
from mmdiff_ray.datasets.mapped import Field, Mapped, MappedOptions
from mmdiff_ray.storage.filesystem import filesystem, listed

PICTURES = ("jpg", "jpeg", "png", "webp")
KEY = "__key__"
LOOKED_AT = 16
"""Samples of the first file by which fields are guessed."""


@registry.register("pipeline", "webdataset")
class WebDataset(Mapped):
    """Tar files in WebDataset's layout, read from their beginning to their end.

    Fields are the files' suffixes (jpg, cls, txt, npy, seg.png), and json.KEY for a value in a JSON file.
    """

    def __init__(self, options: MappedOptions) -> None:
        super().__init__(options)
        names = [file for file in listed(options.source) if ".tar" in file.rpartition("/")[2]]
        if not names:
            raise ConfigError(f"source: {options.source} holds no .tar file")
        self.files = names
        known = {
            name: _kind(name, value)
            for sample in islice(self._samples(names[0]), LOOKED_AT)
            for name, value in sample.items()
        }
        if not known:
            raise ConfigError(f"source: {names[0]} holds no sample")
        self.choose_fields(known, _guessed(known), {})

    def values_of(self, field: Field) -> Iterable[Any]:
        return (one.get(field.name) for file in self.files for one in self._samples(file))

    @property
    def description(self) -> str:
        return f"The samples of {len(self.files)} tar files."

    def items(self) -> list[Item]:
        return [Item(f"{number:05d}", file) for number, file in enumerate(self.files)]

    def rows(self, item: Item) -> Iterator[dict[str, Any] | BadRow]:
        for sample in self._samples(item.source):
            yield self.converted(sample, f"{sample[KEY]}.{self.fields['pixels'].name}")

    def _samples(self, uri: str) -> Iterator[dict[str, Any]]:
        """Yield the samples of a tar file, field -> value, in its order; KEY -> its name."""
        stem, sample = None, dict[str, Any]()
        fs, path = filesystem(uri)
        try:
            if path.endswith(".tar") and fs.get_file_info(path).size % tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it is cut short")  # which tarfile itself takes for the end
            with fs.open_input_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    first, _, suffix = name.partition(".")
                    if not member.isfile() or not suffix or name.startswith("."):
                        continue
                    if stem != (folder, first):
                        if sample:
                            yield sample
                        stem, sample = (folder, first), {KEY: f"{folder}/{first}".lstrip("/")}
                    file = archive.extractfile(member)
                    data = file.read() if file else b""
                    if len(data) != member.size:
                        raise tarfile.ReadError(f"it ends within {member.name}")
                    sample |= _decoded(suffix.lower(), data)
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"source: cannot read {uri}: {error}") from None
        if sample:
            yield sample


def _decoded(suffix: str, data: bytes) -> dict[str, Any]:
    """Return the fields of a file in a sample."""
    ending = suffix.rpartition(".")[2]
    try:
        with decoding():
            if ending in ("cls", "id", "index"):
                text = data.decode().strip()
                return {suffix: int(text) if text.lstrip("-").isdecimal() else text}
            if ending in ("txt", "text", "caption"):
                return {suffix: data.decode(errors="replace").strip()}
            if ending == "json":
                values = json.loads(data)
                fields = values.items() if isinstance(values, dict) else ()
                return {f"{suffix}.{key}": value for key, value in fields}
            if ending == "npy":
                return {suffix: np.load(io.BytesIO(data), allow_pickle=False)}
    except (OSError, ValueError):
        return {}
    return {suffix: data}


def _kind(field: str, value: Any) -> str:
    ending = field.rpartition(".")[2]
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return "texts"
    if ending in PICTURES:
        return "mask" if "." in field else "image"
    more = {**dict.fromkeys(("txt", "text", "caption"), "text"), "wav": "audio", "flac": "audio"}
    return {"cls": "label", "npy": "embedding", **more}.get(ending, "")


def _guessed(known: dict[str, str]) -> dict[str, str]:
    """Return column -> field for the first picture, label and text of a sample."""
    found = {}
    for column, kind in (("pixels", "image"), ("label", "label"), ("text", "text")):
        fitting = [field for field, one in known.items() if one == kind and not field.startswith("json.")]
        usual = ("json.caption", "json.text", "json.captions", "json.texts")
        spare = [field for field in usual if column == "text" and field in known]
        if fitting or spare:
            found[column] = (fitting or spare)[0]
    return found
