"""The shared state of evaluators: model, held-out rows, and samples, which are drawn only once."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN
from mmdiff_ray.evaluation.requests import CHUNK, SampleFn, SampleRequest, sample_locally
from mmdiff_ray.evaluation.statistics import Tally
from mmdiff_ray.modalities.base import Modality
from mmdiff_ray.models.denoiser import Denoiser
from mmdiff_ray.sampling.generator import Generator, Known, Samples, join

PAIRED = {"sample": "", "likely": "_likely"}
"""Read-out -> suffix of its figures' keys, for the read-outs that are compared with the true row."""
AGAIN = 1_000_003
"""Seed offset of the second sample of a row."""


@dataclass(frozen=True)
class Figure:
    """One metric of one instance.

    key: `instance/metric`; better: "higher" or "lower"; rows: number of distinct rows; floors: trivial rule
    -> its value on the same rows; bound: whether it is a term of the bound, in nats per element. tallies:
    "model" or rule -> sums over rows, from which intervals are computed; empty for metrics that are not sums
    over rows.
    """

    key: str
    value: float
    better: str
    rows: int
    floors: Mapping[str, float] = field(default_factory=dict)
    bound: bool = False
    tallies: Mapping[str, Tally] = field(default_factory=dict, compare=False)

    @property
    def best_rule(self) -> tuple[str, float] | None:
        """The best rule without a model and its value, or None."""
        pick = max if self.better == "higher" else min
        return pick(self.floors.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True)
class Findings:
    """The figures of an evaluator, its pictures by name, and sounds as .wav files by name."""

    figures: list[Figure] = field(default_factory=list)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    sounds: dict[str, bytes] = field(default_factory=dict)

    def add(
        self, key: str, better: str, tallies: Mapping[str, Tally], ids: np.ndarray, bound: bool = False
    ) -> None:
        """Add a figure from the tallies of "model" and rules. ids: of the rows, (n,)."""
        tallies = {rule: replace(tally, ids=ids) for rule, tally in tallies.items()}
        values = {rule: tally.value for rule, tally in tallies.items()}
        value = values.pop("model")
        self.figures.append(Figure(key, value, better, len(np.unique(ids)), values, bound, tallies))


