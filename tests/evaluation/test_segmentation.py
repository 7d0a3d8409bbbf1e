import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score

from mmdiff_ray.evaluation.segmentation import boundary_f, confusion, foreground_iou, iou_tally


def some_masks(classes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, (4, 9, 7), dtype=np.uint8)


def a_square(top: int, left: int, side: int = 8, size: int = 20) -> np.ndarray:
    mask = np.zeros((1, size, size), dtype=np.uint8)
    mask[:, top : top + side, left : left + side] = 1
    return mask


def test_foreground_iou_is_intersection_over_union_image_by_image() -> None:
    truth = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[2, 0, 0, 0]], [[0, 0, 0, 0]]])
    predicted = np.array([[[0, 3, 1, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]], [[1, 0, 0, 0]]])
    assert foreground_iou(predicted, truth) == pytest.approx([1 / 3, 1, 1, 0])


def test_the_confusion_matrix_is_the_one_of_scikit_learn() -> None:
    predicted, truth = some_masks(5, 0), some_masks(5, 1)
    expected = confusion_matrix(truth.ravel(), predicted.ravel(), labels=range(6))
    assert np.array_equal(confusion(predicted, truth, 6), expected)


def test_mean_iou_is_scikit_learns_mean_jaccard_score_over_present_classes() -> None:
    predicted, truth = some_masks(5, 0), some_masks(5, 1)
    expected = jaccard_score(truth.ravel(), predicted.ravel(), average="macro")
    assert iou_tally(predicted, truth, 5).value == pytest.approx(expected)
    predicted, truth = np.array([[[0, 0, 1, 1]]]), np.array([[[0, 0, 0, 3]]])  # without class 2
    assert iou_tally(predicted, truth, 5).value == pytest.approx((2 / 3 + 0 + 0) / 3)


def test_masks_of_different_shapes_or_classes_are_refused() -> None:
    for measure in (foreground_iou, boundary_f, lambda p, q: confusion(p, q, 2)):
        with pytest.raises(ValueError, match="must be two"):
            measure(a_square(0, 0), a_square(0, 0, size=21))
    with pytest.raises(ValueError, match="predicted classes span 0 to 4; want 0 to 3"):
        confusion(some_masks(5, 0), some_masks(4, 1), 4)


@pytest.mark.parametrize(
    ("shift", "tolerance", "score"), [(0, 0, 1.0), (1, 1, 1.0), (3, 3, 1.0), (10, 2, 0.0)]
)
def test_a_boundary_counts_as_found_within_the_tolerance(shift: int, tolerance: float, score: float) -> None:
    here, there = a_square(8, 2, side=5), a_square(8, 2 + shift, side=5)
    assert boundary_f(here, there, tolerance) == pytest.approx([score])


def test_half_of_a_boundary_found_is_a_recall_of_a_half() -> None:
    one, two = np.zeros((1, 10, 40), dtype=np.uint8), np.zeros((1, 10, 40), dtype=np.uint8)
    one[:, :, 10:] = 1
    two[:, :, 10:30] = 1
    precision, recall = 1.0, 0.5
    assert boundary_f(one, two, 1) == pytest.approx([2 * precision * recall / (precision + recall)])
    assert boundary_f(two, one, 1) == pytest.approx(boundary_f(one, two, 1))


def test_without_any_boundary_masks_agree_and_with_one_they_do_not() -> None:
    empty = np.zeros((1, 20, 20), dtype=np.uint8)
    assert boundary_f(empty, empty + 1).tolist() == [1.0]
    assert boundary_f(empty, a_square(4, 4)).tolist() == [0.0]
    assert boundary_f(a_square(4, 4), empty).tolist() == [0.0]


def test_boundaries_between_classes_count_like_those_of_the_foreground() -> None:
    truth = np.ones((1, 12, 12), dtype=np.uint8)
    truth[:, :, 6:] = 2
    assert boundary_f(truth, truth).tolist() == [1.0]
    assert boundary_f(np.ones_like(truth), truth).tolist() == [0.0]


def test_the_outline_of_void_pixels_is_no_boundary():
    truth = np.zeros((1, 16, 16), np.uint8)
    truth[:, 4:8, 4:8] = 1
    void = np.zeros((1, 16, 16), bool)
    void[:, 10:, :] = True
    wrong = np.zeros_like(truth)
    wrong[:, :3, 12:] = 1
    for mask in (truth, wrong):
        mask[void] = 2
    assert boundary_f(wrong, truth, void=void) == [0.0] and boundary_f(truth, truth, void=void) == [1.0]
    assert boundary_f(wrong, truth) > 0.2


def test_void_pixels_are_not_measured():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (2, 3, 8, 8))
    void = np.zeros((3, 8, 8), bool)
    void[:, :, 5:] = True
    found = iou_tally(np.where(void, 0, predicted), np.where(void, 0, truth), 4, void)
    expected = iou_tally(predicted[:, :, :5], truth[:, :, :5], 4)
    assert found.value == pytest.approx(expected.value)
