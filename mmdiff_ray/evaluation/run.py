"""Run the configured evaluators on a model and held-out rows."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from PIL import Image
from rich.box import SIMPLE
from rich.table import Table

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.evaluation.context import PAIRED, Context, Figure, Findings
from mmdiff_ray.evaluation.draws import Drawer
from mmdiff_ray.evaluation.statistics import difference
from mmdiff_ray.registry import look_up, names
from mmdiff_ray.sampling.generator import Generator

LIKELY = PAIRED["likely"]


def check_evaluators(config: Config) -> None:
    """Raise ConfigError for an evaluator that is not registered, or whose weights are not on this machine."""
    for evaluator in known_evaluators(config):
        getattr(evaluator, "check", lambda config: None)(config)


def known_evaluators(config: Config) -> list[Any]:
    """Return the evaluators of a configuration. Raises ConfigError for one that is not registered."""
    found = []
    for name in chosen(config):
        try:
            found.append(look_up("evaluator", name))
        except KeyError as error:
            raise ConfigError(f"evaluate.evaluators: {error.args[0]}") from None
    return found


def chosen(config: Config) -> list[str]:
    """Return the evaluators of a configuration: those it lists, or all where it says nothing."""
    listed = config.evaluate.evaluators
    return names("evaluator") if listed is None else list(listed)


def evaluate(
    model: Generator,
    batches: Iterable[Batch],
    columns: Mapping[str, Mapping] | None = None,
    drawer: Drawer | None = None,
) -> Findings:
    """Return what all configured evaluators found on the rows of the batches.

    columns: what the data set's manifest says of them. drawer: who samples; the model here where None.
    """
    batch = joined(batches)
    context = Context(model, batch.where(batch.real).to(model.device), columns, drawer)
    findings = Findings()
    for name in chosen(model.config):
        found = look_up("evaluator", name)(context)
        findings.figures.extend(found.figures)
        findings.pictures.update(found.pictures)
    return findings


def sample_pictures(model: Generator, batches: Iterable[Batch]) -> dict[str, Image.Image]:
    """Return the pictures alone, of the first few rows: joint samples and every conditional task."""
    batch = joined(batches)
    context = Context(model, batch.rows(0, 2 * model.config.evaluate.grid_rows).to(model.device))
    pictures: dict[str, Image.Image] = {}
    for name in ("joint", "segmentation", "restoration"):
        if name in chosen(model.config):
            pictures.update(look_up("evaluator", name)(context).pictures)
    return pictures


def joined(batches: Iterable[Batch]) -> Batch:
    """Return batches as one."""
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
            metrics[f"eval/{figure.key}/floor/{_plain(rule)}"] = value
    return metrics


def tables(figures: Iterable[Figure]) -> list[Table]:
    """Return figures as tables for a person: each beside the best rule that needs no model; then the bound.

    Figures that compare with the truth of a row have two columns, a sample and the most likely answer; the
    rule is compared with the second, where there is one.
    """
    figures = list(figures)
    rows = max((figure.rows for figure in figures), default=0)
    title = f"{rows:,} held-out rows, beside the best rule that needs no model"
    shown = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in ("figure", "sample", "likely", "rule"):
        shown.add_column(heading, justify="left" if heading == "figure" else "right", no_wrap=True)
    shown.add_column("")  # the rule's words, which alone may take several lines
    shown.add_column("", no_wrap=True)
    found = {figure.key: figure for figure in figures if not figure.bound}
    for key, figure in sorted(found.items(), key=lambda item: not item[1].floors):
        if key.endswith(LIKELY) and key.removesuffix(LIKELY) in found:
            continue
        likely = found.get(f"{key}{LIKELY}")
        arrow = "\N{UPWARDS ARROW}" if figure.better == "higher" else "\N{DOWNWARDS ARROW}"
        values = [f"{figure.value:.3f}", "" if likely is None else f"{likely.value:.3f}"]
        shown.add_row(f"{key} {arrow}", *values, *_floor(likely or figure))
    bound = _bound_table([figure for figure in figures if figure.bound])
    return [shown, *([bound] if bound.row_count else [])]


def _bound_table(figures: list[Figure]) -> Table:
    """Return L0 to L3 of every instance; the parts of L1 are in MLflow alone."""
    shown = Table(title="the bound on -log p, nats per element", title_justify="left", box=SIMPLE)
    terms = ("l0", "l1", "l2", "l3")
    for heading in ("", *(term.upper() for term in terms)):
        shown.add_column(heading, justify="right" if heading else "left")
    values = {figure.key: figure.value for figure in figures}
    for name in dict.fromkeys(figure.key.split("/")[0] for figure in figures):
        cells = [values.get(f"{name}/{term}_nats") for term in terms]
        shown.add_row(name, *["" if value is None else f"{value:.3g}" for value in cells])
    return shown


def _floor(figure: Figure) -> tuple[str, str, str]:
    """Return the best trivial rule's value and name, and whether the model beats it.

    Where the figure has tallies, a difference that is not shown (95 % interval over rows) is called so.
    """
    if not figure.floors:
        return "", "", ""
    pick = max if figure.better == "higher" else min
    rule = pick(figure.floors, key=lambda name: figure.floors[name])
    value = figure.floors[rule]
    wins = figure.value > value if figure.better == "higher" else figure.value < value
    ours, floor = figure.tallies.get("model"), figure.tallies.get(rule)
    if ours is not None and floor is not None and not difference([ours], [floor]).excludes_zero:
        return f"{value:.3f}", rule, "no difference shown"
    return f"{value:.3f}", rule, "better" if wins else "not better"


def _plain(rule: str) -> str:
    return "_".join(part for part in rule.replace("+", " ").split())
