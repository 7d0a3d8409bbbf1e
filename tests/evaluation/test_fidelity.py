"""Distances of sets of images: the Frechet distance by closed forms, the neighbours by hand."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.evaluation.context import Context
from mmdiff_ray.evaluation.fidelity import (
    BETTER,
    compare,
    evaluate_fidelity,
    frechet_distance,
    kernel_distance,
    memorised,
    shuffled_pixels,
)
from mmdiff_ray.evaluation.lpips import Lpips
from mmdiff_ray.evaluation.run import check_evaluators, joined
from tests import sprites as tiny


def exactly(rows: int, mean: np.ndarray, covariance: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return random rows whose mean and covariance (with n - 1) are these to rounding."""
    z = np.random.default_rng(seed).normal(size=(rows, len(mean)))
    z -= z.mean(0)
    white = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T)).T)
    return white @ np.linalg.cholesky(covariance).T + mean


def a_covariance(numbers: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(numbers, numbers))
    return root @ root.T + 0.1 * np.eye(numbers)


def test_of_gaussians_that_stretch_the_same_axes_it_is_the_distance_of_means_and_deviations() -> None:
    first, second = np.array([1.0, 2, 3]), np.array([2.0, 1, 0.5])
    away = np.array([0.5, -1, 2])
    found = frechet_distance(
        exactly(50, np.zeros(3), np.diag(first**2)), exactly(70, away, np.diag(second**2), seed=1)
    )
    assert found == pytest.approx((away**2).sum() + ((first - second) ** 2).sum())


