"""Pages and figures of results: what stands in them, and how it looks."""

import json
from pathlib import Path

import pytest

from mmdiff_ray.config import shipped
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.experiments.page import markdown
from mmdiff_ray.experiments.parts import Panel
from mmdiff_ray.experiments.plots import compared_tasks, limits
from mmdiff_ray.experiments.runner import write_page
from mmdiff_ray.experiments.styles import COLORS, styles, wrapped

FOLDER = shipped.root() / shipped.EXPERIMENTS
RESULTS = Path(__file__).parents[2] / "results"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml") if (RESULTS / f"{file.stem}.json").is_file())


def line(method: str, figure: str, mean: float, measure: str = "noise", seeds: int = 3, **more) -> dict:
    better = "lower" if "frechet" in figure else "higher"
    spread = 0.01 if seeds > 1 else None
    return {
        "measure": measure, "figure": figure, "method": method, "better": better, "mean": mean,
        "spread": spread, "seeds": list(range(seeds)), **more,
    }  # fmt: skip


def values(*figures: dict, **more) -> dict:
    cell = {"samples_seen": 1, "minutes": 1, "images_per_s": 1, "gflops": 1, "parameters": 1, "machine": "m"}
    plain = {
        "title": "Small", "question": "Which?", "command": "c", "main": "ours", "missing": [], "refused": {},
        "methods": {"ours": "ours, all", "other": "the other"}, "notes": {}, "watched": {}, "matrices": [],
        "cells": [{"method": "ours", "seed": seed, **cell} for seed in range(3)], "figures": list(figures),
    }  # fmt: skip
    return plain | more


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_page_is_that_of_its_result_with_all_figures(name, tmp_path):
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf8"))
    experiment, file = load_experiment(name, "small"), RESULTS / f"{name}.discussion.md"
    (tmp_path / file.name).write_text(file.read_text(encoding="utf8"), encoding="utf8")
    page, *pictures = write_page(experiment, found, tmp_path / name)
    assert page.read_text(encoding="utf8") == (RESULTS / page.name).read_text(encoding="utf8")
    assert pictures[0].name == f"{name}-overview.png"
    assert all((RESULTS / picture.name).is_file() for picture in pictures)
    shown = {(one["measure"], one["figure"]) for one in found["figures"]}
    assert {(panel.measure, panel.figure) for panel in experiment.overview} <= shown
    assert {curve["figure"] for curve in experiment.curves} <= {figure for _, figure in shown}


def test_real_images_stand_beside_the_distances_of_as_many_samples_alone():
    figures = [
        line("ours", "pixels/frechet_x", 54), line("ours", "pixels/half_frechet_x", 67),
        line("ours", "pixels/real_frechet_x", 35.5), line("ours", "pixels/real_recall_x", 0.9),
    ]  # fmt: skip
    page = markdown(values(*figures))
    assert "| real images, their other half |  | 35.500 ± 0.010 |" in page
    assert "Of real images: pixels/real_recall_x 0.900." in page and page.count("35.500") == 1
    assert "grows as the number of images falls" in page
    assert "grows as the number of images falls" not in markdown(values(*figures[:1]))


