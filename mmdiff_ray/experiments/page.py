"""A result as a page: a table for every measure, matrices, what it cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff_ray.evaluation.lpips import SMALLEST
from mmdiff_ray.evaluation.segmentation import TOLERANCE
from mmdiff_ray.experiments.styles import RULE

METHODS = {
    "lpips": "LPIPS and its features: images whose shorter side has fewer than "
    f"{SMALLEST} pixels are enlarged bilinearly until it has {SMALLEST}, larger ones are taken as they are; "
    "in a hole LPIPS is the mean of its map over the hole.",
    "/boundary_f": "Boundary F: a boundary pixel counts as found within 1 pixel of the other boundary, or "
    f"within {100 * TOLERANCE:.1f} % of the diagonal where that is more.",
}
"""part of a figure's key -> how such figures are taken."""
GOALS = (
    "Goals were written down before the results. *Better* and *within N %* are one-sided tests: met if p, "
    "corrected for their number (Holm), is below 0.025. *Not worse* is met unless the 95 % interval shows "
    "the method to be worse; its p is that of being worse, uncorrected."
)
HALVES = (
    "A Frechet distance is larger the fewer images it is taken from: that of real images, one half against "
    "the other, compares with the column of half as many samples alone. Precision, recall, density and "
    "coverage of real images are of these halves, too: near what all of them would reach, not the same."
)


def markdown(
    values: Mapping[str, Any], discussion: str = "", main: Sequence[str] = (), pictures: Sequence[str] = ()
) -> str:
    """Return a result as a page: a table for every measure, methods in rows and figures in columns.

    main: names of the files of the main figures; discussion: what people have to say about the result;
    pictures: names of the files of other figures. They stand before the tables in this order.
    """
    lines = _opening(values) + _shown(values, main) + _goals(values)
    if discussion:
        lines += [discussion.strip(), ""]
    lines += _shown(values, pictures)
    by_measure: dict[str, list[Mapping[str, Any]]] = {}
    for line in values["figures"]:
        by_measure.setdefault(line["measure"], []).append(line)
    for measure, found in by_measure.items():
        lines += _measure(values["methods"], measure, found)
    for matrix in values["matrices"]:
        lines += _matrix(values, matrix)
    return "\n".join([*lines, *_cost(values), ""])


def _shown(values: Mapping[str, Any], pictures: Sequence[str]) -> list[str]:
    return [line for name in pictures for line in (f"![{values['title']}: {name}]({name})", "")]


def _opening(values: Mapping[str, Any]) -> list[str]:
    """Return the question, how to read the tables, and what is not in them."""
    lines = [f"# {values['title']}", "", values["question"], ""]
    seeds = sorted({cell["seed"] for cell in values["cells"]})
    main = values["methods"][values["main"]]
    keys = {line["figure"] for line in values["figures"]}
    fewer = " (rows of fewer say so)" if _differ(values["figures"]) else ""
    lines += [
        f"`{values['command']}`, seeds {', '.join(map(str, seeds))}{fewer}. Mean over seeds, plus or minus "
        f"their standard deviation. Marked ▲ where **{main}** is better, ▼ where it is worse: the 95 % "
        "interval of the difference, paired by row and by seed over the seeds that both have, excludes 0; "
        "△ and ▽ where they have one seed in common, so that another training may differ by more. "
        f"Intervals are {values.get('intervals', 'bootstrapped over rows and seeds')}. {_marked(values)}",
        "",
    ]
    lines += [f"{sentence}\n" for part, sentence in METHODS.items() if any(part in key for key in keys)]
    if values["missing"]:
        lines += [f"Not trained yet: {', '.join(values['missing'])}.", ""]
    if values.get("unmeasured"):
        lines += [f"Trained, and not measured yet: {', '.join(values['unmeasured'])}.", ""]
    for name, why in values["refused"].items():
        lines += [f"Refused: {values['methods'][name]}. {why}", ""]
    for name, sentences in values["notes"].items():
        lines += [f"Inert: {values['methods'][name]}. {' '.join(sentences)}", ""]
    return lines


def _marked(values: Mapping[str, Any]) -> str:
    """Return the words for how many comparisons there are, since none is corrected for that."""
    shown = [line for line in values["figures"] if not _aside(line["figure"])]
    verdicts = [line["verdict"] for line in shown if "verdict" in line]
    marked = sum(verdict != "no difference shown" for verdict in verdicts)
    return (
        f"{marked:,} of {len(verdicts):,} comparisons are marked, each judged by itself: where nothing "
        "differs, one in twenty is marked, too."
    )


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
    heads = [f"{key} {better[key]}" for key in keys]
    if _differ(found):
        heads = [*heads, "seeds"]
        counts = {line["method"]: len(line["seeds"]) for line in found}
        rows = [
            (title, [*row, str(count)]) for (title, row), count in zip(rows, counts.values(), strict=True)
        ]
    real = [line for line in found if "/real_" in line["figure"] or line["figure"].endswith("judged_real")]
    real.sort(key=lambda line: len(line["seeds"]))  # the same for all of as many seeds: the most count
    ceilings = {line["figure"]: line for line in real}
    halves = {key: ceilings.pop(key.replace("/half_", "/real_"), None) for key in keys if "/half_" in key}
    if any(halves.values()):
        ends = ["" for _ in heads[len(keys) :]]
        rows.append(("real images, their other half", [*(_cell(halves.get(key)) for key in keys), *ends]))
    lines = [f"## {measure}", "", *_grid(heads, rows), ""]
    said = [f"{key} {line['mean']:.3f}" for key, line in ceilings.items()]
    lines += [f"Of real images: {', '.join(said)}.", ""] if said else []
    if any(halves.values()):
        lines += [HALVES, ""]
    return lines + _weak(titles, found)