class Context:
    """A model and the held-out rows it is evaluated on.

    batch: all rows, on the model's device. columns: the data set's manifest entries. sample_fn: how samples
    are drawn; by default in this process. training: returns the first so many training
    rows, on the CPU.
    """

    def __init__(
        self,
        model: Generator,
        batch: Batch,
        columns: Mapping[str, Mapping] | None = None,
        sample_fn: SampleFn | None = None,
        training: Callable[[int], Batch] | None = None,
    ) -> None:
        self.training = training
        self.model = model
        self.batch = batch
        self.columns = columns or {}
        self.sample_fn = sample_fn or sample_locally(model)
        self._samples: dict[tuple[str, tuple[str, ...]], Samples] = {}

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def denoiser(self) -> Denoiser:
        return self.model.denoiser

    @property
    def anchor(self) -> str:
        return self.denoiser.anchor

    @property
    def condition(self) -> list[str]:
        """The given instances of predictions: `evaluate.condition`, by default the anchor."""
        return list(self.config.evaluate.condition) or [self.anchor]

    def instances(self, kind: type[Modality]) -> dict[str, Any]:
        """Return the instances of a type, by name."""
        return {name: m for name, m in self.denoiser.modalities.items() if isinstance(m, kind)}

    def trained(self, name: str, *given: str) -> bool:
        """Return whether a task generates an instance with at least these instances given."""
        return any(
            task.can_be(name, "generated") and all(task.can_be(other, "given") for other in given)
            for task in self.config.tasks.values()
            if task.frequency > 0
        )

    def predicted(self, kind: type[Modality]) -> Iterator[tuple[str, Any, np.ndarray]]:
        """Yield (name, modality, rows) of the instances that a task generates from the condition.

        rows: bool (B,), the rows that have the instance and the condition; instances without any are skipped.
        """
        for name, modality in self.instances(kind).items():
            rows = self.rows_with(name, *self.condition)
            if name not in self.condition and self.trained(name, *self.condition) and rows.any():
                yield name, modality, rows

    def rows_with(self, *names: str) -> np.ndarray:
        """Return which rows have all of these instances, bool (B,); padding rows do not."""
        has = self.batch.real.clone()
        for name in names:
            has &= self.batch.present[name]
        return has.cpu().numpy()

    def ids(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the ids of some rows, int64 (n,)."""
        return self.batch.ids.cpu().numpy()[rows]

    def truth(self, name: str, rows: np.ndarray | slice = slice(None)) -> Tensor:
        """Return the data of an instance in some rows, on the CPU."""
        return self.batch.data[name].cpu()[rows]

    def prediction(self, name: str, rows: np.ndarray, readout: str = "sample") -> np.ndarray:
        """Return an instance, sampled from the condition, in some rows. rows: bool (B,)."""
        return self.sampled(*self.condition, readout=readout).data[name][torch.from_numpy(rows)].numpy()

    def sampled(self, *given: str, readout: str = "sample") -> Samples:
        """Sample every row with these instances given; cached.

        readout: "sample", "again" (a second sample) or "likely" (the most likely data).
        """
        if (readout, given) not in self._samples:
            name = f"given {' '.join(given)}" if given else "from noise"
            requests = self.requests(
                {instance: self.batch.data[instance] for instance in given},
                seed=self.config.seed + (AGAIN if readout == "again" else 0),
                steps=self.model.steps(readout == "likely"),
                guidance=self.config.evaluate.guidance,
                likely=readout == "likely",
            )
            name += "" if readout == "sample" else f" {readout}"
            self._samples[readout, given] = self.sample(name, requests)
        return self._samples[readout, given]

    def sample(self, name: str, requests: list[SampleRequest]) -> Samples:
        """Return the samples of consecutive requests as one. name: the key of the cache on disk."""
        return join(list(self.sample_fn(name, requests)))

    def requests(
        self, given: Mapping[str, Tensor], known: Known | None = None, **settings: Any
    ) -> list[SampleRequest]:
        """Return one request per chunk of rows, for everything that a task generates from `given`.

        given: instance -> (B, ...). settings: fields of `SampleRequest` that override the configuration.
        """
        evaluate = self.config.evaluate
        settings = {
            "seed": self.config.seed, "steps": evaluate.steps, "sampler": evaluate.sampler, **settings
        }  # fmt: skip
        roles, found = self.roles(*given), []
        for start, part in self.parts():
            chunk = slice(start, start + len(part))
            chunk_known = known and replace(known, data=known.data[chunk], visible=known.visible[chunk])
            data = {name: value[chunk] for name, value in given.items()}
            found.append(SampleRequest(start, len(part), roles, data, known=chunk_known, **settings))
        return found

    def roles(self, *given: str) -> dict[str, int]:
        """Return roles that generate everything that a task can generate from the given instances."""
        return {
            name: GIVEN if name in given else GENERATED if self.trained(name, *given) else ABSENT
            for name in self.denoiser.modalities
        }

    def parts(self) -> Iterator[tuple[int, Batch]]:
        """Yield (number of the first row, rows) for each chunk of rows."""
        for start in range(0, len(self.batch), CHUNK):
            yield start, self.batch.rows(start, start + CHUNK)

    def restored(self, name: str, readout: str = "sample") -> Tensor | None:
        """Restore the source of a masked image `name` in every row, with the method of `evaluate.inpaint`.

        None if no task trains this. "repaint" and "both" support only the anchor and the read-out "sample".
        With "given", visible pixels are also predicted by the model.
        """
        settings, masked = self.config.evaluate, self.denoiser.modalities[name]
        source = masked.made_from
        assert source is not None, f"{name} is not made from another instance"
        given = [] if settings.inpaint == "repaint" else [name]
        if not self.trained(source, *given):
            return None
        if settings.inpaint == "given":
            return self.sampled(name, readout=readout).data[source]
        if source != self.anchor or readout != "sample":
            return None
        data = self.batch.data[name]
        visible, channels = masked.visible(data), self.denoiser.modalities[source].data_shape[0]
        assert visible is not None, f"{name} has no visible part"
        requests = self.requests(
            {instance: self.batch.data[instance] for instance in given},
            Known(data[:, :channels], visible, settings.repeats),
            guidance=settings.guidance,
        )
        return self.sample(f"around {name}", requests).data[source]
