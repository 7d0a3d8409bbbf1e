"""Run the configured evaluators on a model and held-out rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from rich.box import SIMPLE
from rich.table import Table

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.evaluation.context import PAIRED, Context, Figure, Findings
from mmdiff_ray.evaluation.requests import SampleFn
from mmdiff_ray.evaluation.statistics import difference
from mmdiff_ray.registry import look_up, names
from mmdiff_ray.sampling.generator import Generator

LIKELY = PAIRED["likely"]
CHEAP = ("calibration",)
"""Evaluators that run during training by default: a few network passes, no sampling."""


def evaluator_names(config: Config) -> list[str]:
    """Return the names in `evaluate.evaluators`, or all registered ones if it is None."""
    listed = config.evaluate.evaluators
    return names("evaluator") if listed is None else list(listed)


def evaluators(config: Config) -> list[Any]:
    """Return the configured evaluators. Raises ConfigError for an unknown name."""
    return _registered("evaluate.evaluators", evaluator_names(config))


def periodic(config: Config) -> list[Any]:
    """Return the evaluators of `evaluate.periodic`, by default the cheap ones. Raises as `evaluators`."""
    listed = config.evaluate.periodic
    return _registered("evaluate.periodic", CHEAP if listed is None else listed)


def _registered(key: str, wanted: Iterable[str]) -> list[Any]:
    try:
        return [look_up("evaluator", name) for name in wanted]
    except KeyError as error:
        raise ConfigError(f"{key}: {error.args[0]}") from None


def check_evaluators(config: Config) -> None:
    """Raise ConfigError for an unknown evaluator, or one whose weights are not on this machine."""
    for evaluator in [*evaluators(config), *periodic(config)]:
        if check := getattr(evaluator, "check", None):
            check(config)


def evaluate(
    model: Generator,
    batches: Iterable[Batch],
    columns: Mapping[str, Mapping] | None = None,
    sample_fn: SampleFn | None = None,
    training: Callable[[int], Batch] | None = None,
    only: Sequence[Any] | None = None,
) -> Findings:
    """Return the findings of the configured evaluators on the rows of the batches.

    only: other evaluators in place of them. columns, sample_fn, training: as of `Context`.
    """
    batch = joined(batches)
    context = Context(model, batch.where(batch.real).to(model.device), columns, sample_fn, training)
    findings = Findings()
    for evaluator in evaluators(model.config) if only is None else only:
        found = evaluator(context)
        findings.figures.extend(found.figures)
        findings.pictures.update(found.pictures)
        findings.sounds.update(found.sounds)
    return findings


def sample_pictures(model: Generator, batches: Iterable[Batch]) -> dict[str, Image.Image]:
    """Draw pictures of the first few rows: joint samples and every conditional task."""
    batch = joined(batches)
    context = Context(model, batch.rows(0, 2 * model.config.evaluate.grid_rows).to(model.device))
    pictures: dict[str, Image.Image] = {}
    for name in ("joint", "segmentation", "restoration"):
        if name in evaluator_names(model.config):
            pictures.update(look_up("evaluator", name)(context).pictures)
    return pictures


def joined(batches: Iterable[Batch]) -> Batch:
    """Concatenate batches."""
    parts = list(batches)
    return Batch(
        ids=torch.cat([part.ids for part in parts]),
        visits=torch.cat([part.visits for part in parts]),
        real=torch.cat([part.real for part in parts]),
        data={name: torch.cat([part.data[name] for part in parts]) for name in parts[0].data},
        present={name: torch.cat([part.present[name] for part in parts]) for name in parts[0].present},
    )


def metrics_of(figures: Iterable[Figure]) -> dict[str, float]:
    """Return figures as flat metrics: `eval/KEY`, and `eval/KEY/floor/RULE` for each trivial rule."""
    metrics = {}
    for figure in figures:
        metrics[f"eval/{figure.key}"] = figure.value
        for rule, value in figure.floors.items():
            metrics[f"eval/{figure.key}/floor/{'_'.join(rule.replace('+', ' ').split())}"] = value
    return metrics


def tables(figures: Iterable[Figure]) -> list[Table]:
    """Return two tables: figures with the best rule without a model, and the bound.

    A sample and the most likely prediction share a line. The rule is compared with the latter.
    """
    figures = list(figures)
    rows = max((figure.rows for figure in figures), default=0)
    title = f"{rows:,} held-out rows, compared with the best rule without a model"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in ("figure", "sample", "likely", "rule"):
        table.add_column(heading, justify="left" if heading == "figure" else "right", no_wrap=True)
    table.add_column("")  # the rule's name is the only column that may wrap
    table.add_column("", no_wrap=True)
    by_key = {figure.key: figure for figure in figures if not figure.bound}
    for key, figure in sorted(by_key.items(), key=lambda item: not item[1].floors):
        if key.endswith(LIKELY) and key.removesuffix(LIKELY) in by_key:
            continue
        likely = by_key.get(f"{key}{LIKELY}")
        arrow = "\N{UPWARDS ARROW}" if figure.better == "higher" else "\N{DOWNWARDS ARROW}"
        values = [f"{figure.value:.3f}", "" if likely is None else f"{likely.value:.3f}"]
        table.add_row(f"{key} {arrow}", *values, *_against_rule(likely or figure))
    bound = {figure.key: figure.value for figure in figures if figure.bound}
    if not bound:
        return [table]
    terms = ("l0", "l1", "l2", "l3")
    nats = Table(title="the bound on -log p, nats per element", title_justify="left", box=SIMPLE)
    for heading in ("", *(term.upper() for term in terms)):
        nats.add_column(heading, justify="right" if heading else "left")
    for name in dict.fromkeys(key.split("/")[0] for key in bound):
        cells = [bound.get(f"{name}/{term}_nats") for term in terms]
        nats.add_row(name, *["" if value is None else f"{value:.3g}" for value in cells])
    return [table, nats]


def _against_rule(figure: Figure) -> tuple[str, str, str]:
    """Return the best trivial rule's value and name, and whether the model is better.

    "no difference shown": the 95 % interval of the difference over rows contains 0.
    """
    if figure.best_rule is None:
        return "", "", ""
    rule, value = figure.best_rule
    ours, floor = figure.tallies.get("model"), figure.tallies.get(rule)
    if ours is not None and floor is not None and not difference([ours], [floor]).excludes_zero:
        return f"{value:.3f}", rule, "no difference shown"
    is_better = figure.value > value if figure.better == "higher" else figure.value < value
    return f"{value:.3f}", rule, "better" if is_better else "not better"
