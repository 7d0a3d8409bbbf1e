"""README and docs tell the truth: figures are those of committed results, links and commands exist."""

import dataclasses
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from mmdiff_ray.datasets.folder import FolderOptions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CONCEPTS, DATA, EXPERIMENTS, SWEEPS = (
    (ROOT / f"docs/{name}.md").read_text(encoding="utf8")
    for name in ("concepts", "data", "experiments", "sweeps")
)
RESULTS = json.loads((ROOT / "results/openmoji/evaluation.json").read_text(encoding="utf8"))
FIGURES = {figure["key"]: figure for figure in RESULTS["figures"]}


@pytest.mark.parametrize(
    "key",
    [
        "alpha/iou",
        "palette/miou",
        "category/accuracy",
        "pixels_from_masked/lpips",
        "pixels_from_masked/l1_hole",
        "look/cosine",
        "alpha/joint_iou",
    ],
)
def test_readme_quotes_the_figure_and_its_best_rule_from_the_results(key):
    figure = FIGURES[key]
    pick = max if figure["better"] == "higher" else min
    best = pick(figure["floors"].values())
    assert any(
        f"| {figure['value']:.3f} |" in line and f"{best:.3f}" in line for line in README.splitlines()
    ), key


def test_docs_says_what_scales_are_worth():
    found = json.loads((ROOT / "results/scales.json").read_text(encoding="utf8"))
    own, louder = (
        {key: f["value"] for key, f in found[name]["figures"].items()} for name in ("own", "louder")
    )
    part = " ".join(CONCEPTS.split("**Scales.**")[1].split("\n## ")[0].split())
    accuracies = [f"{100 * side['category/accuracy']:.0f} %" for side in (own, louder)]
    assert (
        f"reached {accuracies[0]} of categories after {found['samples_seen']:,} samples, and {accuracies[1]}"
        in part
    )
    for key, digits in (("palette/miou", 2), ("pixels_from_masked/lpips_hole", 3)):
        assert f"{own[key]:.{digits}f} and {louder[key]:.{digits}f}" in part


def test_docs_says_of_the_sweep_what_it_found():
    found = json.loads((ROOT / "results/modality_weights/results.json").read_text(encoding="utf8"))
    part = " ".join(SWEEPS.split(f"`{found['command']}` ran")[1].split("\n## ")[0].split())
    best = found["trials"][0]["figures"]["palette/miou"]
    assert f"palette mIoU of {best:.3f}" in part and f"{len(found['trials'])} trials (" in part
    assert f"{found['samples']:,} samples" in part and f"{found['outcomes']['stopped']} trials were" in part
    first, second = (one["key"] for one in found["importances"]["palette/miou"][:2])
    assert {first, second} == {"modalities.alpha.weights.scale", "modalities.palette.weights.scale"}
    assert len(found["top"]["trials"]) == 3 and "The best three trials" in part
    ends = [end for key in (first, second) for end in found["top"]["ranges"][key]]
    assert "scales of 0.18 to 0.29" in part and 0.18 < min(ends) < 0.19 and 0.28 < max(ends) < 0.29
    best_file = f"results/modality_weights/1-trial-{found['trials'][0]['number']}.yaml"
    assert best_file in part and (ROOT / best_file).is_file()


def test_docs_says_of_the_loss_coefficients_what_their_sweep_found():
    found = json.loads((ROOT / "results/loss_coefficients/results.json").read_text(encoding="utf8"))
    part = " ".join(SWEEPS.split(f"`{found['command']}` ran")[1].split("\n\n")[0].split())
    assert f"{len(found['trials'])} trials ({found['samples']:,} samples" in part
    assert f"{found['outcomes']['stopped']} trials were stopped early" in part
    assert f"LPIPS of {found['trials'][0]['figures']['pixels_from_masked/lpips_hole']:.3f}" in part
    ranges = found["top"]["ranges"].items()
    ends = [end for key, both in ranges if "category" not in key for end in both]
    assert f"coefficients of {min(ends):.3f} to {max(ends):.3f}" in part and len(found["top"]["trials"]) == 3


