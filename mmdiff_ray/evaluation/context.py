"""What evaluators share: the model, held-out rows, and samples that are drawn once however many look at
them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN
from mmdiff_ray.evaluation.draws import CHUNK, Ask, Drawer, draw_here
from mmdiff_ray.evaluation.grids import Panel
from mmdiff_ray.evaluation.statistics import Tally
from mmdiff_ray.evaluation.tiles import text_tile
from mmdiff_ray.modalities.base import Modality
from mmdiff_ray.models.denoiser import Denoiser
from mmdiff_ray.sampling.generator import Generator, Known, Samples, join

PAIRED = {"sample": "", "likely": "_likely"}
"""Readouts that are compared with the truth of a row, and what the names of their figures end with."""
AGAIN = 1_000_003
"""What the seed of another sample of the same row is larger by."""


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    key: `instance/metric`; better: "higher" or "lower"; rows: how many it was measured on; floors: trivial
    rule -> what it reaches on the same rows; bound: whether it is a term of the bound, in nats per element.
    tallies: "model" and rules -> the same in parts that add up over rows, for what can be tallied: how sure
    it is, is computed from these.
    """

    key: str
    value: float
    better: str
    rows: int
    floors: Mapping[str, float] = field(default_factory=dict)
    bound: bool = False
    tallies: Mapping[str, Tally] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls, key: str, better: str, tallies: Mapping[str, Tally], ids: np.ndarray, bound: bool = False
    ) -> "Figure":
        """Return the figure of tallies: "model", and those of rules on the same rows. ids: of the rows."""
        tallies = {rule: replace(tally, ids=ids) for rule, tally in tallies.items()}
        floors = {rule: tally.value for rule, tally in tallies.items() if rule != "model"}
        model = tallies["model"]
        return cls(key, model.value, better, len(np.unique(ids)), floors, bound, tallies)


@dataclass(frozen=True)
class Findings:
    """What an evaluator found: figures, and pictures by name."""

    figures: list[Figure] = field(default_factory=list)
    pictures: dict[str, Image.Image] = field(default_factory=dict)


class Context:
    """Held-out rows and a model. batch: all rows that are evaluated, on the model's device.

    drawer: who samples; the model here where None.
    """

    def __init__(
        self,
        model: Generator,
        batch: Batch,
        columns: Mapping[str, Mapping] | None = None,
        drawer: Drawer | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        self.drawer = drawer or draw_here(model)
        self.columns = columns or {}
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
    def generated(self) -> set[str]:
        """Return the instances that some task generates, and so can be asked for."""
        return self.model.generated

    def instances(self, kind: type[Modality]) -> dict[str, Modality]:
        """Return the instances of a type, by name."""
        return {name: m for name, m in self.denoiser.modalities.items() if isinstance(m, kind)}

    def trained(self, name: str, *given: str) -> bool:
        """Return whether some task generates an instance from at least what is given."""
        return any(
            task.can_be(name, "generated") and all(task.can_be(other, "given") for other in given)
            for task in self.config.tasks.values()
            if task.frequency > 0
        )

    def asked(self, kind: type[Modality]) -> dict[str, Any]:
        """Return the instances of a type that some task generates from the condition, by name."""
        return {
            name: modality
            for name, modality in self.instances(kind).items()
            if name not in self.condition and self.trained(name, *self.condition)
        }

    @property
    def condition(self) -> list[str]:
        """Return the instances that answers are asked from: `evaluate.condition`, or else the anchor."""
        return list(self.config.evaluate.condition) or [self.anchor]

    def rows_with(self, *names: str) -> np.ndarray:
        """Return which real rows have all of these instances, bool (B,)."""
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

    def answer(self, name: str, rows: np.ndarray, readout: str = "sample") -> np.ndarray:
        """Return the answer for an instance from the condition, in some rows. rows: bool (B,)."""
        return self.sampled(*self.condition, readout=readout).data[name][torch.from_numpy(rows)].numpy()

    def sampled(self, *given: str, readout: str = "sample") -> Samples:
        """Return everything else for every row, with these instances given from the row.

        readout: sample, again (another sample) or likely (the most likely data).
        """
        if (readout, given) not in self._samples:
            name = f"given {' '.join(given)}" if given else "from noise"
            name += "" if readout == "sample" else f" {readout}"
            self._samples[readout, given] = self.drawn(name, self._asks(given, readout=readout))
        return self._samples[readout, given]

    def drawn(self, name: str, asks: Sequence[Ask]) -> Samples:
        """Return the answers to asks for rows that follow each other, as one. name: what is asked."""
        return join(list(self.drawer(name, asks)))

    def restored(self, name: str, readout: str = "sample") -> Tensor | None:
        """Return the anchor for every row, of which the masked image `name` tells the visible part.

        By the model that is given it, by replacement, or by both, as `evaluate.inpaint` says; None where no
        task trained that, and for readouts that replacement does not have: it samples, once. Pixels are the
        model's, visible ones too where they were only given.
        """
        source = self.denoiser.modalities[name].made_from
        assert source is not None, f"{name} is made from nothing"
        given = [] if self.config.evaluate.inpaint == "repaint" else [name]
        if not self.trained(source, *given):
            return None
        if self.config.evaluate.inpaint == "given":
            return self.sampled(name, readout=readout).data[source]
        if source != self.anchor or readout != "sample":
            return None
        return self.drawn(f"around {name}", self._asks(given, name)).data[source]

    def _asks(self, given: Sequence[str], known: str | None = None, readout: str = "sample") -> list[Ask]:
        """Return what to ask for everything else of every row."""
        settings, asks = self.config.evaluate, []
        likely = readout == "likely"
        for start, part in self.parts():
            asks.append(
                Ask(
                    start,
                    len(part),
                    self.roles(given),
                    {name: part.data[name] for name in given},
                    seed=self.config.seed + (AGAIN if readout == "again" else 0),
                    steps=self.model.steps(likely),
                    sampler=settings.sampler,
                    guidance=settings.guidance,
                    likely=likely,
                    known=None if known is None else self._known(known, part.data[known]),
                )
            )
        return asks

    def parts(self) -> Iterator[tuple[int, Batch]]:
        """Yield the rows a chunk at a time, with the number of the first."""
        for start in range(0, len(self.batch), CHUNK):
            yield start, self.batch.rows(start, start + CHUNK)

    def _known(self, name: str, data: Tensor) -> Known | None:
        visible = self.denoiser.modalities[name].visible(data)
        channels = self.denoiser.modalities[self.anchor].data_shape[0]
        return None if visible is None else Known(data[:, :channels], visible, self.config.evaluate.repeats)

    def roles(self, given: Sequence[str]) -> dict[str, int]:
        """Return roles that generate everything else that a task generates from what is given."""
        return {
            name: GIVEN if name in given else GENERATED if self.trained(name, *given) else ABSENT
            for name in self.denoiser.modalities
        }

    def panel(self, name: str, data: Tensor, note: str, title: str | None = None) -> Panel:
        """Return data of an instance as a panel of a grid."""
        shown = self.denoiser.modalities[name].picture(data)
        if isinstance(shown, list):
            shown = np.stack([text_tile(text) for text in shown])
        return Panel(title or name, shown, note)
