"""How well two sets of embeddings find each other by cosine; row i of one belongs to row i of the other."""

import itertools

import numpy as np

from mmdiff_ray.evaluation.context import PAIRED, Context, Figure, Findings
from mmdiff_ray.evaluation.statistics import mean_of
from mmdiff_ray.modalities.embedding import EmbeddingModality
from mmdiff_ray.registry import register

BLOCK = 1024
RECALLED = (1, 10)
"""How many of the nearest rows are looked at."""


@register("evaluator", "retrieval")
def evaluate_retrieval(context: Context) -> Findings:
    """Measure how often an embedding made from the given anchor finds its own row among all evaluated rows.

    The gallery holds the true embeddings of the n rows that have instance and anchor; recall at k is left out
    where k >= n, since it is then 1 of any answer. With several visits, each has its own gallery. The floor
    is chance, k / n. Intervals over rows draw queries anew and leave the gallery as it is.
    """
    findings = Findings()
    for name in context.asked(EmbeddingModality):
        rows = context.rows_with(name, *context.condition)
        count = len(np.unique(context.ids(rows)))
        visits = context.batch.visits.cpu().numpy()[rows]
        truth = context.truth(name, rows).numpy()
        for k, (readout, ending) in itertools.product(RECALLED, PAIRED.items()):
            if k < count:
                answer, found = context.answer(name, rows, readout), np.zeros(len(truth))
                for own in (visits == visit for visit in np.unique(visits)):
                    found[own] = found_at_k(answer[own], truth[own], k)
                tallies = {"model": mean_of(found), "chance": mean_of(np.full(len(truth), k / count))}
                findings.figures.append(
                    Figure.of(f"{name}/recall_at_{k}{ending}", "higher", tallies, context.ids(rows))
                )
    return findings


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows, float64 (n,).

    first, second: (n, D), of any norm; a zero row gives 0.
    """
    return (_unit(first) * _unit(second)).sum(axis=1)


def recall_at_k(queries: np.ndarray, gallery: np.ndarray, k: int) -> float:
    """Return the share of queries that find their own row, the mean of `found_at_k`, in [0, 1].

    Raises ValueError as it does.
    """
    return float(found_at_k(queries, gallery, k).mean())


def found_at_k(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """Return whether each query's own gallery row is among its k nearest by cosine, float64 (n,) in [0, 1].

    queries, gallery: (n, D), row i belongs to row i. Equal cosines share their places: a query whose own row
    ties with others counts as the chance that a random order of them puts it among the k. So a constant
    answer scores chance, k / n, and a row that stands twice in the gallery is not held against the query.
    Raises ValueError for shapes that differ, no rows, or k < 1.
    """
    if queries.shape != gallery.shape or queries.ndim != 2 or not len(queries) or k < 1:
        raise ValueError(
            f"want two (n, D) with n > 0, and k >= 1; got {queries.shape}, {gallery.shape}, k = {k}"
        )
    q, g = _unit(queries), _unit(gallery)
    starts = range(0, len(q), BLOCK)
    return np.concatenate([_found(q[start : start + BLOCK] @ g.T, start, k) for start in starts])


def recall_both_ways(first: np.ndarray, second: np.ndarray, k: int) -> tuple[float, float]:
    """Return recall@k of first looking for second, and of second looking for first."""
    return recall_at_k(first, second, k), recall_at_k(second, first, k)


def _found(similarity: np.ndarray, start: int, k: int) -> np.ndarray:
    """Return whether each of a block of queries (b, n) finds its own, column start + its place; (b,)."""
    own = similarity[np.arange(len(similarity)), start + np.arange(len(similarity))][:, None]
    same = np.isclose(similarity, own, rtol=0, atol=1e-9)
    nearer = ((similarity > own) & ~same).sum(axis=1)
    return np.clip((k - nearer) / same.sum(axis=1), 0, 1)


def _unit(rows: np.ndarray) -> np.ndarray:
    values = rows.astype(np.float64)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms > 0, norms, 1)
