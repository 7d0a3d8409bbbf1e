"""The MLflow page of a run: description, headline metrics, and the table of all figures."""

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from mmdiff_ray.config import Config
from mmdiff_ray.evaluation.context import Figure

HEADLINES = ("frechet_lpips_alex", "iou", "miou", "accuracy", "cosine", "lpips_hole")
"""Headline metrics of a modality; if it has none of them, its first figure with a baseline."""
COLUMNS = ("figure", "model", "baseline", "rule", "better", "rows")


def headlines(figures: Iterable[Figure]) -> list[Figure]:
    """Return the figures, about one per modality, that become metrics and appear in the description."""
    groups: dict[str, list[Figure]] = {}
    for figure in figures:
        groups.setdefault(figure.key.partition("/")[0], []).append(figure)
    chosen = []
    for group in groups.values():
        named = [figure for figure in group if figure.key.partition("/")[2] in HEADLINES]
        chosen += (named or [figure for figure in group if figure.floors and not figure.bound])[:1]
    return chosen


def rows_of(figures: Iterable[Figure]) -> list[list[Any]]:
    """Return all figures as table rows with the columns COLUMNS, one row per baseline.

    Figures with a baseline come first, the terms of the bound last.
    """
    rows: list[list[Any]] = []
    for figure in sorted(figures, key=lambda figure: (figure.bound, not figure.floors)):
        for rule, value in figure.floors.items() or [("", None)]:
            shown = None if value is None else _rounded(value)
            rows.append([figure.key, _rounded(figure.value), shown, rule, figure.better, figure.rows])
    return rows


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def description(config: Config, address: str, seen: int = 0, figures: Sequence[Figure] = ()) -> str:
    """Return the description of a run as Markdown.

    address: the run's path or URI. seen, figures: samples seen and results, once the run is evaluated.
    """
    kinds = ", ".join(f"{name} ({modality.type})" for name, modality in config.modalities.items())
    data = ", ".join(source.uri.rstrip("/").rpartition("/")[2] for source in config.data.sources)
    model, size = config.model, f"{config.space.height} x {config.space.width}"
    parts = [
        f"**{config.name}**: joint diffusion of {kinds}. Trained on {data} at {size} with {model.backbone} "
        f"{model.preset}, {seen or config.train.samples:,} samples."
    ]
    if figures:
        shown = ", ".join(_beside_baseline(figure) for figure in headlines(figures))
        parts.append(f"Held-out rows: {shown}. All figures: artifact `evaluation/figures.json`.")
    run = shlex.quote(address)
    parts.append(f"Sample: `mmdiff sample {run} --num 16`\nResume: `mmdiff train --resume {run}`")
    return "\n\n".join(parts)  # MLflow's page shows the first six lines or so


def _beside_baseline(figure: Figure) -> str:
    arrow = "\N{UPWARDS ARROW}" if figure.better == "higher" else "\N{DOWNWARDS ARROW}"
    rule = figure.best_rule
    compared = f" ({rule[0]}: {rule[1]:.3f})" if rule else ""
    return f"{figure.key} {arrow} **{figure.value:.3f}**{compared}"


def metrics(figures: Iterable[Figure]) -> dict[str, float]:
    """Return the headline figures as metrics, `eval/INSTANCE.METRIC`.

    MLflow groups metrics by the part before the last slash and sorts the groups, so `eval` comes first.
    """
    return {f"eval/{figure.key.replace('/', '.')}": figure.value for figure in headlines(figures)}
