"""A result as a page: a table for every measure, matrices, what it cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def markdown(values: Mapping[str, Any], discussion: str = "", pictures: Sequence[str] = ()) -> str:
    """Return a result as a page: a table for every measure, methods in rows and figures in columns.

    discussion: what people have to say about it; pictures: names of files; both shown before the tables.
    """
    lines = _opening(values)
    if discussion:
        lines += [discussion.strip(), ""]
    for picture in pictures:
        lines += [f"![{values['title']}: {picture}]({picture})", ""]
    by_measure: dict[str, list[Mapping[str, Any]]] = {}
    for line in values["figures"]:
        by_measure.setdefault(line["measure"], []).append(line)
    for measure, found in by_measure.items():
        lines += _measure(values["methods"], measure, found)
    for matrix in values["matrices"]:
        lines += _matrix(values, matrix)
    return "\n".join([*lines, *_cost(values), ""])


def _opening(values: Mapping[str, Any]) -> list[str]:
    """Return the question, how to read the tables, and what is not in them."""
    lines = [f"# {values['title']}", "", values["question"], ""]
    seeds = sorted({cell["seed"] for cell in values["cells"]})
    main = values["methods"][values["main"]]
    lines += [
        f"`{values['command']}`, seeds {', '.join(map(str, seeds))}. Mean over seeds, plus or minus their "
        f"standard deviation. Marked ▲ where **{main}** is better, ▼ where it is worse: the 95 % interval of "
        "the difference, paired by row and by seed over the seeds that both have, excludes 0. It is "
        "bootstrapped over rows; where there are several seeds, with their spread by the t distribution.",
        "",
    ]
    if values["missing"]:
        lines += [f"Not trained yet: {', '.join(values['missing'])}.", ""]
    if values["unmeasured"]:
        lines += [f"Trained, and not measured yet: {', '.join(values['unmeasured'])}.", ""]
    for name, why in values["refused"].items():
        lines += [f"Refused: {values['methods'][name]}. {why}", ""]
    for name, sentences in values["notes"].items():
        lines += [f"Inert: {values['methods'][name]}. {' '.join(sentences)}", ""]
    return lines


def _grid(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return a table. rows: what stands before a row, and its cells."""
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    return [*lines, *(f"| {title} | " + " | ".join(cells) + " |" for title, cells in rows)]


def _measure(titles: Mapping[str, str], measure: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of a measure: methods in rows, figures in columns; below, those of real images."""
    keys = list(dict.fromkeys(line["figure"] for line in found))
    keys = [key for key in keys if not _aside(key)] or [key for key in keys if _is_bound(key)]
    cells = {(line["method"], line["figure"]): line for line in found}
    better = {line["figure"]: "↑" if line["better"] == "higher" else "↓" for line in found}
    rows = [
        (titles.get(method, method), [_cell(cells.get((method, key))) for key in keys])
        for method in dict.fromkeys(line["method"] for line in found)
    ]
    lines = [f"## {measure}", "", *_grid([f"{key} {better[key]}" for key in keys], rows), ""]
    real = [line for line in found if "/real_" in line["figure"] or line["figure"].endswith("judged_real")]
    real.sort(key=lambda line: len(line["seeds"]))  # the same for all of as many seeds: the most count
    said = {line["figure"]: f"{line['figure']} {line['mean']:.3f}" for line in real}
    return [*lines, f"Of real images: {', '.join(said.values())}.", ""] if said else lines


def _cost(values: Mapping[str, Any]) -> list[str]:
    """Return the table of what every method's models cost, each the mean over seeds."""
    lines = [
        "## Cost",
        "",
        "GFLOP: of the forward pass of one sample. Images/s: as measured in training, with other work on the "
        "machine at times.",
        "",
        "| method | samples | minutes | GFLOP | images/s | parameters | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(cell["method"] for cell in values["cells"]):
        same = [cell for cell in values["cells"] if cell["method"] == method]
        mean = {
            key: np.mean([cell[key] for cell in same])
            for key in ("samples_seen", "minutes", "images_per_s", "gflops")
        }
        lines.append(
            f"| {values['methods'][method]} | {mean['samples_seen']:,.0f} | {mean['minutes']:.1f} | "
            f"{mean['gflops']:.3g} | {mean['images_per_s']:.0f} | {same[0]['parameters']:,} | "
            f"{same[0]['machine']} |"
        )
    return lines


def _matrix(values: Mapping[str, Any], matrix: Mapping[str, Any]) -> list[str]:
    """Return the lines of a matrix of the main method: measures in rows, figures in columns."""
    found = {
        (line["measure"], line["figure"]): line
        for line in values["figures"]
        if line["method"] == values["main"]
    }
    rows = {
        measure: words for measure, words in matrix["rows"].items() if any(m == measure for m, _ in found)
    }
    if not rows:
        return []
    heads = [
        f"{words} {'↑' if _better(found, figure) == 'higher' else '↓'}"
        for figure, words in matrix["columns"].items()
    ]
    cells = [
        (words, [_cell(found.get((measure, figure))) for figure in matrix["columns"]])
        for measure, words in rows.items()
    ]
    return [f"## {matrix['title']}", "", *_grid(heads, cells), ""]


def _better(found: Mapping[tuple[str, str], Mapping[str, Any]], figure: str) -> str:
    return next((line["better"] for (_, key), line in found.items() if key == figure), "")


def _is_bound(figure: str) -> bool:
    return figure.split("/")[-1] in ("l0_nats", "l1_nats", "l2_nats", "l3_nats")


def _aside(figure: str) -> bool:
    """Return whether a figure stands beside the table: terms of the bound in JSON, those of real images
    below."""
    return figure.endswith(("_nats", "judged_real")) or "/real_" in figure


def _cell(line: Mapping[str, Any] | None) -> str:
    if line is None or math.isnan(line["mean"]):
        return ""
    spread = "" if line["spread"] is None else f" ± {line['spread']:.3f}"
    mark = {"main better": " ▲", "main worse": " ▼"}.get(line.get("verdict", ""), "")
    return f"{line['mean']:.3f}{spread}{mark}"