def test_docs_says_of_three_figures_at_once_what_their_sweep_found():
    found = json.loads((ROOT / "results/joint/results.json").read_text(encoding="utf8"))
    part = " ".join(SWEEPS.split(f"`{found['command']}` ran")[1].split("![")[0].split())
    assert f"{len(found['trials'])} trials ({found['samples']:,} samples" in part
    assert f"{len(found['front'])} trials are on the front" in part
    scale, coefficient = "modalities.category.weights.scale", "loss.modalities.palette"
    label, mask, image = "category/accuracy", "palette/miou", "pixels/frechet_lpips_alex"

    def ends(trials: list, key: str, digits: int) -> str:
        values = [trial["figures"].get(key, trial["values"].get(key)) for trial in trials]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    quiet = [trial for trial in found["trials"] if trial["values"][scale] < 0.07]
    loud = [trial for trial in found["trials"] if trial["values"][scale] > 0.07]
    assert f"scale of {max(trial['values'][scale] for trial in quiet):.3f} or less" in part
    assert f"accuracy is {ends(quiet, label, 3)}" in part
    assert f"at {min(trial['values'][scale] for trial in loud):.3f} or more {ends(loud, label, 3)}" in part
    assert not {trial["number"] for trial in loud} & set(found["front"])
    front = [trial for trial in found["trials"] if trial["number"] in found["front"]]
    assert f"from {ends(front, image, 0)} as the palette's mIoU goes from {ends(front, mask, 3)}" in part
    above = [trial for trial in front if trial["figures"][mask] > 0.41]
    assert len(above) == 3 and f"coefficients of {ends(above, coefficient, 2)}" in part
    others = [trial for trial in front if trial not in above]
    assert len(others) == 4 and f"the other four of {ends(others, coefficient, 2)}" in part
    (best_file,) = (ROOT / "results/joint").glob("*-trial-14.yaml")
    assert f"`mmdiff train results/joint/{best_file.name}`" in part and 14 in found["front"]


def test_docs_says_what_the_population_found():
    found = json.loads((ROOT / "results/pbt_weights/results.json").read_text(encoding="utf8"))
    part = " ".join(SWEEPS.split(f"`{found['command']}` ran")[1].split("\n\n")[0].split())
    assert f"{len(found['trials'])} trials ({found['samples']:,} samples" in part
    key, trials = "alpha/joint_iou", {trial["number"]: trial for trial in found["trials"]}
    best = found["trials"][0]
    (change,) = best["changes"]
    source = trials[change["source"]]
    scale = "modalities.alpha.weights.scale"
    assert f"a joint IoU of {best['figures'][key]:.3f}, copied at {change['at']:,} samples" in part
    assert f"came to {source['figures'][key]:.3f} without" in part and not source["changes"]
    assert f"from {best['values'][scale]:.2f} to {change['values'][scale]:.2f}" in part
    other = next(trial for trial in found["trials"] if trial["changes"] and trial is not best)
    assert f"scale {other['values'][scale]:.2f} to {other['changes'][0]['values'][scale]:.2f}" in part
    copied = {
        report["samples"]: report["figures"] for report in trials[other["changes"][0]["source"]]["reports"]
    }
    before = copied[other["changes"][0]["at"]][key]
    assert other["changes"][0]["at"] == change["at"]
    assert f"fell from {before:.3f} to {other['figures'][key]:.3f}" in part
    best_file = f"results/pbt_weights/1-trial-{best['number']}.yaml"
    assert f"`mmdiff train {best_file}`" in part and (ROOT / best_file).is_file()


def test_docs_says_what_sweeps_save():
    found = json.loads((ROOT / "benchmarks/results/sweep_savings.json").read_text(encoding="utf8"))
    part = " ".join(SWEEPS.split("How many samples does a sweep need")[1].split("\n\n")[0].split())
    replay, real = found["replay"], found["real"]

    def told(title: str, figures: dict, before: str = "") -> str:
        low, high = figures["interval"]
        return f"{title} {figures['share_of_samples']:.2f} ({before}{low:.2f} to {high:.2f})"

    for title, name in (("ASHA", "asha"), ("TPE with ASHA", "tpe_asha")):
        assert told(title, replay[name]) in part
    assert told("ASHA", real["asha"], "95 % interval ") in part
    assert told("TPE with ASHA", real["tpe_asha"]) in part
    assert told("random search itself", real["random"]) in part
    across = found["across"]
    for name, words in (
        ("asha", "ASHA gets there in"),
        ("tpe_asha", "TPE with ASHA in"),
        ("random", "random search in"),
    ):
        reached = across[name]["reached"].split()[0]
        pairs = " of 20 pairs" if name == "asha" else ""
        assert told(f"{words} {reached}{pairs}, with", across[name]) in part
    missed = [replay["orders"] - int(replay[name]["reached"].split()[0]) for name in ("asha", "tpe_asha")]
    assert f"in {missed[0]} and {missed[1]} of the {replay['orders']}" in part
    assert f"random search {replay['random']['share_of_samples']:.2f}" in part
    trains, reached = real["pbt"]["share_of_samples"], real["pbt"]["reached"]
    assert f"trains with {trains:.2f} in all, got there in {reached}" in part
    assert f"in {len(real['seeds'])} real sweeps" in part


