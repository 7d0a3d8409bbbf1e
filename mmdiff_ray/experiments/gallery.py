"""A picture grid for an experiment's page: given modalities, each method's predictions, and the truth."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mmdiff_ray import config as configuration
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.data.check import read_sources
from mmdiff_ray.evaluation.context import Context
from mmdiff_ray.evaluation.grids import Panel, grid
from mmdiff_ray.evaluation.run import joined
from mmdiff_ray.experiments.archive import result_file
from mmdiff_ray.experiments.parts import Cell, Pictures
from mmdiff_ray.experiments.spec import Experiment
from mmdiff_ray.runs.job import make_reader
from mmdiff_ray.sampling.export import WEIGHTS, load_export

ROWS = 8


def draw_gallery(experiment: Experiment, runs: Path, out: Path) -> list[Path]:
    """Draw the most likely predictions for the experiment's `pictures`, with the models of the first seed.

    Return the file. If a model is missing, return the existing file unchanged, if any.
    """
    file, wanted = result_file(out, "-pictures.png"), experiment.pictures
    if wanted is None:
        return []
    seed = experiment.preset.seeds[0]
    folders = [
        experiment.folder(runs, Cell(experiment.methods[name], seed)) / "export" for name in wanted.methods
    ]
    if all((folder / WEIGHTS).is_file() for folder in folders):
        contexts = [_context(experiment, wanted, *one) for one in zip(wanted.methods, folders, strict=True)]
        titles = [experiment.methods[name].title for name in wanted.methods]
        title = f"{wanted.measure}: most likely predictions"
        grid(_panels(wanted, contexts, titles), title=title, subtitle="held-out rows").save(file)
    return [file] if file.is_file() else []


def _context(experiment: Experiment, wanted: Pictures, name: str, export: Path) -> Context:
    """Return a method's model with the first ROWS held-out rows in which all drawn modalities are present."""
    config = configuration.load_saved(export / "config.yaml")
    measure = experiment.measures[wanted.measure]
    config = experiment.evaluation_config(config, experiment.methods[name], measure)
    model, manifests = load_export(export, "cpu", config), read_sources(config)
    splits = [manifest.splits[config.evaluate.split] for manifest in manifests]
    rows = 4 * ROWS
    context = Context(model, joined(split_batches(make_reader(config, model.denoiser), splits, rows, rows)))
    has = torch.from_numpy(context.rows_with(*context.condition, *wanted.instances))
    return Context(model, context.batch.where(has).rows(0, ROWS))


def _panels(wanted: Pictures, contexts: Sequence[Context], titles: Sequence[str]) -> list[Panel]:
    """Return a panel per given modality, then per drawn modality every method's prediction and the truth."""
    first = contexts[0]
    modalities = first.denoiser.modalities
    panels = [Panel.of(modalities[name], name, first.truth(name), "given") for name in first.condition]
    for name in wanted.instances:
        for title, context in zip(titles, contexts, strict=True):
            predicted = context.sampled(*context.condition, readout="likely").data[name].cpu()
            panels.append(Panel.of(modalities[name], title, predicted, name))
        panels.append(Panel.of(modalities[name], "truth", first.truth(name), name))
    return panels
