"""A result as a Markdown page: a one-sentence summary, a figure and a small table, then all details."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff_ray.evaluation.lpips import SMALLEST
from mmdiff_ray.evaluation.segmentation import TOLERANCE
from mmdiff_ray.experiments.parts import Panel
from mmdiff_ray.experiments.styles import RULE

Line = Mapping[str, Any]
"""One figure of one method: an entry of a result's `figures`."""
METHODS = {
    "lpips": f"LPIPS and its features: images whose shorter side has fewer than {SMALLEST} pixels are first "
    f"enlarged bilinearly to {SMALLEST}. LPIPS in a hole is the mean of its map over the hole.",
    "/boundary_f": "Boundary F: a boundary pixel matches within 1 pixel of the other boundary, or within "
    f"{100 * TOLERANCE:.1f} % of the diagonal if that is more.",
}
"""Part of a figure's key -> how figures with this key are computed."""
GOALS = (
    "Goals were stated before the results. *Better* and *within N %* are one-sided tests. They are met if p, "
    "with Holm's correction for the number of tests, is below 0.025. *Not worse* is met unless the 95 % "
    "interval shows that the method is worse; its p tests for that, without correction."
)
MOST_ROWS = 8
"""Most rows of the table at the top."""
MARKS = (
    "▲ (one seed: △): the first row is better, ▼ (▽): it is worse; the 95 % interval of the difference, "
    "paired by row and seed, excludes 0."
)
HALVES = (
    "A Fréchet distance grows as the number of images falls. Compare the distance between two halves of the "
    "real images only with the column that uses half as many samples. Precision, recall, density and "
    "coverage of real images also compare these halves, so they are approximate."
)


def markdown(
    values: Mapping[str, Any],
    discussion: str = "",
    main: Sequence[str] = (),
    pictures: Sequence[str] = (),
    overview: Sequence[Panel] = (),
) -> str:
    """Return the page of a result: headline, main figures, overview table, goals and discussion.

    A collapsed section below has one table per measure, with methods in rows and figures in columns.
    discussion: hand-written Markdown. main: files of the main figures; the first is above the overview table.
    pictures: files of other figures. overview: the panels of the main figure.
    """
    lines = [f"# {values['title']}", "", *_headline(values, overview), values["question"], ""]
    lines += _images(values, main[:1]) + _overview(values, overview) + _images(values, main[1:])
    lines += _goals(values)
    if discussion:
        lines += [discussion.strip(), ""]
    lines += _images(values, pictures)
    lines += ['<details markdown="1">', "<summary>All figures, how to read them, and costs</summary>", ""]
    lines += _opening(values)
    by_measure: dict[str, list[Line]] = {}
    for line in values["figures"]:
        by_measure.setdefault(line["measure"], []).append(line)
    for measure, found in by_measure.items():
        lines += _measure(values["methods"], measure, found)
    for matrix in values["matrices"]:
        lines += _matrix(values, matrix)
    return "\n".join([*lines, *_cost(values), "</details>", ""])


def _headline(values: Mapping[str, Any], overview: Sequence[Panel]) -> list[str]:
    """Return the main result as a sentence: the first tested goal, else the first panel of the overview."""
    names = {(panel.measure, panel.figure): panel.name for panel in overview}
    found = {(line["measure"], line["figure"], line["method"]): line for line in values["figures"]}
    for goal in values.get("goals", []):
        a, b = (found.get((goal["measure"], goal["figure"], goal[side])) for side in "ab")
        if a and b and goal["difference"] is not None:
            low, high = goal["interval"]
            name = names.get((goal["measure"], goal["figure"]), goal["figure"])
            ours, other = (values["methods"][goal[side]] for side in "ab")
            return [
                f"**{name}: {_number(a['mean'])} for {ours}, {_number(b['mean'])} for {other}; "
                f"difference {goal['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}.**",
                "",
            ]
    for panel in overview:
        if line := found.get((panel.measure, panel.figure, values["main"])):
            between = " to ".join(_number(end) for end in line.get("interval", ()))
            interval = f", 95 % interval {between}" if between else ""
            name = values["methods"][values["main"]]
            return [f"**{panel.name}: {_number(line['mean'])} for {name}{interval}.**", ""]
    return []


