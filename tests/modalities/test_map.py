"""Maps: unknown cells, averages over known pixels, mirrored vectors, likelihoods, files."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.map import MapModality, MapOptions, paint, read_map
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.tasks import Tasks
from mmdiff_ray.training.loss import TrainingLoss
from tests.modalities import tiny


def depth(dim: int = 1, size: tuple[int, int] = tiny.SIZE, **options) -> MapModality:
    limits = options.pop("range", [0, 10])
    return MapModality("depth", MapOptions(type="map", dim=dim, range=limits, **options), size)


def read(modality: MapModality, array: np.ndarray, visit: int = 0, flip: bool = False) -> np.ndarray:
    context = RowContext(modality.size, seed=0, visit=visit, row_id=3, flip=flip)
    return modality.read({"depth": tiny.npy(array)}, context, {})


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 9, shape).astype(np.float32)


def test_a_cell_is_the_mean_of_its_known_pixels_and_unknown_where_half_of_them_are():
    array = values(1, tiny.SIZE[0] * 4, tiny.SIZE[1] * 4)
    cells = array.reshape(tiny.SIZE[0], 4, tiny.SIZE[1], 4).mean((1, 3))
    np.testing.assert_allclose(read(depth(), array)[0], cells, rtol=1e-5)
    array[0, :4, :2] = np.nan
    array[0, 4:8, :1] = np.nan
    fitted = read(depth(), array)[0]
    assert np.isnan(fitted[0, 0]) and np.isnan(fitted).sum() == 1
    assert fitted[1, 0] == pytest.approx(array[0, 4:8, 1:4].mean(), rel=1e-5)


def test_values_outside_the_range_are_unknown_and_so_is_a_cell_with_an_unknown_channel():
    array = values(2, *tiny.SIZE)
    array[0, 0, 0], array[1, 2, 3] = 10.5, np.nan
    fitted = read(depth(2), array)
    unknown = np.isnan(fitted).any(0)
    assert unknown[0, 0] and unknown[2, 3] and unknown.sum() == 2
    assert np.array_equal(fitted[:, ~unknown], array[:, ~unknown])


def test_unknown_cells_have_no_code_no_loss_and_no_say_in_scale_and_figures():
    modality, plain = depth(2), depth(2)
    data = torch.from_numpy(values(3, 2, *tiny.SIZE))
    void = torch.zeros(3, *tiny.SIZE, dtype=torch.bool)
    void[0, :3] = True
    marked = data.masked_fill(void[:, None], torch.nan)
    assert torch.equal(modality.void(marked), void)
    modality.calibrate(marked)
    known = data.movedim(1, 3)[~void].double()
    torch.testing.assert_close(modality.mean.flatten(), known.mean(0).float())
    torch.testing.assert_close(modality.scale.flatten(), known.std(0).float())
    codes = modality.encode(marked)
    assert (codes.abs().sum(1)[void] == 0).all() and codes.isfinite().all()
    plain.mean, plain.scale = modality.mean, modality.scale
    prediction = torch.randn(3, 2, *tiny.SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nats = modality.negative_log_likelihood(prediction, marked)
    torch.testing.assert_close(nats[1:], plain.negative_log_likelihood(prediction, data)[1:])
    nats.sum().backward()
    assert prediction.grad.isfinite().all() and (prediction.grad.abs().sum(1)[void] == 0).all()
    found = modality.metrics(data, marked)["absolute_error"]
    assert found.sum == 0 and found.count == 2 * int((~void).sum())
    assert (modality.picture(marked)[void.numpy()] == (255, 0, 255)).all()


def test_unknown_cells_are_counted_in_no_loss_term_and_pass_no_gradient_on():
    roles = {"pixels": "given", "depth": "generated"}
    plain = {**tiny.PLAIN, "tasks": {"estimate": {"roles": roles}}}
    plain["modalities"] = {"pixels": {"type": "image"}, "depth": tiny.MORE["depth"]}
    config = tiny.config(plain=plain)
    loss = TrainingLoss(build_denoiser(config), config)
    batch = tiny.rows(loss.denoiser.modalities, 4)
    batch.data["depth"][:2, :, :4] = torch.nan  # half of the cells of half of the rows
    _, roles = Tasks(config.tasks, ["pixels", "depth"], set()).draw(batch, seed=0)
    counts = loss.counts(batch, roles)
    cells = tiny.SIZE[0] * tiny.SIZE[1]
    assert float(counts["l1/depth"]) == float(counts["l2/depth"]) == 4 * cells * 0.75
    sums = loss(batch, roles)
    loss.objective.total(sums, counts).backward()
    assert all(value.isfinite() for value in sums.values())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in loss.parameters())


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_likelihood_is_the_distribution_of_that_standard_deviation(likelihood):
    modality = depth(size=(1, 2), likelihood=likelihood, sigma=0.7)
    modality.mean.fill_(4.0)
    modality.scale.fill_(2.0)
    prediction, data = torch.tensor([[[[0.3, -1.0]]]]), torch.tensor([[[[5.0, 1.5]]]])
    law = stats.norm(0, 0.7) if likelihood == "gaussian" else stats.laplace(0, 0.7 / np.sqrt(2))
    expected = -law.logpdf([0.5 - 0.3, -1.25 + 1.0]).sum()
    assert float(modality.negative_log_likelihood(prediction, data)) == pytest.approx(expected, rel=1e-5)
    assert law.std() == pytest.approx(0.7) and modality.elements == 2


@pytest.mark.parametrize(("content", "dim"), [("values", 1), ("normals", 3), ("flow", 2)])
def test_mirroring_turns_vectors_around_too(content, dim):
    modality, array = depth(dim, content=content, range=[-1, 1]), values(dim, *tiny.SIZE) / 10
    signs = np.ones((dim, 1, 1)) if content == "values" else np.array([-1, 1, 1][:dim])[:, None, None]
    seen = [read(modality, array, visit, flip=True) for visit in range(12)]
    mirrored = (signs * array)[..., ::-1].astype(np.float32)
    assert {np.array_equal(one, array) for one in seen} == {True, False}
    assert all(np.array_equal(one, array) or np.array_equal(one, mirrored) for one in seen)


def test_averaged_normals_are_unit_vectors_and_answers_are_within_the_range():
    modality = depth(3, content="normals", range=[-1, 1])
    array = np.random.default_rng(0).normal(size=(3, 32, 48))
    fitted = read(modality, array / np.linalg.norm(array, axis=0))
    np.testing.assert_allclose(np.linalg.norm(fitted, axis=0), 1, rtol=1e-5)
    prediction = torch.randn(2, 3, *tiny.SIZE, generator=torch.Generator().manual_seed(0)) * 9
    np.testing.assert_allclose(modality.answer(prediction).norm(dim=1), 1, rtol=1e-5)
    answer = depth().answer(prediction[:, :1] * 9)
    assert answer.min() == 0 and answer.max() == 10


def test_files_of_every_form_are_read(tmp_path):
    array = np.arange(1, 97, dtype=np.uint16).reshape(tiny.SIZE) * 600
    array[0, 0] = 0
    wanted = np.where(array > 0, array * 0.001, np.nan).astype(np.float32)[None]
    files = {"a.png": Image.fromarray(array), "a.tif": Image.fromarray(array.astype(np.float32))}
    for name, picture in files.items():
        picture.save(tmp_path / name)
    np.save(tmp_path / "a.npy", array)
    for name in (*files, "a.npy"):
        np.testing.assert_array_equal(read_map(tmp_path / name, unit=0.001, void=0), wanted)
    flow = values(2, *tiny.SIZE)
    for name, saved in (("first.npy", flow), ("last.npy", flow.transpose(1, 2, 0))):
        np.save(tmp_path / name, saved)
        assert np.array_equal(read_map(tmp_path / name), flow)
    Image.new("RGB", (4, 4), (0, 255, 51)).save(tmp_path / "n.png")
    np.testing.assert_allclose(read_map(tmp_path / "n.png", "normals")[:, 0, 0], [-1, 1, -0.6], atol=1e-6)


def test_a_given_picture_is_read_in_the_data_sets_unit(tmp_path):
    array = np.full(tiny.SIZE, 2500, np.uint16)
    Image.fromarray(array).save(tmp_path / "d.png")
    np.testing.assert_allclose(depth(unit=0.001).parse(str(tmp_path / "d.png")), 2.5)
    with pytest.raises(ConfigError, match=r"depth: .*d\.png holds no value from 0 to 10"):
        depth().parse(str(tmp_path / "d.png"))


@pytest.mark.parametrize("array", [np.zeros(5), np.zeros((2, 8, 12)), np.full((8, 12), "a")])
def test_a_file_of_another_shape_is_refused(tmp_path, array):
    np.save(tmp_path / "d.npy", array)
    with pytest.raises(ConfigError, match=r"depth: cannot read a map from .*want"):
        depth().parse(str(tmp_path / "d.npy"))


def test_pictures_show_values_in_a_colour_map_and_vectors_by_direction():
    ramp = np.linspace(0, 10, 96).reshape(1, 1, *tiny.SIZE)
    shown = paint(ramp, (0, 10), "values")
    assert shown[0, 0, 0].tolist() == [68, 1, 84] and shown[0, -1, -1].tolist() == [253, 231, 36]
    normals = paint(np.array([0, 0, 1.0]).reshape(1, 3, 1, 1), (-1, 1), "normals")
    assert normals[0, 0, 0].tolist() == [128, 128, 255]
    right, still = (
        paint(np.array(flow).reshape(1, 2, 1, 1), (-5, 5), "flow") for flow in ([5.0, 0], [0.0, 0])
    )
    assert right[0, 0, 0].tolist() == [255, 0, 0] and still[0, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, r"depth\.dim \(0\) must be at least 1"),
        ({"content": "heat"}, r"depth: got content 'heat'.*normals \(dim 3\)"),
        ({"content": "normals"}, r"depth: got content 'normals' with dim 1"),
        ({"likelihood": "cauchy"}, r"depth\.likelihood: got 'cauchy', want gaussian or laplace"),
        ({"sigma": 0}, r"depth\.sigma \(0\)"),
        ({"range": None}, r"depth\.range: got None, want \[lowest, highest\]"),
        ({"range": [3, 1]}, r"depth\.range: got \[3, 1\]"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        depth(**options)


def test_a_number_of_channels_that_differs_from_the_data_set_is_refused():
    with pytest.raises(ConfigError, match=r"depth\.dim \(2\) differs from the data set's 1"):
        MapModality.resolve("depth", MapOptions(type="map", dim=2), tiny.COLUMNS)


@pytest.mark.parametrize(
    "content", [b"\x93NUMPY", b"\x93NUMPY\x01\x00\x06\x00{{'a'(", b"\x89PNG\r\n\x1a\n\x00"]
)
def test_a_damaged_file_is_refused_as_unreadable(content):
    with pytest.raises((OSError, ValueError)):
        read_map(content)
