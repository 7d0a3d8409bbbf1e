"""Parquet: files of rows with encoded pictures, as the Hugging Face Hub serves them."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.foreign import distinct, look_into, read_group
from mmdiff_ray.datasets.base import BadRow, Item
from mmdiff_ray.datasets.mapped import Field, Mapped, MappedOptions
from mmdiff_ray.storage.filesystem import is_uri, listed

SPLIT = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|test)(?=[/_.-])")
SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}


@registry.register("pipeline", "parquet")
class Parquet(Mapped):
    """Parquet files with pictures in bytes (or {bytes, path}), labels, texts and vectors.

    A file whose name or folder says train, validation or test belongs to that split.
    """

    def __init__(self, options: MappedOptions) -> None:
        super().__init__(options)
        self.files = [file for file in listed(options.source) if file.split("?")[0].endswith(".parquet")]
        if not self.files:
            raise ConfigError(f"source: {options.source} holds no .parquet file")
        first = look_into(self.files[0])
        self.choose_fields(first.kinds, _guessed(first.kinds, first.names), first.names)

    def values_of(self, field: Field) -> Iterable[Any]:
        if field.kind in ("label", "labels"):
            return set().union(*(distinct(file, field.name) for file in self.files))
        return (row[field.name] for row in read_group(self.files[0], 0, [field.name]))

    @property
    def description(self) -> str:
        return f"The rows of {len(self.files)} Parquet files."

    def items(self) -> list[Item]:
        items = []
        for number, file in enumerate(self.files):
            name = file.split("?")[0] if is_uri(file) else file
            found = SPLIT.search("/".join(name.split("/")[-2:]))
            split = SPLITS[found[1]] if found else None
            for group in range(len(look_into(file).groups)):
                items.append(Item(f"{number:05d}-{group:05d}", (file, group), None, split))
        return items

    def rows(self, item: Item) -> Iterator[dict[str, Any] | BadRow]:
        file, group = item.source
        wanted = list(dict.fromkeys(field.name for field in self.fields.values()))
        for values in read_group(file, group, wanted):
            pixels = values[self.fields["pixels"].name]
            yield self.converted(values, (isinstance(pixels, dict) and pixels.get("path")) or "")


def _guessed(kinds: dict[str, str], names: dict[str, list[str]]) -> dict[str, str]:
    """Return column -> field for the first picture, label and text of a file."""
    found = {}
    for column, kind, usual in (
        ("pixels", "image", ("image", "img", "pixels", "jpg", "png")),
        ("label", "number", (*names, "label", "labels", "class", "fine_label")),
        ("text", "text", ("text", "caption", "captions", "sentence", "sentences")),
    ):
        fitting = [name for name, one in kinds.items() if one in (kind, f"{kind}s")]
        usually = [name for name in usual if name in fitting]
        if usually or (column == "pixels" and fitting):
            found[column] = (usually or fitting)[0]
    return found
