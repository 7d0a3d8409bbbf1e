"""Texts predicted from the condition (`Context.condition`), beside the commonest text."""

import statistics
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.evaluation.conditional import panels_of
from mmdiff_ray.evaluation.context import PAIRED, Context, Findings
from mmdiff_ray.evaluation.grids import grid
from mmdiff_ray.evaluation.statistics import Tally, mean_of
from mmdiff_ray.modalities.text import TextModality, token_hits
from mmdiff_ray.registry import register


@register("evaluator", "texts")
def evaluate_texts(context: Context) -> Findings:
    """Measure predicted texts: chrF from 0 to 1, a mean per row, exact match and token accuracy. Rule: the
    commonest text.

    A row with several texts is compared with the one that it drew.
    """
    findings, shown = Findings(), "likely" if context.model.is_likely(context.condition) else "sample"
    for name, modality, rows in context.predicted(TextModality):
        truth, ids = context.truth(name, rows), context.ids(rows)
        texts = modality.texts(truth)
        commonest = truth[texts.index(statistics.mode(texts))].expand_as(truth)
        for readout, suffix in PAIRED.items():
            model = torch.from_numpy(context.prediction(name, rows, readout))
            candidates = {"model": model, "commonest text": commonest}
            for metric, measure in {"chrf": chrf, "exact_match": exact_match}.items():
                tallies = {
                    rule: mean_of(measure(modality.texts(guess), texts)) for rule, guess in candidates.items()
                }
                findings.add(f"{name}/{metric}{suffix}", "higher", tallies, ids)
            tallies = {rule: accuracy(guess, truth) for rule, guess in candidates.items()}
            findings.add(f"{name}/token_accuracy{suffix}", "higher", tallies, ids)
        title = f"{name} from {', '.join(context.condition)}"
        guess, rules = context.prediction(name, rows, shown), {"commonest text": commonest.numpy()}
        panels = panels_of(context, [(name, modality, rows, guess, truth.numpy(), rules)], rows)
        findings.pictures[title.replace(" ", "_")] = grid(panels, title, "held-out rows")
    return findings


def chrf(guesses: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Return the chrF2 of each text, 0 to 1. Source: Popovic, "chrF", WMT 2015, by sacrebleu."""
    from sacrebleu import sentence_chrf

    scores = [sentence_chrf(guess, [text]).score for guess, text in zip(guesses, texts, strict=True)]
    return np.array(scores) / 100


def exact_match(guesses: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Return which texts are right as a whole."""
    return np.array([guess == text for guess, text in zip(guesses, texts, strict=True)])


def accuracy(guess: Tensor, truth: Tensor) -> Tally:
    """Return the share of tokens that are right, over all tokens but padding."""
    right, count = token_hits(guess, truth)
    return Tally(right.double().numpy(), count.double().numpy())