def test_docs_says_which_weights_work():
    values = json.loads((ROOT / "results/weights.json").read_text(encoding="utf8"))
    part = " ".join(EXPERIMENTS.split("**A label beside an image**")[1].split("\n\n")[0].split())
    lines = [line for line in values["figures"] if line["figure"] == "label/judged"]
    nats = {
        (one["method"], one["figure"]): one["mean"] for one in values["figures"] if one["measure"] == "bound"
    }
    pixels, code = (
        [nats[m, f"{of}/l1_nats"] for m in ("own_same", "own_loud")] for of in ("pixels", "label")
    )
    elements = 3 * 256, 256  # of the image, and at least of the code
    assert pixels[0] < pixels[1] and "the pixels' part of it the quiet one" in part
    assert sum(n * of[0] for n, of in zip(elements, (pixels, code), strict=True)) > sum(
        n * of[1] for n, of in zip(elements, (pixels, code), strict=True)
    )
    more = {line["method"]: line["mean"] for line in lines if line["measure"].endswith("100 steps")}
    lines = [line for line in lines if not line["measure"].endswith("100 steps")]
    judged = {line["method"]: f"{line['mean']:.3f}" for line in lines}
    assert f"100 in place of 20: {more['own_same']:.3f} together, {more['own_leads']:.3f} first" in part
    settings = [name for name in judged if not name.startswith(("rule", "real"))]
    assert f"{len(settings)} settings" in part and f"{len(lines[0]['seeds'])} seed" in part
    assert f"scale 0.03: {judged['own_same']}, 0.2: {judged['own_loud']}" in part
    families = ("same", "linear", "cosine", "power", "sigmoid", "constant")
    ends = sorted(judged[f"own_{family}"] for family in families)
    assert f"shows no significant effect ({ends[0]} to {ends[-1]})" in part
    assert (
        "first: {}, together: {}, last: {}".format(*(judged[f"own_{n}"] for n in ("leads", "same", "lags")))
        in part
    )


def test_docs_says_who_should_be_settled_first():
    values = json.loads((ROOT / "results/weights_order.json").read_text(encoding="utf8"))
    part = " ".join(EXPERIMENTS.split("**With features besides**")[1].split("\n\n")[0].split())
    lines = [line for line in values["figures"] if line["figure"] == "label/judged"]
    lines = [line for line in lines if not line["method"].startswith(("rule", "real"))]
    fits = {line["method"]: line["mean"] for line in lines}
    seeds = len(lines[0]["seeds"])
    assert f"{len(fits)} settings, {seeds} seeds)" in part
    assert f"(scale 0.3: {fits['features_louder']:.3f})" in part
    names = ("label_first", "together", "pixels_first")
    assert "first ({:.3f}, together: {:.3f}, pixels first: {:.3f})".format(*(fits[n] for n in names)) in part
    ends = sorted(fits[name] for name in ("together", "features_first", "features_last"))
    assert f"shows no difference ({ends[0]:.3f} to {ends[-1]:.3f})" in part
    assert max(mean for name, mean in fits.items() if name.startswith(("label_f", "pixels_last"))) < ends[0]


def test_docs_says_how_loud_a_given_image_should_be():
    values = json.loads((ROOT / "results/weights_given.json").read_text(encoding="utf8"))
    part = " ".join(EXPERIMENTS.split("**A given masked image**")[1].split("\n\n")[0].split())
    lines = [
        line
        for line in values["figures"]
        if (line["measure"], line["figure"]) == ("blocks 30 %", "pixels_from_masked/lpips_hole")
        and not line["method"].startswith(("rule", "real"))
    ]
    hole = {line["method"]: line["mean"] for line in lines}
    assert f"{len(hole)} settings, {len(lines[0]['seeds'])} seeds" in part
    assert f"beside z ({hole['beside']:.3f})" in part
    in_z = {name: mean for name, mean in hole.items() if name.startswith(("own", "shared", "literal"))}
    assert len(in_z) == 7 and hole["beside"] < min(in_z.values())
    own = [hole[name] for name in ("own_quiet", "own", "own_loud")]
    assert sorted(own, reverse=True) == own
    assert "(kappa 0.3: {:.3f}, 1: {:.3f}, 3: {:.3f})".format(*own) in part
    best = min(hole[name] for name in ("shared_quiet", "shared", "shared_loud"))
    assert f"no loudness is good ({best:.3f} at best)" in part


