import numpy as np
import pytest
from scipy.spatial.distance import cosine as cosine_distance
from sklearn.metrics import top_k_accuracy_score

from mmdiff_ray.evaluation import retrieval
from mmdiff_ray.evaluation.context import Context
from mmdiff_ray.evaluation.retrieval import (
    cosine,
    evaluate_retrieval,
    found_at_k,
    recall_at_k,
    recall_both_ways,
)
from mmdiff_ray.evaluation.run import joined
from tests import sprites as tiny


def a_pair(rows: int = 60, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(rows, 8)).astype(np.float32)
    return first, (3 * first + 3 * noise * rng.normal(size=(rows, 8))).astype(np.float32)


def test_cosine_is_one_less_scipys_cosine_distance() -> None:
    first, second = a_pair()
    expected = [1 - cosine_distance(a, b) for a, b in zip(first, second, strict=True)]
    assert cosine(first, second) == pytest.approx(expected, abs=1e-6)


def test_the_cosine_with_nothing_is_zero() -> None:
    assert cosine(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [0.0]


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("block", [7, 1024])
def test_recall_is_the_top_k_accuracy_of_scikit_learn(
    monkeypatch: pytest.MonkeyPatch, k: int, block: int
) -> None:
    monkeypatch.setattr(retrieval, "BLOCK", block)
    first, second = a_pair()
    similarity = np.array([[1 - cosine_distance(a, b) for b in second] for a in first])
    forth = top_k_accuracy_score(np.arange(60), similarity, k=k)
    back = top_k_accuracy_score(np.arange(60), similarity.T, k=k)
    assert recall_both_ways(first, second, k) == pytest.approx((forth, back))
    assert 0 < forth < 1


def test_rows_find_themselves() -> None:
    first, _ = a_pair()
    assert recall_at_k(first, 5 * first, 1) == 1.0


@pytest.mark.parametrize("k", [1, 7, 60, 100])
def test_a_constant_answer_scores_chance(k: int) -> None:
    first, _ = a_pair()
    constant = np.tile(first[3], (60, 1))
    assert recall_at_k(first, constant, k) == pytest.approx(min(1, k / 60))


def test_a_row_that_stands_twice_shares_its_place() -> None:
    gallery = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
    assert recall_at_k(gallery, gallery, 1) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert recall_at_k(gallery, gallery, 2) == 1.0


def test_what_does_not_belong_together_is_refused() -> None:
    first, second = a_pair()
    for queries, gallery, k in ((first, second[:5], 1), (first, second, 0), (first[:0], second[:0], 1)):
        with pytest.raises(ValueError, match="want two"):
            recall_at_k(queries, gallery, k)


def test_what_each_query_finds_adds_up_to_the_recall() -> None:
    first, second = a_pair()
    found = found_at_k(first, second, 5)
    order = np.argsort([[cosine_distance(a, b) for b in second] for a in first], axis=1)[:, :5]
    assert found.tolist() == [float(row in nearest) for row, nearest in enumerate(order)]
    assert found.mean() == recall_at_k(first, second, 5)


def context_of(sprites: str, rows: int, *overrides: str) -> Context:
    job = tiny.job(sprites, *overrides)
    batch = joined(tiny.held_out(job, rows, size=4))
    return Context(tiny.generator(job), batch.where(batch.real))


def test_embeddings_from_the_anchor_are_sought_among_the_rows(sprites: str) -> None:
    context = context_of(sprites, 12)
    found = {figure.key: figure for figure in evaluate_retrieval(context).figures}
    assert set(found) == {f"factors/recall_at_{k}{ending}" for k in (1, 10) for ending in ("", "_likely")}
    answer = context.sampled("pixels").data["factors"].numpy()
    for k in (1, 10):
        figure = found[f"factors/recall_at_{k}"]
        assert figure.value == pytest.approx(recall_at_k(answer, context.truth("factors").numpy(), k))
        assert figure.floors == pytest.approx({"chance": k / 12})
        assert figure.rows == len(figure.tallies["model"]) == 12


def test_recall_among_no_more_rows_than_it_looks_at_is_left_out(sprites: str) -> None:
    keys = [figure.key for figure in evaluate_retrieval(context_of(sprites, 10)).figures]
    assert keys == ["factors/recall_at_1", "factors/recall_at_1_likely"]


def test_embeddings_that_no_task_makes_from_the_anchor_are_not_sought(sprites: str) -> None:
    assert not evaluate_retrieval(context_of(sprites, 12, "tasks.understand.roles.factors=absent")).figures