def test_of_any_gaussians_it_is_the_formula_with_a_root_of_the_product() -> None:
    a, b = a_covariance(6, 0), a_covariance(6, 1)
    mean = np.arange(6.0)
    expected = (mean**2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    found = frechet_distance(exactly(40, np.zeros(6), a), exactly(30, mean, b, seed=1))
    assert found == pytest.approx(expected, rel=1e-6)


def test_fewer_rows_than_numbers_are_measured_too() -> None:
    """Rows in a plane of 40 dimensions have the distance that they have within the plane."""
    first, second = (np.random.default_rng(seed).normal(size=(8, 2)) * (1 + seed) for seed in range(2))
    plane = np.linalg.qr(np.random.default_rng(9).normal(size=(40, 2)))[0].T
    expected = frechet_distance(first, second)
    assert frechet_distance(first @ plane, second @ plane) == pytest.approx(expected)
    assert frechet_distance(first @ plane, first @ plane) == pytest.approx(0, abs=1e-9)
    assert expected > 0.1
    with pytest.raises(ValueError, match="at least 2 rows; got 5 and 1"):
        frechet_distance(np.zeros((5, 3)), np.zeros((1, 3)))


def test_kernel_distance_is_the_unbiased_estimate_by_its_definition_and_0_in_the_mean_for_one_law() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(1, 2, size=(5, 3))
    scale = np.sqrt(np.square(x).mean())

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / scale**2 / 3 + 1) ** 3)

    pairs = [
        np.mean([kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j])
        for rows in (x, y)
    ]
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(pairs[0] + pairs[1] - 2 * across)
    same = [kernel_distance(*np.split(rng.normal(size=(40, 3)), 2)) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    with pytest.raises(ValueError, match="at least 2 rows"):
        kernel_distance(x, y[:1])


def test_shares_are_those_of_five_neighbours_counted_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    real, made = generator.normal(size=(30, 3)), 0.7 * generator.normal(size=(25, 3)) + 0.5
    real_reach = np.sort(cdist(real, real), axis=1)[:, 5]
    made_reach = np.sort(cdist(made, made), axis=1)[:, 5]
    distances = cdist(real, made)
    found = compare(real, made)
    assert found["precision"] == pytest.approx((distances < real_reach[:, None]).any(0).mean())
    assert found["recall"] == pytest.approx((distances < made_reach).any(1).mean())
    assert found["density"] == pytest.approx((distances < real_reach[:, None]).sum() / (5 * 25))
    assert found["coverage"] == pytest.approx((distances.min(1) < real_reach).mean())
    assert found["frechet"] == frechet_distance(real, made)
    assert capsys.readouterr().out == ""


def test_one_picture_made_again_and_again_is_precise_and_covers_little() -> None:
    real = np.random.default_rng(0).normal(size=(60, 4))
    again = np.tile(real[:1], (60, 1)) + 1e-6 * np.random.default_rng(1).normal(size=(60, 4))
    found = compare(real, again)
    assert found["precision"] == 1.0 and found["coverage"] < 0.3 and found["recall"] < 0.1
    with pytest.raises(ValueError, match="want at least 7 real and sampled; got 6 and 9"):
        compare(np.zeros((6, 2)), np.zeros((9, 2)))


def test_shuffled_pixels_keep_each_images_colours_and_nothing_else() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    shuffled = shuffled_pixels(images, 0)
    for image, other in zip(images, shuffled, strict=True):
        assert sorted(image.flatten(1).T.tolist()) == sorted(other.flatten(1).T.tolist())
        assert (image == other).float().mean() < 0.2
    assert not torch.equal(shuffled_pixels(images[:1].repeat(2, 1, 1, 1), 0)[0], shuffled[1])


def context_of(sprites: str, rows: int, *overrides: str) -> Context:
    job = tiny.job(sprites, *overrides)
    batch = joined(tiny.held_out(job, rows, size=4))
    return Context(tiny.generator(job), batch.where(batch.real))


def test_samples_stand_beside_shuffled_pixels_and_between_halves_of_real_images(sprites: str) -> None:
    context = context_of(sprites, 18)
    count = len(context.batch)
    found = {figure.key: figure for figure in evaluate_fidelity(context).figures}
    whole = {f"pixels/{metric}_lpips_alex" for metric in BETTER}
    ceiling = {f"pixels/real_{metric}_lpips_alex" for metric in BETTER}
    assert set(found) == whole | ceiling | {"pixels/half_frechet_lpips_alex"}
    alex = Lpips("alex")
    real, made = (
        alex.features(images).double().numpy()
        for images in (context.truth("pixels"), context.sampled().data["pixels"])
    )
    expected, halves = compare(real, made), compare(real[count // 2 :], real[: count // 2])
    for metric, better in BETTER.items():
        figure = found[f"pixels/{metric}_lpips_alex"]
        assert (figure.better, figure.rows, list(figure.floors)) == (better, count, ["shuffled pixels"])
        assert figure.value == pytest.approx(expected[metric])
        real_figure = found[f"pixels/real_{metric}_lpips_alex"]
        assert real_figure.value == pytest.approx(halves[metric])
        assert real_figure.rows == count // 2 and not real_figure.floors
    assert found["pixels/half_frechet_lpips_alex"].value == pytest.approx(
        frechet_distance(real[count // 2 :], made[: count // 2])
    )


def test_real_images_in_place_of_samples_are_at_no_distance_and_shuffled_ones_are_far(sprites: str) -> None:
    context = context_of(sprites, 18)
    context.sampled().data["pixels"] = context.truth("pixels").flip(0)
    found = {figure.key: figure for figure in evaluate_fidelity(context).figures}
    assert found["pixels/frechet_lpips_alex"].value == pytest.approx(0, abs=1e-6)
    assert found["pixels/frechet_lpips_alex"].floors["shuffled pixels"] > 0.1
    assert found["pixels/precision_lpips_alex"].value == 1.0


@pytest.mark.parametrize(("rows", "figures"), [(6, 0), (10, 5)])
def test_few_rows_have_no_halves_and_fewer_no_figures(sprites: str, rows: int, figures: int) -> None:
    assert len(evaluate_fidelity(context_of(sprites, rows)).figures) == figures


def test_missing_weights_are_found_before_anything_starts(
    sprites: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("MMDIFF_WEIGHTS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"python -m mmdiff_ray\.evaluation\.weights"):
        check_evaluators(tiny.config(sprites, "evaluate.evaluators=[fidelity]"))


def test_copies_of_training_images_are_found_and_new_images_are_like_held_out_ones():
    random = np.random.default_rng(0)
    trained, real, new = (random.normal(size=(400, 8)) for _ in range(3))
    copies, held_out = memorised(trained[:100] + 1e-3, real, trained)
    assert copies.mean() == 1 and held_out.mean() == pytest.approx(0.05)
    assert memorised(new, real, trained)[0].mean() == pytest.approx(0.05, abs=0.03)
    half = memorised(np.concatenate([new[:50], trained[:50]]), real, trained)[0]
    assert half[50:].mean() == 1 and half.mean() == pytest.approx(0.525, abs=0.04)


def test_copies_of_training_images_are_told_from_new_ones(sprites: str) -> None:
    context = context_of(sprites, 18)
    job = tiny.job(sprites)
    reader, splits = job.reader(job.denoiser()), [manifest.splits["train"] for manifest in job.manifests]
    context.training = lambda rows: joined(split_batches(reader, splits, min(rows, 64), 16))
    truth = context.truth("pixels").clone()
    for drawn, share in ((context.training(64).data["pixels"][: len(truth)], 1.0), (truth, 1 / len(truth))):
        context.sampled().data["pixels"] = drawn
        figures = {figure.key: figure.value for figure in evaluate_fidelity(context).figures}
        assert figures["pixels/memorised_lpips_alex"] == pytest.approx(share)