@pytest.mark.parametrize(
    "name, measure, figure, methods",
    [
        (
            "masked_image",
            "blocks 30 %",
            "pixels_from_masked/lpips_hole",
            ("ours", "restoration", "restoration_half"),
        ),
        ("image_label", "labels from images", "label/accuracy", ("ours", "classifier", "classifier_third")),
        (
            "image_label",
            "images from labels",
            "label/judged",
            ("ours", "class_conditional", "class_conditional_third"),
        ),
        ("image_mask", "masks from images", "alpha/iou", ("ours", "masks", "masks_third")),
        ("image_mask", "masks from images", "palette/miou", ("ours", "masks", "masks_third")),
        (
            "image_embedding",
            "images from noise",
            "pixels/frechet_lpips_alex",
            ("ours", "images", "images_third"),
        ),
        ("all_at_once", "labels from images", "category/accuracy", ("ours", "label", "label_fifth")),
        ("all_at_once", "embeddings from images", "look/cosine", ("ours", "embedding", "embedding_fifth")),
        ("all_at_once", "masks from images", "palette/miou", ("ours", "mask", "mask_fifth")),
        ("all_at_once", "blocks 30 %", "pixels_from_masked/lpips_hole", ("ours", "hole", "hole_fifth")),
        ("all_at_once", "images from noise", "pixels/frechet_lpips_alex", ("ours", "image", "image_fifth")),
    ],
)
def test_readme_quotes_the_experiments_from_their_tables(name, measure, figure, methods):
    values = json.loads((ROOT / f"results/{name}.json").read_text(encoding="utf8"))
    means = {
        line["method"]: line["mean"]
        for line in values["figures"]
        if line["measure"] == measure and line["figure"] == figure
    }
    shape = ".3f" if means["ours"] < 10 else ".0f"
    assert " | ".join(f"{means[method]:{shape}}" for method in methods) in EXPERIMENTS
    seeds = {cell["seed"] for cell in values["cells"] if cell["method"] == methods[0]}
    assert f"(../results/{name}.md), {len(seeds)} seed" in EXPERIMENTS


def test_the_scorecard_is_that_of_the_results():
    spec = importlib.util.spec_from_file_location("scorecard", ROOT / "docs/tools/scorecard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    assert module.updated(readme) == readme and "🟥" in readme and "🟩" in readme


TRIED = {
    "foreground IoU": "alpha/iou",
    "palette mIoU": "palette/miou",
    "category accuracy": "category/accuracy",
    "Frechet": "pixels/frechet_lpips_alex",
    "holes of 30 %": "pixels_from_masked/lpips_hole",
}
"""Words of a figure -> its key, in the table of what was tried."""
COMPARED = {
    "beside z with unused channels 0": "zeroed",
    "beside z and noise": "today",
    "predicted ones": "in_place",
}
"""Words of a change -> the method that it is compared with."""


def test_what_was_tried_is_quoted_from_its_tables():
    part = EXPERIMENTS.split("## What was tried")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.*?)\|(.*?)\| ([+-][\d.]+) \((-?[\d.]+) to (-?[\d.]+)\) \|", part, re.MULTILINE)
    page = method = ""
    assert len(rows) >= 7
    for change, figure, *numbers in rows:
        page = next(iter(re.findall(r"results/([\w-]+)\.md", change)), page)
        method = next((one for words, one in COMPARED.items() if words in change), method)
        name = next(key for words, key in TRIED.items() if words in figure)
        name += "_likely" if "most likely" in figure else ""
        values = json.loads((ROOT / f"results/{page}.json").read_text(encoding="utf8"))
        lines = values["figures"]  # holes of 30 % come before those of 50 %
        line = next(one for one in lines if (one["figure"], one["method"]) == (name, method))
        shape = ".0f" if "Frechet" in figure else ".3f"
        low, high = line["difference_interval"]
        assert numbers == [f"{line['difference']:+{shape}}", f"{low:{shape}}", f"{high:{shape}}"]
        assert len(line["paired_seeds"]) == 3


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*.discussion.md")), ids=lambda file: file.name)
def test_a_discussion_quotes_its_own_table_and_stands_in_the_page(file):
    name = file.name.removesuffix(".discussion.md")
    values = json.loads((file.parent / f"{name}.json").read_text(encoding="utf8"))
    text = file.read_text(encoding="utf8")
    known = {f"{line['mean']:.3f}" for line in values["figures"]}
    assert set(re.findall(r"\b\d\.\d{3}\b", text)) <= known
    assert text.strip() in (file.parent / f"{name}.md").read_text(encoding="utf8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf8")):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_page_on_data_names_the_options_of_a_folder_that_there_are():
    part = DATA.split("## Folders of images")[1].split("\n## ")[0]
    named = set(re.findall(r"--([a-z_]+)", part)) - {"out", "help"}
    known = {field.name for field in dataclasses.fields(FolderOptions)}
    assert {"source", "size", "masks", "metadata", "csv", "look", "embed_captions"} <= named <= known


def test_the_readme_is_a_page_and_not_a_book():
    assert len(README.splitlines()) <= 200


def test_nothing_is_left_to_fill_in():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        if name.endswith((".md", ".yaml", ".toml")):
            assert "@@" not in (ROOT / name).read_text(encoding="utf8"), name
