"""Errors of maps, F1 of sets of labels, and chrF of texts, against scikit-learn, geometry and counting."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, mean_absolute_percentage_error, root_mean_squared_error

from mmdiff_ray.batch import Batch
from mmdiff_ray.datasets.build import build
from mmdiff_ray.evaluation import regression, texts
from mmdiff_ray.evaluation.conditional import f1_tally
from mmdiff_ray.evaluation.run import evaluate, joined
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.sampling.generator import Generator
from tests import sprites as tiny

GENERATED = ["depth", "attributes", "place", "caption"]
PLAIN = {
    **tiny.PLAIN,
    "modalities": {
        "pixels": {"type": "image"},
        "depth": {"type": "map"},
        "attributes": {"type": "labels"},
        "place": {"type": "vector"},
        "caption": {"type": "text", "length": 8},
    },
    "tasks": {
        "joint": {"roles": dict.fromkeys(["pixels", *GENERATED], "generated")},
        "understand": {"roles": {"pixels": "given", **dict.fromkeys(GENERATED, "generated")}},
    },
    "evaluate": {
        **tiny.PLAIN["evaluate"],
        "evaluators": ["maps", "attributes", "vectors", "texts", "bound"],
        "visits": 1,
    },
}


def some_maps(seed: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 9, (3, channels, 4, 5))


def test_errors_are_the_means_over_rows_of_scikit_learns():
    guess, truth = some_maps(0), some_maps(1)
    truth[0, :, :2] = truth[2] = np.nan
    known = ~np.isnan(truth).any(1)
    for measure, oracle in (
        (regression.root_mean_square, root_mean_squared_error),
        (regression.relative_error, mean_absolute_percentage_error),
    ):
        wanted = [oracle(truth[row, 0][known[row]], guess[row, 0][known[row]]) for row in (0, 1)]
        found = regression.per_row(measure, guess, truth, known)
        assert found.value == pytest.approx(np.mean(wanted)) and found.denominator.tolist() == [1, 1, 0]


def test_angle_of_vectors_does_not_depend_on_their_length():
    turned = np.radians(30)
    truth = np.array([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    guess = 3 * np.array([[np.sin(turned), 0.0], [0.0, 2.0], [np.cos(turned), 0.0]])
    assert regression.angular_error(guess, truth) == pytest.approx((30 + 90) / 2)


def test_mean_map_is_over_the_rows_that_know_a_cell():
    truth = some_maps(0)
    truth[0, 0, 0, 0] = truth[:, 0, 1, 1] = np.nan
    found = regression.mean_map(truth)
    assert found[0, 0, 0] == pytest.approx(truth[1:, 0, 0, 0].mean())
    assert found[0, 1, 1] == pytest.approx(np.nanmean(truth))


def test_f1_of_labels_is_scikit_learns_over_the_labels_that_occur():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 2, (2, 20, 5)).astype(np.uint8)
    truth[:, 4] = predicted[:, 4] = 0
    wanted = f1_score(truth[:, :4], predicted[:, :4], average="macro")
    assert f1_tally(predicted, truth).value == pytest.approx(wanted)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Generator, Batch]:
    """Return an untrained model of scenes, and held-out rows."""
    uri = str(tmp_path_factory.mktemp("scenes") / "set")
    build("scenes", uri, {"count": 60, "size": 8, "val_share": 0.3}, workers=0, progress=False)
    job = jobs.prepare(tiny.config(uri, plain=PLAIN), Path("unused"))
    return tiny.generator(job), joined(tiny.held_out(job, 8))


def test_chrf_is_the_mean_f2_of_character_ngrams_up_to_six():
    # "abcd" against "abce": 3 of 4 characters, 2 of 3 pairs, 1 of 2 triples, 0 of 1 quadruple
    found = texts.chrf(["abcd", "", "one two"], ["abce", "some", "one two"])
    assert found == pytest.approx([np.mean([3 / 4, 2 / 3, 1 / 2, 0]), 0, 1])


def test_maps_labels_vectors_and_texts_are_measured_in_both_readouts_beside_their_rules(model):
    findings = evaluate(model[0], [model[1]])
    figures = {figure.key: figure for figure in findings.figures}
    rules = {
        "depth/rmse": {"mean map"},
        "depth/abs_rel": {"mean map"},
        "attributes/f1": {"every label", "majority of each label"},
        "attributes/subset_accuracy": {"every label", "majority of each label"},
        "place/absolute_error": {"mean"},
        "caption/chrf": {"commonest text"},
        "caption/exact_match": {"commonest text"},
        "caption/token_accuracy": {"commonest text"},
    }
    for key, names in rules.items():
        for suffix in ("", "_likely"):
            figure = figures[key + suffix]
            assert set(figure.floors) == names and figure.rows == 8
            assert np.isfinite([figure.value, *figure.floors.values()]).all()
    truth = model[1].data["place"].numpy()
    wanted = np.abs(truth - truth.mean(0)).mean()
    assert figures["place/absolute_error"].floors["mean"] == pytest.approx(wanted, rel=1e-5)
    words = model[0].modality("caption").texts(model[1].data["caption"])
    commonest = max(words.count(text) for text in words) / len(words)
    assert figures["caption/exact_match"].floors["commonest text"] == pytest.approx(commonest)
    assert set(findings.pictures) == {"depth_from_pixels", "caption_from_pixels"}


def test_unknown_cells_are_in_no_term_of_the_bound_and_in_no_error(model):
    generator, batch = model
    depth = batch.data["depth"].clone()
    depth[:, :, :4] = torch.nan
    depth[0] = torch.nan
    partly = dataclasses.replace(batch, data={**batch.data, "depth": depth})
    whole, part = (
        {figure.key: figure.tallies["model"] for figure in evaluate(generator, [one]).figures}
        for one in (batch, partly)
    )
    for key in ("depth/l1_nats", "depth/l2_nats"):
        share = part[key].denominator / whole[key].denominator
        assert share.tolist() == [0, *[0.5] * 7]
        assert part[key].numerator[0] == 0 and np.isfinite(part[key].numerator).all()
    assert part["depth/rmse"].denominator.tolist() == [0, *[1] * 7]


def test_each_label_has_a_probability_of_its_own(model):
    generator, batch = model
    found = generator.probabilities("attributes", {"pixels": batch.data["pixels"].numpy()}, 8, draws=2)
    assert found.shape == (8, 5) and ((found > 0) & (found < 1)).all()
    assert not np.allclose(found.sum(1), 1, atol=1e-3)