def _goals(values: Mapping[str, Any]) -> list[str]:
    """Return the table of the goals that were set beforehand."""
    rows = []
    for goal in values.get("goals", []):
        met = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
        numbers = ["", "", "", ""]
        if goal["p"] is not None:
            low, high = goal["interval"]
            numbers = [f"{goal['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}", _p_value(goal["p"])]
            numbers.append(str(goal["seeds"]))
        claim = f"{values['methods'][goal['a']]}: {goal['kind']} than {values['methods'][goal['b']]}"
        claim = claim.replace("% than", "% of")
        cells = [claim, f"{goal['measure']}: {goal['figure']}", *numbers, f"**{met}**"]
        rows.append((goal["name"], cells))
    if not rows:
        return []
    heads = ["claim", "figure", "difference", "95 % interval", "p", "seeds", "result"]
    return ["## Goals", "", *_grid(heads, rows), "", GOALS, ""]


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _differ(found: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether methods differ in their number of seeds."""
    return len({len(line["seeds"]) for line in found}) > 1


def _weak(titles: Mapping[str, str], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the words for precision and recall where a rule reaches as much as a method."""
    lines = []
    for rule in (line for line in found if line["method"].startswith(RULE) and _is_weak(line["figure"])):
        same = [line for line in found if line["figure"] == rule["figure"] and line["method"] in titles]
        below = [titles[line["method"]] for line in same if line["mean"] <= rule["mean"]]
        if below:
            lines += [
                f"{rule['figure']}: {rule['method'].removeprefix(RULE)} reach {rule['mean']:.3f}, no less "
                f"than {'; '.join(below)}. Of so few images it tells little.",
                "",
            ]
    return lines


def _is_weak(figure: str) -> bool:
    return "/precision_" in figure or "/recall_" in figure


def _cost(values: Mapping[str, Any]) -> list[str]:
    """Return the table of what every method's models cost, each the mean over seeds."""
    lines = [
        "## Cost",
        "",
        "GFLOP: of the forward pass of one sample. Images/s: as measured in training, with other work on the "
        "machine at times.",
        "",
        "| method | samples | minutes | GFLOP | images/s | parameters | seeds | machine |",
        "|---|---|---|---|---|---|---|---|",
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
            f"{len(same)} | {same[0]['machine']} |"
        )
    return [*lines, "", *_calls(values)]


def _calls(values: Mapping[str, Any]) -> list[str]:
    """Return the words for how samples are drawn, and what they cost: the main method's, then others."""
    ways = {name: (way["predictions"], way["sampler"]) for name, way in values.get("sampling", {}).items()}
    if not ways:
        return []
    usual = ways[values["main"]]
    others: dict[tuple[int, str], list[str]] = {}
    for name, way in ways.items():
        if way != usual:
            others.setdefault(way, []).append(values["methods"][name])
    words = [f"{count} ({sampler}): {'; '.join(names)}" for (count, sampler), names in others.items()]
    return [
        "Predictions of the network for a sample, where the title of a table does not say otherwise: "
        f"{usual[0]} ({usual[1]} sampler){'. ' if words else ''}{'. '.join(words)}.",
        "",
    ]


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
    names, floors = _floors(values, matrix, found)
    if names:
        cells.append((f"rules that are given nothing: {', '.join(names)}", floors))
    return [f"## {matrix['title']}", "", *_grid(heads, cells), ""]


def _floors(
    values: Mapping[str, Any], matrix: Mapping[str, Any], found: Mapping[tuple[str, str], Any]
) -> tuple[list[str], list[str]]:
    """Return the rules of a matrix' figures that are there whatever is given, and the best one's cells."""
    names, cells = [], []
    for figure in matrix["columns"]:
        places = {measure for measure in matrix["rows"] if (measure, figure) in found}
        rules: dict[str, dict[str, Mapping[str, Any]]] = {}
        for line in values["figures"]:
            if line["figure"] == figure and line["measure"] in places and line["method"].startswith(RULE):
                rules.setdefault(line["method"], {})[line["measure"]] = line
        pick = max if _better(found, figure) == "higher" else min
        known = {
            name: pick(line["mean"] for line in lines.values())
            for name, lines in rules.items()
            if lines.keys() == places
        }
        best = pick(known, key=known.__getitem__) if known else None
        names += [best.removeprefix(RULE)] if best else []
        cells.append(f"{known[best]:.3f}" if best else "")
    return list(dict.fromkeys(names)), cells


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
    marks = ("△", "▽") if len(line.get("paired_seeds", ())) == 1 else ("▲", "▼")
    found = {"main better": f" {marks[0]}", "main worse": f" {marks[1]}"}
    mark = found.get(line.get("verdict", ""), "")
    return f"{line['mean']:.3f}{spread}{mark}"
