"""The judge: whether an outside model sees in samples what they were labelled."""

import numpy as np
import pytest
import torch

from mmdiff_ray.config import ConfigError
from mmdiff_ray.evaluation.context import Context
from mmdiff_ray.evaluation.judge import evaluate_judge, judged
from mmdiff_ray.evaluation.retrieval import cosine
from mmdiff_ray.evaluation.run import check_evaluators, joined
from mmdiff_ray.evaluation.segmentation import iou_tally
from mmdiff_ray.sampling.export import load_export
from tests import sprites as tiny


def context_of(sprites, finished, *overrides: str) -> Context:
    job = tiny.job(sprites, f"evaluate.judge={finished.folder / 'export'}", *overrides)
    return Context(tiny.generator(job), joined(tiny.held_out(job, 10, size=5)))


def test_pairs_of_joint_samples_and_of_given_labels_are_judged(sprites, finished):
    judge = load_export(finished.folder / "export")
    for condition in ([], ["shape"]):
        context = context_of(sprites, finished, f"evaluate.condition={condition}")
        figures = {figure.key: figure for figure in evaluate_judge(context).figures}
        drawn = context.sampled(*condition).data
        wanted = context.truth("shape").numpy() if condition else drawn["shape"].numpy()
        predicted = judged(judge, drawn["pixels"])["shape"]
        assert figures["shape/judged"].value == pytest.approx((predicted == wanted).mean())
        assert set(figures["shape/judged"].floors) == {"labels of other samples"}
        real = judged(judge, context.truth("pixels"))["shape"]
        assert figures["shape/judged_real"].value == pytest.approx(
            (real == context.truth("shape").numpy()).mean()
        )


def test_masks_and_embeddings_are_judged_by_their_own_metrics(sprites, finished):
    judge = load_export(finished.folder / "export")
    context = context_of(sprites, finished)
    figures = {figure.key: figure for figure in evaluate_judge(context).figures}
    drawn = {name: data.numpy() for name, data in context.sampled().data.items()}
    predicted = judged(judge, torch.from_numpy(drawn["pixels"]))
    classes = context.denoiser.modalities["shapes"].prediction_channels
    for figure, shift in (("model", 0), ("masks of other samples", 1)):
        masks = np.roll(drawn["shapes"], shift, axis=0)
        found = figures["shapes/judged"]
        value = found.value if figure == "model" else found.floors[figure]
        assert value == pytest.approx(iou_tally(predicted["shapes"], masks, classes).value)
    assert figures["factors/judged"].value == pytest.approx(
        cosine(predicted["factors"], drawn["factors"]).mean()
    )
    real = judged(judge, context.truth("pixels"))["factors"]
    assert figures["factors/judged_real"].value == pytest.approx(
        cosine(real, context.truth("factors").numpy()).mean()
    )
    given = context_of(sprites, finished, "evaluate.condition=[shape]")
    assert "factors/judged" not in {figure.key for figure in evaluate_judge(given).figures}


def test_without_a_judge_there_are_no_figures_and_a_missing_one_is_refused(sprites):
    assert (
        evaluate_judge(
            Context(tiny.generator(tiny.job(sprites)), joined(tiny.held_out(tiny.job(sprites))))
        ).figures
        == []
    )
    with pytest.raises(ConfigError, match=r"evaluate\.judge: nowhere is not an exported model"):
        check_evaluators(tiny.config(sprites, "evaluate.evaluators=[judge]", "evaluate.judge=nowhere"))