def test_a_page_opens_with_its_headline_and_a_small_table_and_folds_the_rest():
    panel = Panel("accuracy", "noise", "label/accuracy")
    lines = [line(f"m{index}", "label/accuracy", 0.1 * index, verdict="main better") for index in range(9)]
    rules = [line(f"rule: {name}", "label/accuracy", mean) for name, mean in (("chance", 0.1), ("most", 0.3))]
    found = values(
        line("ours", "label/accuracy", 0.5, interval=[0.4, 0.6]),
        *lines,
        *rules,
        methods={"ours": "ours, all", **{f"m{index}": f"method {index}" for index in range(9)}},
    )
    page = markdown(found, overview=[panel])
    top, folded = page.split("<details")
    assert top.startswith("# Small\n\n**accuracy: 0.500 for ours, all, 95 % interval 0.400 to 0.600.**\n")
    table = [row for row in top.split("\n") if row.startswith("| ")]
    assert len(table) == 1 + 8 and table[-1] == "| best rule without a model | 0.300 ± 0.010 (most) |"
    assert "## noise" in folded and "| method 8 | 0.800" in folded and folded.endswith("</details>\n")
    goal = {
        "name": "g", "measure": "noise", "figure": "label/accuracy", "a": "ours", "b": "m8", "kind": "better",
        "difference": -0.3, "interval": [-0.4, -0.2], "seeds": 3, "p": 0.9, "met": False,
    }  # fmt: skip
    page = markdown(found | {"goals": [goal]}, overview=[panel])
    assert "**accuracy: 0.500 for ours, all, 0.800 for method 8; difference -0.300, 95 % interval" in page
    assert next(row for row in page.split("\n") if row.startswith("| method")).startswith("| method 8")


def test_rows_show_their_seeds_if_these_differ():
    same = markdown(values(line("ours", "label/judged", 0.5), line("other", "label/judged", 0.4)))
    assert "seeds |\n|---|---|---|\n" not in same and "fewer where" not in same
    page = markdown(values(line("ours", "label/judged", 0.5), line("other", "label/judged", 0.4, seeds=1)))
    assert "| | label/judged ↑ | seeds |" in page and "fewer where the column" in page
    assert "| ours, all | 0.500 ± 0.010 | 3 |" in page and "| the other | 0.400 | 1 |" in page


def test_a_comparison_by_one_seed_is_marked_apart_and_the_page_counts_them():
    page = markdown(
        values(
            line("ours", "pixels/lpips", 0.1),
            line("other", "pixels/lpips", 0.2, paired_seeds=[0, 1, 2], verdict="main better"),
            line("third", "pixels/lpips", 0.3, seeds=1, paired_seeds=[0], verdict="main better"),
            line("third", "pixels/l1", 0.4, seeds=1, paired_seeds=[0], verdict="no difference shown"),
        )
    )
    assert "0.200 ± 0.010 ▲" in page
    assert "0.300 △" in page and "0.400 △" not in page
    assert "2 of 3 comparisons are marked" in page


def test_a_page_states_the_network_evaluations_per_sample():
    ways = {
        "ours": {"sampler": "ancestral", "predictions": 20},
        "other": {"sampler": "ancestral", "predictions": 77},
    }
    page = markdown(values(line("ours", "pixels/lpips", 0.1), sampling=ways))
    assert "20 (ancestral sampler). 77 (ancestral): the other." in page


def test_a_page_says_how_lpips_and_boundaries_are_measured_where_they_are():
    page = markdown(
        values(line("ours", "alpha/boundary_f", 0.9), line("ours", "pixels_from_masked/lpips", 0.1))
    )
    assert "fewer than 64 pixels are first enlarged bilinearly" in page
    assert "within 1 pixel of the other boundary, or within 0.8 % of the diagonal" in page
    plain = markdown(values(line("ours", "label/accuracy", 0.9)))
    assert "bilinearly" not in plain and "diagonal" not in plain


def test_a_recall_that_shuffled_pixels_reach_has_a_warning():
    rule = line("rule: shuffled pixels", "pixels/recall_x", 0.15)
    page = markdown(values(line("ours", "pixels/recall_x", 0.1), rule, line("other", "pixels/recall_x", 0.2)))
    assert "pixels/recall_x: shuffled pixels reach 0.150, at least as much as ours, all. This" in page
    assert "at least as much" not in markdown(values(line("ours", "pixels/recall_x", 0.2), rule))


