"""The judge: whether an outside model sees in samples what they were labelled."""

import pytest
import torch

from mmdiff_ray.config import ConfigError
from mmdiff_ray.evaluation.context import Context
from mmdiff_ray.evaluation.judge import evaluate_judge, judged
from mmdiff_ray.evaluation.run import check_evaluators, joined
from mmdiff_ray.training.export import load_export
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
        wanted = context.truth("shape") if condition else drawn["shape"]
        said = torch.from_numpy(judged(judge, "shape", drawn["pixels"]))
        assert figures["shape/judged"].value == pytest.approx(float((said == wanted).float().mean()))
        assert set(figures["shape/judged"].floors) == {"labels of other samples"}
        real = torch.from_numpy(judged(judge, "shape", context.truth("pixels")))
        assert figures["shape/judged_real"].value == pytest.approx(
            float((real == context.truth("shape")).float().mean())
        )


def test_without_a_judge_nothing_is_judged_and_a_missing_one_is_told(sprites):
    assert (
        evaluate_judge(
            Context(tiny.generator(tiny.job(sprites)), joined(tiny.held_out(tiny.job(sprites))))
        ).figures
        == []
    )
    with pytest.raises(ConfigError, match=r"evaluate\.judge: nowhere holds no exported model"):
        check_evaluators(tiny.config(sprites, "evaluate.evaluators=[judge]", "evaluate.judge=nowhere"))