def _overview(values: Mapping[str, Any], overview: Sequence[Panel]) -> list[str]:
    """Return the overview table: main method, baselines of its goals, other methods, best rule."""
    places = [(panel.measure, panel.figure) for panel in overview]
    found = {(line["measure"], line["figure"], line["method"]): line for line in values["figures"]}
    shown = [
        panel for panel, place in zip(overview, places, strict=True) if (*place, values["main"]) in found
    ]
    if not shown:
        return []
    wanted = [values["main"], *(goal["b"] for goal in values.get("goals", [])), *values["methods"]]
    rows: list[tuple[str, list[str]]] = []
    for method in dict.fromkeys(wanted):
        lines = [found.get((panel.measure, panel.figure, method)) for panel in shown]
        if any(lines) and len(rows) < MOST_ROWS - 1:
            rows.append((values["methods"][method], [_cell(line) for line in lines]))
    best = []
    for panel in shown:
        rules = [
            line
            for (measure, figure, method), line in found.items()
            if (measure, figure) == (panel.measure, panel.figure) and method.startswith(RULE)
        ]
        pick = max if rules and rules[0]["better"] == "higher" else min
        rule = pick(rules, key=lambda line: line["mean"], default=None)
        best.append(f"{_cell(rule)} ({rule['method'].removeprefix(RULE)})" if rule else "")
    if any(best):
        rows.append(("best rule without a model", best))
    heads = [f"{panel.name} {_arrow(found[panel.measure, panel.figure, values['main']])}" for panel in shown]
    return [*_table("", heads, rows), *([MARKS, ""] if "verdict" in repr(values["figures"]) else [])]


