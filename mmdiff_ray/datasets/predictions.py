"""The rows of a data set, completed by a trained model: pseudo-labels."""

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.config.checks import one_of
from mmdiff_ray.data.manifest import SPLITS, Manifest, read_manifest
from mmdiff_ray.data.parquet import read_row_group
from mmdiff_ray.data.reader import in_reading_order
from mmdiff_ray.data.shards import row_id
from mmdiff_ray.datasets.base import Item, Made, Options, Streamed
from mmdiff_ray.datasets.samples import SampleStage, check_export
from mmdiff_ray.modalities.base import Modality, RowContext
from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.sampling.export import weights_digest

SAME = ("kind", "names", "classes", "dim", "channels", "range", "content")
"""What a column and a prediction for it must have in common."""
STATISTICS = ("present", "counts", "train_counts", "pixel_share", "mean_norm", "known_share")
"""What a manifest says of a column that depends on its rows."""


@dataclass(frozen=True)
class PredictionsOptions(Options):
    """model: the export folder of a run, or its URI. rows: the data set to complete. given: the instances
    that the model is given of each row, separated by commas. splits: whose rows are completed; predictions in
    val or test would be judged as if they were true. sampler: as the model's configuration says where
    not given. steps: as sampler. guidance: above 1 closer to what is given. seed: of the noise. likely: the
    most likely answer in place of samples.
    """

    model: str = ""
    rows: str = ""
    given: str = ""
    splits: str = "train"
    sampler: str | None = None
    steps: int | None = None
    guidance: float = 1.0
    seed: int = 0
    likely: bool = True

    @property
    def names(self) -> list[str]:
        """Return the given instances."""
        return [name.strip() for name in self.given.split(",") if name.strip()]


class PredictionStage(SampleStage):
    """Fill the columns that rows lack with what the model generates from the given instances of the row."""

    options: PredictionsOptions

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return the entries of the columns that are new."""
        found = {one.column: one.entry() for one in self.predicted.values()}
        return {name: entry for name, entry in found.items() if name not in self.manifest.columns}

    @cached_property
    def predicted(self) -> dict[str, Modality]:
        """Return the instances that are generated and whose column rows lack."""
        return {
            name: modality
            for name, modality in self.model.denoiser.modalities.items()
            if name in self.model.generated - set(self.options.names)
            and not modality.only_given
            and self._lacks(modality.column)
        }

    def _lacks(self, column: str) -> bool:
        rows = sum(split.rows for split in self.manifest.splits.values())
        return self.manifest.columns.get(column, {}).get("present", 0) < rows

    def check(self) -> None:
        """Raise ConfigError if a column of the rows holds something else than the model predicts."""
        for name, modality in self.predicted.items():
            entry, held = modality.entry(), self.manifest.columns.get(modality.column, {})
            for fact in SAME:
                if fact in entry and fact in held and entry[fact] != held[fact]:
                    raise ConfigError(
                        f"column {modality.column!r} of {self.options.rows} has another {fact} "
                        f"({_short(held[fact])}) than {name} of the model ({_short(entry[fact])})"
                    )

    def __call__(self, made: Made) -> Made:
        """Return the chunk with its empty columns filled; a row that lacks a given instance is unchanged."""
        rows, known, given = [dict(row) for row in made.rows], [], []
        for row in rows:
            number = row.pop("number")
            data = {} if number is None else self._given(row, number)
            if all(name in data for name in self.options.names):
                known.append(row)
                given.append(data)
        if known:
            stacked = {name: np.stack([data[name] for data in given]) for name in self.options.names}
            drawn = self.draw(stacked, np.array([row_id(row["key"]) for row in known]))
            for name, modality in self.predicted.items():
                for row, value in zip(known, drawn[name], strict=True):
                    if row.get(modality.column) is None:
                        row[modality.column] = self._sized(modality.column, modality.stored(value))
        return Made(rows, made.bad)

    def _sized(self, column: str, value: Any) -> Any:
        """Return a picture or mask in the size that the column has."""
        entry = self.manifest.columns.get(column, {})
        if entry.get("kind") not in ("image", "mask") or "size" not in entry:
            return value
        picture, (height, width) = Image.open(io.BytesIO(value)), entry["size"]
        if picture.size == (width, height):
            return value
        way = Image.Resampling.NEAREST if entry["kind"] == "mask" else Image.Resampling.BICUBIC
        return to_png(picture.resize((width, height), way))

    @cached_property
    def manifest(self) -> Manifest:
        """Return the manifest of the rows."""
        return read_manifest(self.options.rows)

    def _given(self, row: Mapping[str, Any], number: int) -> dict[str, np.ndarray]:
        """Return the data of a row, read as in training, but never mirrored."""
        model = self.model
        done: dict[str, np.ndarray] = {}
        context = RowContext(
            model.denoiser.size, model.config.seed, 0, number, model.config.data.backgrounds, flip=False
        )
        for name, modality in in_reading_order(dict(model.denoiser.modalities.items())).items():
            if (value := modality.read(defaultdict(lambda: None, row), context, done)) is not None:
                done[name] = np.asarray(value)
        return done


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


@registry.register("pipeline", "predictions")
class Predictions(Streamed):
    """The rows of a data set, with a model's predictions in the columns that they lack."""

    Options = PredictionsOptions

    def __init__(self, options: PredictionsOptions) -> None:
        super().__init__(options)
        check_export(options.model)
        if not options.rows or not options.names:
            raise ConfigError("predictions need rows=DATA_SET and given=INSTANCE, as given=pixels")
        self.splits = [name.strip() for name in options.splits.split(",")]
        for name in self.splits:
            one_of("splits", name, list(SPLITS))
        self.stage = PredictionStage(options)
        self.manifest = self.stage.manifest
        for name in options.names:
            modality = self.stage.model.modality(name)
            if not modality.only_given and modality.column not in self.manifest.columns:
                raise ConfigError(
                    f"given: {options.rows} has no column {modality.column!r} for {name}; it has: "
                    f"{', '.join(self.manifest.columns)}"
                )

        self.stage.check()

    @property
    def description(self) -> str:
        """Return what was completed."""
        model = f"{self.stage.model.config.name} (weights {weights_digest(self.options.model)})"
        return f"{self.manifest.description} Completed by {model}, given {self.options.given}."

    @property
    def credit(self) -> str:  # type: ignore[override]
        """Return the credit of the rows."""
        return self.manifest.credit

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return the columns of the rows."""
        return {
            name: {fact: value for fact, value in entry.items() if fact not in STATISTICS}
            for name, entry in self.manifest.columns.items()
        }

    def stages(self) -> list[PredictionStage]:
        """Return the stage that holds the model."""
        return [self.stage]

    def items(self) -> list[Item]:
        """Return the row groups of all splits."""
        return [
            Item(f"{shard.path}:{group}", shard.row_group(group), split=name)
            for name, split in self.manifest.splits.items()
            for shard in split.shards
            for group in range(len(shard.row_groups))
        ]

    def rows(self, item: Item) -> Iterator[dict[str, Any]]:
        """Yield the rows of a row group."""
        columns = read_row_group(self.options.rows, item.source, list(self.manifest.columns))
        completed, names = item.split in self.splits, list(columns)[1:]
        for number, *values in zip(*columns.values(), strict=True):
            yield {"number": number if completed else None, **dict(zip(names, values, strict=True))}
