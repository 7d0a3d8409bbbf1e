"""How well two sets of embeddings find each other by cosine; row i of one belongs to row i of the other."""

import numpy as np

BLOCK = 1024


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows, float64 (n,).

    first, second: (n, D), of any norm; a zero row gives 0.
    """
    return (_unit(first) * _unit(second)).sum(axis=1)


def recall_at_k(queries: np.ndarray, gallery: np.ndarray, k: int) -> float:
    """Return the share of queries whose own gallery row is among their k nearest by cosine, in [0, 1].

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
    return sum(_found(q[start : start + BLOCK] @ g.T, start, k) for start in starts) / len(q)


def recall_both_ways(first: np.ndarray, second: np.ndarray, k: int) -> tuple[float, float]:
    """Return recall@k of first looking for second, and of second looking for first."""
    return recall_at_k(first, second, k), recall_at_k(second, first, k)


def _found(similarity: np.ndarray, start: int, k: int) -> float:
    """Return how many of a block of queries (b, n) find their own row, columns start to start + b."""
    own = similarity[np.arange(len(similarity)), start + np.arange(len(similarity))][:, None]
    same = np.isclose(similarity, own, rtol=0, atol=1e-9)
    nearer = ((similarity > own) & ~same).sum(axis=1)
    return float(np.clip((k - nearer) / same.sum(axis=1), 0, 1).sum())


def _unit(rows: np.ndarray) -> np.ndarray:
    values = rows.astype(np.float64)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms > 0, norms, 1)