def _images(values: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    return [line for name in files for line in (f"![{values['title']}: {name}]({name})", "")]


def _table(first: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return a Markdown table. first: heading of the first column; rows: (title, cells) each."""
    lines = [f"| {first} | ".replace("|  |", "| |") + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    return [*lines, *(f"| {title} | " + " | ".join(cells) + " |" for title, cells in rows), ""]


def _opening(values: Mapping[str, Any]) -> list[str]:
    """Return how to read the tables, and which cells are missing."""
    seeds = sorted({cell["seed"] for cell in values["cells"]})
    main, titles = values["methods"][values["main"]], values["methods"]
    keys = {line["figure"] for line in values["figures"]}
    fewer = " (fewer where the column *seeds* says so)" if _differ(values["figures"]) else ""
    verdicts = [line["verdict"] for line in values["figures"] if "verdict" in line and not _is_aside(line)]
    marked = sum(verdict != "no difference shown" for verdict in verdicts)
    paragraphs = [
        f"`{values['command']}`, seeds {', '.join(map(str, seeds))}{fewer}. Mean and standard deviation over "
        f"seeds. ▲: **{main}** is better; ▼: it is worse. A difference is marked if its 95 % interval, "
        "paired by row and by common seed, excludes 0. △ and ▽ mark differences with one common seed: "
        f"another training run may differ more. Intervals are {values.get('intervals', 'bootstrapped')}. "
        f"{marked:,} of {len(verdicts):,} comparisons are marked, without correction for their number: "
        "expect one in twenty by chance.",
        *(sentence for part, sentence in METHODS.items() if any(part in key for key in keys)),
    ]
    if values["missing"]:
        paragraphs.append(f"Not trained yet: {', '.join(values['missing'])}.")
    if values.get("unmeasured"):
        paragraphs.append(f"Trained, not measured yet: {', '.join(values['unmeasured'])}.")
    paragraphs += [f"Refused: {titles[name]}. {error}" for name, error in values["refused"].items()]
    paragraphs += [f"No effect: {titles[name]}. {' '.join(notes)}" for name, notes in values["notes"].items()]
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def _measure(titles: Mapping[str, str], measure: str, found: Sequence[Line]) -> list[str]:
    """Return the table of a measure: methods in rows, figures in columns, figures of real images below."""
    keys = list(dict.fromkeys(line["figure"] for line in found if not _is_aside(line)))
    bounds = tuple(f"/l{term}_nats" for term in range(4))
    keys = keys or list(dict.fromkeys(line["figure"] for line in found if line["figure"].endswith(bounds)))
    cells = {(line["method"], line["figure"]): line for line in found}
    heads = [f"{key} {_arrow(next(line for line in found if line['figure'] == key))}" for key in keys]
    seeds = {line["method"]: str(len(line["seeds"])) for line in found}
    last = (lambda method: [seeds[method]]) if _differ(found) else (lambda method: [])
    rows = [
        (titles.get(method, method), [*(_cell(cells.get((method, key))) for key in keys), *last(method)])
        for method in seeds
    ]
    real = [line for line in found if "/real_" in line["figure"] or line["figure"].endswith("judged_real")]
    real.sort(key=lambda line: len(line["seeds"]))  # the dict below keeps the line with the most seeds
    ceilings = {line["figure"]: line for line in real}
    halves = {key: ceilings.pop(key.replace("/half_", "/real_"), None) for key in keys if "/half_" in key}
    has_halves = any(halves.values())
    if has_halves:
        blank = [""] if _differ(found) else []
        rows.append(("real images, their other half", [*(_cell(halves.get(key)) for key in keys), *blank]))
    lines = [f"## {measure}", "", *_table("", heads + (["seeds"] if _differ(found) else []), rows)]
    if ceilings:
        shown = ", ".join(f"{key} {line['mean']:.3f}" for key, line in ceilings.items())
        lines += [f"Of real images: {shown}.", ""]
    return [*lines, *([HALVES, ""] if has_halves else []), *_weak(titles, found)]


def _weak(titles: Mapping[str, str], found: Sequence[Line]) -> list[str]:
    """Return a warning for each precision or recall where a rule does at least as well as a method."""
    lines = []
    for rule in found:
        key = rule["figure"]
        if rule["method"].startswith(RULE) and ("/precision_" in key or "/recall_" in key):
            same = [line for line in found if line["figure"] == key and line["method"] in titles]
            if below := [titles[line["method"]] for line in same if line["mean"] <= rule["mean"]]:
                name = rule["method"].removeprefix(RULE)
                lines += [
                    f"{key}: {name} reach {rule['mean']:.3f}, at least as much as {'; '.join(below)}. "
                    "This figure means little with so few images.",
                    "",
                ]
    return lines


def _goals(values: Mapping[str, Any]) -> list[str]:
    """Return the table of the goals."""
    rows = []
    for goal in values.get("goals", []):
        numbers = ["", "", "", ""]
        if goal["p"] is not None:
            low, high = goal["interval"]
            p = "< 0.001" if goal["p"] < 0.001 else f"{goal['p']:.3f}"
            numbers = [f"{goal['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}", p, str(goal["seeds"])]
        a, b = values["methods"][goal["a"]], values["methods"][goal["b"]]
        claim = f"{a}: {goal['kind']} {'of' if '%' in goal['kind'] else 'than'} {b}"
        met = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
        result = f"**{met}**" + " (one training of each)" * (goal["seeds"] == 1)
        rows.append((goal["name"], [claim, f"{goal['measure']}: {goal['figure']}", *numbers, result]))
    if not rows:
        return []
    heads = ["claim", "figure", "difference", "95 % interval", "p", "seeds", "result"]
    return ["## Goals", "", *_table("", heads, rows), GOALS, ""]


def _matrix(values: Mapping[str, Any], matrix: Mapping[str, Any]) -> list[str]:
    """Return the main method's matrix: measures in rows, figures in columns, unconditional rules below."""
    lines = [line for line in values["figures"] if line["method"] == values["main"]]
    found = {(line["measure"], line["figure"]): line for line in lines}
    measured = {
        measure: title for measure, title in matrix["rows"].items() if any(m == measure for m, _ in found)
    }
    if not measured:
        return []
    heads, names, best = [], [], []
    for figure, title in matrix["columns"].items():
        example = next((line for line in lines if line["figure"] == figure), None)
        heads.append(f"{title} {_arrow(example) if example else '↓'}")
        places = {measure for measure in matrix["rows"] if (measure, figure) in found}
        pick = max if example and example["better"] == "higher" else min
        rules: dict[str, dict[str, float]] = {}
        for line in values["figures"]:
            if line["figure"] == figure and line["measure"] in places and line["method"].startswith(RULE):
                rules.setdefault(line["method"].removeprefix(RULE), {})[line["measure"]] = line["mean"]
        everywhere = {name: pick(means.values()) for name, means in rules.items() if means.keys() == places}
        name = pick(everywhere, key=everywhere.__getitem__) if everywhere else None
        names += [name] if name else []
        best.append(f"{everywhere[name]:.3f}" if name else "")
    rows = [
        (title, [_cell(found.get((measure, figure))) for figure in matrix["columns"]])
        for measure, title in measured.items()
    ]
    if names:
        rows.append((f"rules without a condition: {', '.join(dict.fromkeys(names))}", best))
    return [f"## {matrix['title']}", "", *_table("", heads, rows)]


def _cost(values: Mapping[str, Any]) -> list[str]:
    """Return a table of each method's training cost (mean over seeds), and the cost of sampling."""
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in values["cells"]):
        same = [cell for cell in values["cells"] if cell["method"] == method]
        samples, minutes, gflops, speed = (
            np.mean([cell[key] for cell in same])
            for key in ("samples_seen", "minutes", "gflops", "images_per_s")
        )
        numbers = [f"{samples:,.0f}", f"{minutes:.1f}", f"{gflops:.3g}", f"{speed:.0f}"]
        numbers += [f"{same[0]['parameters']:,}", str(len(same)), same[0]["machine"]]
        rows.append((values["methods"][method], numbers))
    heads = ["samples", "minutes", "GFLOP", "images/s", "parameters", "seeds", "machine"]
    lines = [
        "## Cost",
        "",
        "GFLOP: forward pass of one sample. Images/s: in training, at times with other work on the machine.",
        "",
        *_table("method", heads, rows),
    ]
    ways = {name: (way["predictions"], way["sampler"]) for name, way in values.get("sampling", {}).items()}
    if not ways:
        return lines
    usual = ways[values["main"]]
    others: dict[tuple[int, str], list[str]] = {}
    for name, way in ways.items():
        if way != usual:
            others.setdefault(way, []).append(values["methods"][name])
    sentences = [f"{usual[0]} ({usual[1]} sampler)"]
    sentences += [f"{count} ({sampler}): {'; '.join(names)}" for (count, sampler), names in others.items()]
    return [
        *lines,
        "Network evaluations per sample, unless the title of a table says otherwise: "
        + ". ".join(sentences)
        + ".",
        "",
    ]


def _differ(found: Sequence[Line]) -> bool:
    """Return whether the number of seeds differs between methods."""
    return len({len(line["seeds"]) for line in found}) > 1


def _is_aside(line: Line) -> bool:
    """Return whether the table omits a figure: terms of the bound are only in the JSON, real images below."""
    return line["figure"].endswith(("_nats", "judged_real")) or "/real_" in line["figure"]


def _arrow(line: Line) -> str:
    return "↑" if line["better"] == "higher" else "↓"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _cell(line: Line | None) -> str:
    if line is None or math.isnan(line["mean"]):
        return ""
    digits = 3 if abs(line["mean"]) < 100 else 0
    spread = "" if line["spread"] is None else f" ± {line['spread']:.{digits}f}"
    marks = ("△", "▽") if len(line.get("paired_seeds", ())) == 1 else ("▲", "▼")
    mark = {"main better": f" {marks[0]}", "main worse": f" {marks[1]}"}.get(line.get("verdict", ""), "")
    return f"{_number(line['mean'])}{spread}{mark}"
