"""All evaluators on a tiny model: their figures, what they leave out, and the printed tables."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from rich.console import Console

from mmdiff_ray.batch import Batch
from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.evaluation.conditional import evaluate_segmentation, panels_of
from mmdiff_ray.evaluation.context import Context, Figure
from mmdiff_ray.evaluation.floors import nearest_palette_colour
from mmdiff_ray.evaluation.run import (
    check_evaluators,
    evaluate,
    evaluator_names,
    joined,
    metrics_of,
    sample_pictures,
    tables,
)
from mmdiff_ray.evaluation.segmentation import boundary_f
from mmdiff_ray.evaluation.statistics import by_row
from mmdiff_ray.evaluation.tallies import load_tally, save_tallies
from mmdiff_ray.sampling.generator import Generator
from tests import sprites as tiny

ALL = ("segmentation", "labels", "embeddings", "retrieval", "calibration", "joint", "bound")
ROWS = 10


def model_of(sprites: str, *overrides: str) -> tuple[Generator, list[Batch]]:
    """Return an untrained model that evaluates with everything but LPIPS, and held-out rows with padding."""
    job = tiny.job(sprites, f"evaluate.evaluators=[{', '.join(ALL)}]", *overrides)
    return tiny.generator(job), tiny.held_out(job, ROWS, size=4)


@pytest.fixture(scope="module")
def model(sprites):
    return model_of(sprites)


@pytest.fixture(scope="module")
def findings(model):
    return evaluate(*model)


def without(batches: list[Batch], name: str, rows: slice) -> list[Batch]:
    """Return the rows as one batch in which some lack an instance."""
    whole = joined(batches)
    present = whole.present[name].clone()
    present[rows] = False
    return [dataclasses.replace(whole, present={**whole.present, name: present})]


def test_rows_that_are_evaluated_twice_count_once(sprites, findings, tmp_path):
    job = tiny.job(sprites, f"evaluate.evaluators=[{', '.join(ALL)}]")
    splits = [manifest.splits["val"] for manifest in job.manifests]
    twice = evaluate(
        tiny.generator(job), split_batches(job.reader(job.denoiser()), splits, ROWS, 4, visits=2)
    )
    once = by_key(findings)
    assert by_key(twice).keys() == once.keys()
    for key, figure in by_key(twice).items():
        for rule, tally in figure.tallies.items():
            assert figure.rows == once[key].rows and len(tally) == 2 * len(once[key].tallies[rule])
            assert set(tally.ids.tolist()) == set(once[key].tallies[rule].ids.tolist())
            (summed,) = by_row([tally])
            assert len(summed) == figure.rows
            assert summed.value == pytest.approx(tally.value, nan_ok=True)
    save_tallies(tmp_path / "tallies.npz", twice.figures)
    with np.load(tmp_path / "tallies.npz") as arrays:
        assert sum(name.startswith("ids ") for name in arrays) <= 2  # shared by figures of the same rows
        for figure in twice.figures:
            for rule, tally in figure.tallies.items():
                loaded = load_tally(arrays, figure.key, rule)
                assert np.array_equal(loaded.ids, tally.ids)
                assert np.array_equal(loaded.numerator, tally.numerator.astype(np.float32))
        assert load_tally(arrays, "unknown/figure", "model") is None


def by_key(findings) -> dict[str, Figure]:
    return {figure.key: figure for figure in findings.figures}


def test_every_evaluator_finds_finite_figures_beside_their_floors(findings):
    figures = by_key(findings)
    assert {"shapes/miou", "shape/accuracy", "factors/cosine", "shape/code_agreement"} <= set(figures)
    assert {"shapes/boundary_f", "factors/recall_at_1", "shape/head_nll"} <= set(figures)
    for name, terms in {"pixels": "l0 l1 l3", "shapes": "l0 l1 l2", "factors": "l0 l1 l2"}.items():
        assert all(figures[f"{name}/{term}_nats"].bound for term in terms.split())
    for figure in figures.values():
        assert np.isfinite([figure.value, *figure.floors.values()]).all(), figure.key
    assert set(figures["shape/accuracy"].floors) == {"majority class"}
    assert set(findings.pictures) == {"joint", "masks_from_pixels"}


def test_boundaries_are_measured_for_the_model_and_every_rule(sprites):
    colors = "[null, [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]]"
    model, batches = model_of(sprites, f"modalities.shapes.colors={colors}")
    context = Context(model, joined(batches).rows(0, ROWS))
    edges = {figure.key: figure for figure in evaluate_segmentation(context).figures}["shapes/boundary_f"]
    truth, image = context.truth("shapes").numpy(), context.truth("pixels").numpy()
    palette = [None, *[tuple(color) for color in context.config.modalities["shapes"].colors[1:]]]
    nearest = nearest_palette_colour(image, palette)
    assert edges.tallies["model"].numerator == pytest.approx(
        boundary_f(context.sampled("pixels").data["shapes"].numpy(), truth)
    )
    assert len(edges.floors) == 2
    assert edges.floors["nearest palette colour"] == pytest.approx(boundary_f(nearest, truth).mean())


def test_only_real_rows_that_have_an_instance_count_for_it(model, findings):
    assert len(joined(model[1])) == 12
    assert by_key(findings)["shape/accuracy"].rows == by_key(findings)["pixels/l1_nats"].rows == ROWS
    some = by_key(evaluate(model[0], without(model[1], "shape", slice(0, 4))))
    assert some["shape/accuracy"].rows == ROWS - 4
    assert some["shapes/miou"].rows == ROWS
    none = evaluate(model[0], without(model[1], "shapes", slice(None)))
    assert "shapes/miou" not in by_key(none) and "masks_from_pixels" not in none.pictures
    assert by_key(none)["shape/accuracy"].rows == ROWS


def test_figures_are_the_same_again_and_for_any_batch_size(model, findings):
    again = evaluate(model[0], [joined(model[1])])
    for key, figure in by_key(findings).items():
        assert by_key(again)[key].value == pytest.approx(figure.value, rel=1e-6), key


def test_an_instance_that_no_task_predicts_from_the_anchor_is_left_out(sprites):
    model, batches = model_of(sprites, "tasks.understand.roles.factors=absent")
    found = by_key(evaluate(model, batches))
    assert "factors/cosine" not in found and "shape/accuracy" in found
    assert "factors/l2_nats" in found  # it is generated from noise all the same


def test_a_model_that_was_never_given_the_anchor_is_evaluated_on_joint_samples_alone(sprites):
    model, batches = model_of(sprites, "tasks.understand=null", "tasks.restore=null", "tasks.prompt=null")
    found = by_key(evaluate(model, batches))
    assert not {"shapes/miou", "shape/accuracy", "factors/cosine"} & set(found)
    assert {"shape/code_agreement", "pixels/l1_nats"} <= set(found)


def test_masks_of_a_picture_belong_to_the_same_rows(model):
    """Of two mask instances one lacks the first rows: the grid shows the rows that have both."""
    context = Context(model[0], joined(model[1]))
    modality, truth = context.denoiser.modalities["shapes"], context.truth("shapes").numpy()
    every, some = np.arange(12) < ROWS, np.arange(12) % 3 == 2
    answers = [
        ("outline", modality, every, 0 * truth[every], truth[every], {}),
        ("shapes", modality, some, truth[some], 0 * truth[some], {"a rule": truth[some]}),
    ]
    panels = {panel.title: panel.pictures for panel in panels_of(context, answers, every & some)}
    wanted = modality.picture(context.truth("shapes", every & some)[:2])
    for title in ("true outline", "shapes", "a rule"):
        assert np.array_equal(panels[title], wanted)
    anchor = context.denoiser.modalities["pixels"]
    assert np.array_equal(panels["pixels"], anchor.picture(context.truth("pixels", every & some)[:2]))


def test_samples_are_drawn_once_for_all_evaluators(model):
    context = Context(model[0], joined(model[1]))
    assert context.sampled("pixels") is context.sampled("pixels")
    assert context.sampled() is not context.sampled("pixels")
    assert torch.equal(context.sampled("pixels").data["pixels"], context.truth("pixels"))


def test_pictures_alone_need_few_rows(model):
    pictures = sample_pictures(*model)
    assert set(pictures) == {"joint", "masks_from_pixels"}


def test_an_unknown_evaluator_is_named_and_none_means_all(sprites):
    with pytest.raises(ConfigError, match=r"evaluate.evaluators: .*beauty.*bound, calibration"):
        check_evaluators(tiny.config(sprites, "evaluate.evaluators=[joint, beauty]"))
    assert evaluator_names(tiny.config(sprites, "evaluate.evaluators=null"))[1:3] == ["bound", "calibration"]
    assert evaluator_names(tiny.config(sprites, "evaluate.evaluators=[]")) == []


FIGURES = [
    Figure("alpha/iou", 0.9, "higher", 10, {"threshold + fill": 0.8, "nothing": 0.1}),
    Figure("pixels/l1", 0.5, "lower", 10, {"mean colour": 0.4, "grey": 0.6}),
    Figure("shape/code_agreement", 0.7, "higher", 10),
    Figure("alpha/l1_nats", 1.5, "lower", 10, bound=True),
    Figure("alpha/l1_eps_nats", 1.0, "lower", 10, bound=True),
]


def test_metrics_are_flat_with_floors_under_their_figures():
    metrics = metrics_of(FIGURES)
    assert metrics["eval/alpha/iou"] == 0.9
    assert metrics["eval/alpha/iou/floor/threshold_fill"] == 0.8
    assert metrics["eval/alpha/l1_nats"] == 1.5
    assert len(metrics) == 5 + 4


def printed(figures: list[Figure]) -> str:
    written = io.StringIO()
    for table in tables(figures):
        Console(file=written, width=120).print(table)
    return written.getvalue()


def test_each_figure_stands_beside_the_best_rule_and_a_verdict():
    lines = {line.split()[0]: line for line in printed(FIGURES).splitlines() if "/" in line}
    assert lines["alpha/iou"].split()[1:] == ["↑", "0.900", "0.800", "threshold", "+", "fill", "better"]
    assert lines["pixels/l1"].split()[1:] == ["↓", "0.500", "0.400", "mean", "colour", "not", "better"]
    assert lines["shape/code_agreement"].split()[1:] == ["↑", "0.700"]
    assert "l1_nats" not in printed(FIGURES) and "1.5" in printed(FIGURES).split("the bound")[1]
    assert len(tables(FIGURES)) == 2 and len(tables(FIGURES[:3])) == 1


def test_a_sample_and_the_most_likely_prediction_share_a_line_and_the_rule_is_compared_with_the_latter():
    both = [
        Figure("alpha/iou", 0.7, "higher", 10, {"threshold": 0.8}),
        Figure("alpha/iou_likely", 0.9, "higher", 10, {"threshold": 0.8}),
    ]
    (line,) = (line for line in printed(both).splitlines() if "/" in line)
    assert line.split() == ["alpha/iou", "↑", "0.700", "0.900", "0.800", "threshold", "better"]


def test_numbers_and_verdicts_stay_whole_where_the_terminal_is_narrow():
    rule = "nearest palette colour, unlike the border of the picture and its neighbours"
    keys = [f"pixels_from_masked/gradient_error{ending}" for ending in ("", "_likely")]
    narrow = [Figure(key, 0.123, "lower", 10, {rule: 0.456}) for key in keys]
    written = io.StringIO()
    Console(file=written, width=100).print(tables(narrow)[0])
    (line,) = (line for line in written.getvalue().splitlines() if "gradient" in line)
    assert line.split()[:5] == [keys[0], "↓", "0.123", "0.123", "0.456"] and line.split()[-1] == "better"
