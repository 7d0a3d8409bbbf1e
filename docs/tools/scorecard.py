"""The scorecard of the README: one model against models of one purpose, from the results of the experiments.

`python docs/tools/scorecard.py` writes it between the markers in README.md.
"""

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- scorecard -->", "<!-- end of scorecard -->"
SQUARES = {"main better": "🟩", "no difference shown": "🟨", "main worse": "🟥"}


class Cell(NamedTuple):
    """A comparison: the experiment's result, the measure, and the method that ours is compared with."""

    result: str
    measure: str
    other: str
    figure: str


COLUMNS = (
    "as many steps for the task",
    "as much compute in total",
    "all steps for each task",
    "10 % annotated",
    "3 % annotated",
)
MASKS, LABELS, HOLES, NOISE = "masks from images", "labels from images", "blocks 30 %", "images from noise"
FRECHET, LPIPS = "pixels/frechet_lpips_alex", "pixels_from_masked/lpips_hole"
FEW = "few_annotations"


def _masks(figure: str) -> tuple[Cell | None, ...]:
    """Return the comparisons of a figure of masks."""
    return (
        Cell("image_mask", MASKS, "masks_third", figure),
        Cell("all_at_once", MASKS, "mask_fifth", figure),
        Cell("all_at_once", MASKS, "mask", figure),
        Cell(f"{FEW}-tenth", MASKS, "masks_best", f"{figure}_likely"),
        Cell(f"{FEW}-thirtieth", MASKS, "masks_best", f"{figure}_likely"),
    )


ROWS: dict[str, tuple[Cell | None, ...]] = {
    "24-colour segmentation, mIoU ↑": _masks("palette/miou"),
    "foreground mask, IoU ↑": _masks("alpha/iou"),
    "label, accuracy ↑": (
        Cell("image_label", LABELS, "classifier_third", "label/accuracy"),
        Cell("all_at_once", LABELS, "label_fifth", "category/accuracy"),
        Cell("all_at_once", LABELS, "label", "category/accuracy"),
        Cell(f"{FEW}-tenth", LABELS, "labels_best", "category/accuracy_likely"),
        Cell(f"{FEW}-thirtieth", LABELS, "labels_best", "category/accuracy_likely"),
    ),
    "image embedding, cosine ↑": (
        None,
        Cell("all_at_once", "embeddings from images", "embedding_fifth", "look/cosine"),
        Cell("all_at_once", "embeddings from images", "embedding", "look/cosine"),
        None,
        None,
    ),
    "holes of 30 %, LPIPS ↓": (
        Cell("masked_image", HOLES, "restoration_half", LPIPS),
        Cell("all_at_once", HOLES, "hole_fifth", LPIPS),
        Cell("all_at_once", HOLES, "hole", LPIPS),
        None,
        None,
    ),
    "images from noise, Frechet distance ↓": (
        None,  # image_embedding spends two thirds of its steps on images, its baseline a third
        Cell("all_at_once", NOISE, "image_fifth", FRECHET),
        Cell("all_at_once", NOISE, "image", FRECHET),
        None,
        None,
    ),
}


def scorecard(results: Path = ROOT / "results") -> str:
    """Return the scorecard as Markdown."""
    lines = [f"| ours against one task | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name, cells in ROWS.items():
        lines.append(f"| {name} | {' | '.join(_text(cell, results) if cell else '' for cell in cells)} |")
    return "\n".join(lines)


def _text(cell: Cell, results: Path) -> str:
    """Return a comparison: its verdict, both means, and a link to its page."""
    values = json.loads((results / f"{cell.result}.json").read_text(encoding="utf8"))
    lines = {
        line["method"]: line
        for line in values["figures"]
        if (line["measure"], line["figure"]) == (cell.measure, cell.figure)
    }
    other = lines[cell.other]
    seeds = other["paired_seeds"]
    ours, theirs = (
        sum(line["values"][line["seeds"].index(seed)] for seed in seeds) / len(seeds)
        for line in (lines[values["main"]], other)
    )
    digits = 3 if abs(ours) < 100 else 0
    pair = f"{ours:.{digits}f} / {theirs:.{digits}f}"
    return f"{SQUARES[other['verdict']]} [{pair}](results/{cell.result}.md)"


def updated(text: str) -> str:
    """Return the README with the scorecard of the present results."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{scorecard()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(encoding="utf8")), encoding="utf8")