def test_a_matrix_ends_with_the_rules_that_are_there_whatever_is_given():
    figures = []
    for measure in ("from mask", "from label"):
        figures += [line("ours", "pixels/recall_x", 0.1, measure), line("ours", "alpha/iou", 0.5, measure)]
        figures += [line("rule: shuffled pixels", "pixels/recall_x", 0.15, measure)]
    figures.append(
        line("rule: threshold", "alpha/iou", 0.7, "from mask")
    )  # it needs what only there is given
    matrix = {
        "name": "any", "title": "Any", "rows": {"from mask": "mask", "from label": "label"},
        "columns": {"pixels/recall_x": "recall", "alpha/iou": "IoU"},
    }  # fmt: skip
    page = markdown(values(*figures, matrices=[matrix])).split("## Any")[1]
    assert "| rules without a condition: shuffled pixels | 0.150 |  |\n" in page


def test_every_method_has_its_own_style_and_rules_differ_in_their_dashes():
    for name in NAMES:
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf8"))
        known = styles(found)
        methods = [known[method] for method in found["methods"]]
        assert len({(style.color, style.marker) for style in methods}) == len(methods)
        if len(methods) <= len(COLORS) + 1:
            assert len({style.color for style in methods}) == len(methods)
        rules = [style for method, style in known.items() if method not in found["methods"]]
        assert {style.color for style in rules} <= {"0.45"} and {style.is_main for style in rules} <= {False}
        assert len({style.line for style in rules}) >= min(5, len(rules))
        assert [style.is_main for style in methods].count(True) == 1


def test_rules_far_from_all_methods_do_not_stretch_an_axis():
    low, high = limits([0.8, 0.9], [0.75, 0.1], log=False)
    assert 0.7 < low < 0.75 and 0.9 < high < 0.95
    low, high = limits([90, 1200], [4000, -1], log=True)
    assert 0 < low < 90 and high > 4000


def test_labels_are_wrapped_evenly_in_as_few_lines_as_possible():
    assert wrapped("restoration alone (diffusion), asked in one pass", 40).split("\n") == [
        "restoration alone (diffusion),", "asked in one pass",
    ]  # fmt: skip
    assert wrapped("short", 40) == "short"


def test_losses_are_compared_at_shared_tasks_and_gradients_at_those_of_the_main_method_alone():
    def points(*tasks: str) -> list[dict]:
        return [{"losses": dict.fromkeys(tasks, 1.0)}]

    watched = {"ours": points("joint", "any", "hole", "mask"), "hole": points("hole"), "mask": points("mask")}
    assert compared_tasks(watched, "ours") == (["hole", "mask"], ["joint", "any"])
    watched["ours"] = points("hole", "mask")
    assert compared_tasks(watched, "ours") == (["hole", "mask"], ["hole", "mask"])
    assert compared_tasks({"ours": watched["ours"]}, "ours") == (["hole", "mask"], ["hole", "mask"])


def test_goals_stand_in_a_table_with_their_result():
    goal = {"name": "masks", "measure": "m", "figure": "alpha/iou", "a": "ours", "b": "other", "seeds": 3}
    tested = {"kind": "within 5 %", "difference": -0.01, "interval": [-0.02, 0.01], "p": 0.0004, "met": True}
    missing = {"kind": "better", "difference": None, "interval": None, "p": None, "met": None}
    page = markdown(values(line("ours", "alpha/iou", 0.5), goals=[goal | tested, goal | missing]))
    assert (
        "| masks | ours, all: within 5 % of the other | m: alpha/iou | -0.010 | -0.020 to +0.010 | < 0.001 "
        "| 3 | **met** |" in page
    )
    assert (
        "| masks | ours, all: better than the other | m: alpha/iou |  |  |  |  | **not measured** |" in page
    )
    once = markdown(values(line("ours", "alpha/iou", 0.5), goals=[goal | tested | {"seeds": 1}]))
    assert "| 1 | **met** (one training of each) |" in once
    assert "## Goals" not in markdown(values(line("ours", "alpha/iou", 0.5)))
