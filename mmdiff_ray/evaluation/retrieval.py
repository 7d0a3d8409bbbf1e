"""Retrieval between two sets of embeddings by cosine; row i of one belongs to row i of the other."""

import itertools

import numpy as np

from mmdiff_ray.evaluation.context import PAIRED, Context, Findings
from mmdiff_ray.evaluation.statistics import mean_of
from mmdiff_ray.modalities.embedding import EmbeddingModality
from mmdiff_ray.registry import register

BLOCK = 1024
"""Number of queries to compare with the gallery at a time."""
RECALL_AT = (1, 10)


@register("evaluator", "retrieval")
def evaluate_retrieval(context: Context) -> Findings:
    """Measure the recall at k of predicted embeddings among the true embeddings of all evaluated rows.

    Omits recall at k for k >= n rows, because it is then 1 for any prediction. Each visit of the rows has its
    own gallery. Rule: chance, k / n. Intervals resample queries with a fixed gallery.
    """
    findings = Findings()
    for name, _, rows in context.predicted(EmbeddingModality):
        count = len(np.unique(context.ids(rows)))
        visits = context.batch.visits.cpu().numpy()[rows]
        truth = context.truth(name, rows).numpy()
        for k, (readout, suffix) in itertools.product(RECALL_AT, PAIRED.items()):
            if k < count:
                predicted, found = context.prediction(name, rows, readout), np.zeros(len(truth))
                for visit in np.unique(visits):
                    own = visits == visit
                    found[own] = found_at_k(predicted[own], truth[own], k)
                tallies = {"model": mean_of(found), "chance": mean_of(np.full(len(truth), k / count))}
                findings.add(f"{name}/recall_at_{k}{suffix}", "higher", tallies, context.ids(rows))
    return findings


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows, float64 (n,).

    first, second: (n, D), of any norm; a zero row gives 0.
    """
    return (_unit(first) * _unit(second)).sum(axis=1)


def found_at_k(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """Return whether each query's own gallery row is among its k nearest by cosine, float64 (n,) in [0, 1].

    queries, gallery: (n, D), row i belongs to row i. A query whose own row ties with others scores
    the probability that a random order puts it among the k. So a constant prediction scores chance, k / n,
    and duplicates in the gallery do not lower the score. Raises ValueError for shapes that differ, no
    rows, or k < 1.
    """
    if queries.shape != gallery.shape or queries.ndim != 2 or not len(queries) or k < 1:
        raise ValueError(
            f"want two (n, D) with n > 0, and k >= 1; got {queries.shape}, {gallery.shape}, k = {k}"
        )
    q, g = _unit(queries), _unit(gallery)
    found = []
    for start in range(0, len(q), BLOCK):
        similarity = q[start : start + BLOCK] @ g.T  # (b, n)
        at = np.arange(len(similarity))
        own = similarity[at, start + at][:, None]
        ties = np.isclose(similarity, own, rtol=0, atol=1e-9)
        nearer = ((similarity > own) & ~ties).sum(axis=1)
        found.append(np.clip((k - nearer) / ties.sum(axis=1), 0, 1))
    return np.concatenate(found)


def _unit(rows: np.ndarray) -> np.ndarray:
    values = rows.astype(np.float64)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms > 0, norms, 1)
