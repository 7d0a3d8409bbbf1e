"""LPIPS, the perceptual distance of two images, by the `lpips` package with its real backbones."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmdiff_ray.config import Config
from mmdiff_ray.evaluation.weights import convolutions

SMALLEST = 64
"""The shorter side, in pixels, below which images are enlarged: AlexNet needs more than 16 pixels."""


def check_weights(config: Config) -> None:
    """Raise ConfigError if the weights of AlexNet, or of a backbone in `evaluate.lpips`, are missing."""
    for backbone in {"alex", *config.evaluate.lpips}:
        convolutions(backbone)


class Lpips:
    """The LPIPS distance: 0 for equal images, about 0.1 for a slight and 0.7 for a gross difference.

    Images whose shorter side has fewer than 64 pixels are first enlarged bilinearly (align_corners False) to
    64. Distances are comparable only between images of one size.
    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
    version 0.1 of the linear layers.
    """

    def __init__(self, backbone: str = "alex", device: torch.device | str = "cpu", batch: int = 64) -> None:
        """Load a backbone: "alex" (AlexNet) or "vgg" (VGG16). batch: pairs compared at a time.

        Raises ConfigError if the backbone is unknown or its weights are not on this machine.
        """
        self.device, self.batch = torch.device(device), batch
        self._network = _network(backbone).to(self.device)
        self._mapping = copy.copy(self._network)  # shares the weights
        self._mapping.spatial = True

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair, (B,) float32 on the metric's device.

        a, b: (B, 3, H, W), each uint8 in [0, 255] or float in [-1, 1]. Raises ValueError for anything else.
        """
        _check_pair(a, b)
        pairs = zip(a.split(self.batch), b.split(self.batch), strict=True)
        with torch.autocast(self.device.type, enabled=False):
            parts = [self._network(self._prepare(x), self._prepare(y)).flatten() for x, y in pairs]
        return torch.cat(parts)

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean distance of pairs (B, 3, H, W), with gradients. a, b: float, about [-1, 1]."""
        with torch.autocast(self.device.type, enabled=False):
            return self._network(_enlarged(a.float()), _enlarged(b.float())).mean()

    @torch.no_grad()
    def within(self, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of each pair's map of distances over a mask, (B,); NaN for an empty mask.

        a, b: as for the distance itself; mask: bool (B, H, W). The map has the size at which the network sees
        the images; the mask is enlarged to that by the nearest pixel. The receptive field is large (163
        pixels across in AlexNet, 196 in VGG16), so a difference outside the mask has a weaker
        effect inside. Raises ValueError for other shapes.
        """
        _check_pair(a, b)
        want = (len(a), *a.shape[2:])
        if mask.shape != want or mask.dtype != torch.bool:
            raise ValueError(f"want a bool mask {want}; got {mask.dtype} {tuple(mask.shape)}")
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for x, y, inside in zip(*(v.split(self.batch) for v in (a, b, mask)), strict=True):
                found = self._mapping(self._prepare(x), self._prepare(y))  # (b, 1, h, w)
                inside = inside[:, None].to(self.device).float()
                weight = interpolate(inside, size=found.shape[-2:], mode="nearest-exact")
                parts.append((found * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)))
        return torch.cat(parts)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the backbone's features of images, (B, D) float32 on the metric's device.

        The activations of the five layers that LPIPS compares (after ReLU, not normalised), each averaged
        over space, concatenated: D is 1152 for AlexNet and 1472 for VGG16. Layers with larger activations
        have more weight. images: (B, 3, H, W), in values and size as for the distance. Raises ValueError for
        anything else.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"features need (B, 3, H, W); got {tuple(images.shape)}")
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for part in images.split(self.batch):
                layers = self._network.net(self._network.scaling_layer(self._prepare(part)))
                parts.append(torch.cat([layer.mean((2, 3)) for layer in layers], dim=1))
        return torch.cat(parts)

    def _prepare(self, images: Tensor) -> Tensor:
        """Return images as float32 in [-1, 1], enlarged if they are small. Raises ValueError."""
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1.0
        elif not images.is_floating_point():
            raise ValueError(f"images must be uint8, or float in [-1, 1]; got {images.dtype}")
        elif images.numel() and not images.abs().max() <= 1.001:  # NaN fails too
            largest = images.abs().max().item()
            raise ValueError(f"float images must lie in [-1, 1]; got an absolute value of {largest:.4g}")
        return _enlarged(images.float())


def _enlarged(images: Tensor) -> Tensor:
    """Return images with a shorter side of at least SMALLEST pixels."""
    shorter = min(images.shape[-2:])
    if shorter >= SMALLEST:
        return images
    size = [round(side * SMALLEST / shorter) for side in images.shape[-2:]]
    return interpolate(images, size=size, mode="bilinear", align_corners=False)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3:
        raise ValueError(f"LPIPS compares two (B, 3, H, W); got {tuple(a.shape)} and {tuple(b.shape)}")


def _network(backbone: str) -> Any:
    """Return the package's network with real weights, frozen.

    It is built on the meta device and then filled, so that no weight is ever random: a missing one raises.
    """
    trunk = convolutions(backbone)
    import lpips

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision by deprecated argument names
        network = lpips.LPIPS(net=backbone, pnet_rand=True, pretrained=False, verbose=False)
    file = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{backbone}.pth"
    linear = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(linear, strict=False, assign=True)
    # torchvision's features.N.* are sliceK.N.* in the package
    sliced = {name: trunk["features" + name[name.index(".") :]] for name in network.net.state_dict()}
    network.net.load_state_dict(sliced, strict=True, assign=True)
    return network.requires_grad_(False).eval()
