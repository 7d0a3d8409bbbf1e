"""Samples of a trained model as a data set: any number, by a pool of actors that each hold the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.base import Item, Made, Options, Pipeline
from mmdiff_ray.evaluation.gallery import parse_given
from mmdiff_ray.sampling.export import export_files, load_export
from mmdiff_ray.sampling.generator import Generator, sample


@dataclass(frozen=True)
class SamplesOptions(Options):
    """model: the export folder of a run, or its URI. num: how many samples. given: what all follow,
    INSTANCE=VALUE, and more of them after a semicolon. sampler: as the model's configuration says where not
    given. steps: as sampler. guidance: above 1 closer to what is given. seed: of the noise, with the number
    of the sample. likely: the most likely answer in place of samples; all rows are then alike.
    """

    model: str = ""
    num: int = 1000
    given: str = ""
    sampler: str | None = None
    steps: int | None = None
    guidance: float = 1.0
    seed: int = 0
    likely: bool = False
    val_share: float = 0.0


class SampleStage:
    """Draw the samples of a chunk: what is in them depends on their numbers alone."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options}  # every actor loads the model itself

    @cached_property
    def model(self) -> Generator:
        """Return the model, on a GPU where this actor has one."""
        return load_export(self.options.model, "cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def given(self) -> dict[str, np.ndarray]:
        """Return what every sample follows."""
        return parse_given(
            self.model, [part.strip() for part in self.options.given.split(";") if part.strip()]
        )

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return the entries of what is generated, and of what is given and has a column."""
        modalities = self.model.denoiser.modalities
        names = [name for name in modalities if name in self.model.generated or name in self.given]
        return {name: modalities[name].entry() for name in names if not modalities[name].only_given}

    def __call__(self, made: Made) -> Made:
        """Return the chunk with a column per modality."""
        numbers = np.array([row.pop("number") for row in made.rows])
        given = {name: np.repeat(value[None], len(numbers), axis=0) for name, value in self.given.items()}
        drawn = self.draw(given, numbers)
        model = self.model
        stored = {name: [model.modality(name).stored(row) for row in drawn[name]] for name in self.columns()}
        rows = [{**row, **{name: stored[name][i] for name in stored}} for i, row in enumerate(made.rows)]
        return Made(rows, made.bad)

    def draw(self, given: Mapping[str, np.ndarray], ids: np.ndarray) -> dict[str, Tensor]:
        """Return samples as the options say. given: instance -> (B, ...); ids: int64 (B,)."""
        model, settings, device = self.model, self.options, self.model.device
        return sample(
            model.denoiser,
            model.roles_for(list(given), len(ids)),
            {name: torch.from_numpy(value).to(device) for name, value in given.items()},
            ids=torch.from_numpy(ids).to(device),
            seed=settings.seed,
            steps=settings.steps or model.steps(settings.likely),
            sampler=settings.sampler or model.config.evaluate.sampler,
            guidance=settings.guidance,
            likely=settings.likely,
        ).data


def check_export(model: str) -> None:
    """Raise ConfigError where a folder or URI holds no exported model."""
    if export_files(model) is None:
        raise ConfigError(f"model: {model!r} holds no exported model; name a run's export folder")


@registry.register("pipeline", "samples")
class Samples(Pipeline):
    """Samples of a trained model."""

    Options = SamplesOptions

    def __init__(self, options: SamplesOptions) -> None:
        super().__init__(options)
        check_export(options.model)
        if options.num < 1:
            raise ConfigError(f"num ({options.num}) must be at least 1")
        self.stage = SampleStage(options)
        self.stage.given  # noqa: B018  # what cannot be given is told before anything starts

    @property
    def description(self) -> str:
        """Return what was sampled."""
        follows = f" given {self.options.given}" if self.options.given else ""
        return f"samples of {self.stage.model.config.name}{follows}, seed {self.options.seed}"

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return none: all columns are the stage's."""
        return {}

    def stages(self) -> list[SampleStage]:
        """Return the stage that holds the model."""
        return [self.stage]

    def items(self) -> list[Item]:
        """Return the numbers of the samples."""
        return [Item(f"{number:09d}", number) for number in range(self.options.num)]

    def row(self, item: Item) -> dict[str, Any]:
        """Return a sample's number, of which the stage makes a row."""
        return {"number": item.source}
