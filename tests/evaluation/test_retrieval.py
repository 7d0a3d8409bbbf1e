import numpy as np
import pytest
from scipy.spatial.distance import cosine as cosine_distance
from sklearn.metrics import top_k_accuracy_score

from mmdiff_ray.evaluation import retrieval
from mmdiff_ray.evaluation.context import Context
from mmdiff_ray.evaluation.retrieval import cosine, evaluate_retrieval, found_at_k
from mmdiff_ray.evaluation.run import joined
from tests import sprites as tiny


def a_pair(rows: int = 60, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(rows, 8)).astype(np.float32)
    return first, (3 * first + 3 * noise * rng.normal(size=(rows, 8))).astype(np.float32)


def test_cosine_is_one_minus_scipys_cosine_distance_and_0_for_a_zero_row() -> None:
    first, second = a_pair()
    expected = [1 - cosine_distance(a, b) for a, b in zip(first, second, strict=True)]
    assert cosine(first, second) == pytest.approx(expected, abs=1e-6)
    assert cosine(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [0.0]


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("block", [7, 1024])
def test_recall_is_the_top_k_accuracy_of_scikit_learn(
    monkeypatch: pytest.MonkeyPatch, k: int, block: int
) -> None:
    monkeypatch.setattr(retrieval, "BLOCK", block)
    first, second = a_pair()
    similarity = np.array([[1 - cosine_distance(a, b) for b in second] for a in first])
    expected = top_k_accuracy_score(np.arange(60), similarity, k=k)
    assert found_at_k(first, second, k).mean() == pytest.approx(expected)
    assert 0 < expected < 1


@pytest.mark.parametrize("k", [1, 7, 60, 100])
def test_a_constant_prediction_scores_chance(k: int) -> None:
    first, _ = a_pair()
    constant = np.tile(first[3], (60, 1))
    assert found_at_k(first, constant, k).mean() == pytest.approx(min(1, k / 60))


def test_duplicates_in_the_gallery_share_their_place() -> None:
    gallery = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
    assert found_at_k(gallery, gallery, 1).mean() == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found_at_k(gallery, gallery, 2).mean() == 1.0


def test_galleries_of_another_shape_are_refused() -> None:
    first, second = a_pair()
    for queries, gallery, k in ((first, second[:5], 1), (first, second, 0), (first[:0], second[:0], 1)):
        with pytest.raises(ValueError, match="want two"):
            found_at_k(queries, gallery, k).mean()


def context_of(sprites: str, rows: int, *overrides: str) -> Context:
    job = tiny.job(sprites, *overrides)
    batch = joined(tiny.held_out(job, rows, size=4))
    return Context(tiny.generator(job), batch.where(batch.real))


def test_predicted_embeddings_are_retrieved_among_the_rows(sprites: str) -> None:
    context = context_of(sprites, 12)
    found = {figure.key: figure for figure in evaluate_retrieval(context).figures}
    assert set(found) == {f"factors/recall_at_{k}{ending}" for k in (1, 10) for ending in ("", "_likely")}
    predicted = context.sampled("pixels").data["factors"].numpy()
    for k in (1, 10):
        figure = found[f"factors/recall_at_{k}"]
        assert figure.value == pytest.approx(
            found_at_k(predicted, context.truth("factors").numpy(), k).mean()
        )
        assert figure.floors == pytest.approx({"chance": k / 12})
        assert figure.rows == len(figure.tallies["model"]) == 12


def test_recall_at_k_of_no_more_than_k_rows_is_left_out(sprites: str) -> None:
    keys = [figure.key for figure in evaluate_retrieval(context_of(sprites, 10)).figures]
    assert keys == ["factors/recall_at_1", "factors/recall_at_1_likely"]


def test_embeddings_that_no_task_predicts_from_the_anchor_are_left_out(sprites: str) -> None:
    assert not evaluate_retrieval(context_of(sprites, 12, "tasks.understand.roles.factors=absent")).figures
