"""LPIPS: how far apart two pictures are to the eye, by the `lpips` package with its real backbones."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mmdiff_ray.evaluation import weights

SMALLEST = 64
"""The shorter side, in pixels, below which images are enlarged: AlexNet reduces 16 pixels to nothing."""


class Lpips:
    """The LPIPS distance between images, 0 for equal ones; about 0.1 is a slight and 0.7 a gross difference.

    Images whose shorter side has fewer than 64 pixels are first enlarged bilinearly (align_corners False)
    until it has 64; larger ones are taken as they are. Figures are thus comparable only between images of one
    size.
    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
    version 0.1 of the linear layers.
    """

    def __init__(self, backbone: str = "alex", device: torch.device | str = "cpu", batch: int = 64) -> None:
        """Load a backbone: "alex" (AlexNet) or "vgg" (VGG16). batch: how many pairs are compared at a time.

        Raises ConfigError where the backbone is unknown or its weights are not on this machine.
        """
        self.backbone = backbone
        self.device = torch.device(device)
        self.batch = batch
        self._network = _network(backbone).to(self.device)
        self._mapping = copy.copy(self._network)  # the same weights
        self._mapping.spatial = True

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair, (B,) float32 on the metric's device.

        a, b: (B, 3, H, W), each uint8 in [0, 255] or float in [-1, 1]. Raises ValueError for anything else.
        """
        _check_pair(a, b)
        pairs = zip(a.split(self.batch), b.split(self.batch), strict=True)
        with torch.autocast(self.device.type, enabled=False):
            parts = [
                self._network(self._prepare(x), self._prepare(y)).flatten() for x, y in pairs
            ]  # (b, 1, 1, 1)
        return torch.cat(parts)

    @torch.no_grad()
    def within(self, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        """Return the mean over a mask of the map of distances of each pair, (B,); NaN where a mask is empty.

        a, b: as for the distance itself; mask: bool (B, H, W). The map has the size at which the network sees
        the images: their own, or, for those whose shorter side has fewer than 64 pixels, the size to which
        they are enlarged bilinearly; to that the mask is enlarged too, by the nearest pixel. What each layer
        finds is spread over it bilinearly. A layer sees far around a pixel (163 pixels across in AlexNet, 196
        in VGG16), so what differs outside a mask shows inside, less than where it is. Raises ValueError for
        other shapes.
        """
        _check_pair(a, b)
        if mask.shape != (len(a), *a.shape[2:]) or mask.dtype != torch.bool:
            raise ValueError(
                f"want a bool mask {(len(a), *a.shape[2:])}; got {mask.dtype} {tuple(mask.shape)}"
            )
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
        """Return what the backbone sees in images, (B, D) float32 on the metric's device.

        The activations of the five layers that LPIPS compares (after ReLU, not normalised), each averaged
        over space, one behind the other: D is 1152 for AlexNet and 1472 for VGG16. They are as large as the
        network makes them, so that layers whose activations are larger weigh more. images: (B, 3, H, W), in
        values and size as for the distance. Raises ValueError for anything else.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"features are of (B, 3, H, W); got {tuple(images.shape)}")
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for part in images.split(self.batch):
                layers = self._network.net(self._network.scaling_layer(self._prepare(part)))
                parts.append(torch.cat([layer.mean((2, 3)) for layer in layers], dim=1))
        return torch.cat(parts)

    def _prepare(self, images: Tensor) -> Tensor:
        images = _signed(images.to(self.device))
        shorter = min(images.shape[-2:])
        if shorter >= SMALLEST:
            return images
        size = [round(side * SMALLEST / shorter) for side in images.shape[-2:]]
        return interpolate(images, size=size, mode="bilinear", align_corners=False)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3:
        raise ValueError(f"LPIPS compares two (B, 3, H, W); got {tuple(a.shape)} and {tuple(b.shape)}")


def _signed(images: Tensor) -> Tensor:
    """Return images as float32 in [-1, 1]: uint8 scaled, floats checked to lie there. Raises ValueError."""
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1.0
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8, or float in [-1, 1]; got {images.dtype}")
    if images.numel() and not images.abs().max() <= 1.001:  # NaN fails too
        raise ValueError(
            f"float images must lie in [-1, 1]; got up to {images.abs().max().item():.4g} in size"
        )
    return images.float()


def _network(backbone: str) -> Any:
    """Return the package's network with real weights, frozen.

    It is built without memory and then filled, so nothing in it is ever random: what stays empty raises.
    """
    convolutions = weights.convolutions(backbone)
    import lpips

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision by argument names that it deprecates
        network = lpips.LPIPS(net=backbone, pnet_rand=True, pretrained=False, verbose=False)
    linear = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{backbone}.pth"
    trunk = _in_slices(convolutions, network.net)
    network.load_state_dict(
        torch.load(linear, map_location="cpu", weights_only=True), strict=False, assign=True
    )
    network.net.load_state_dict(trunk, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def _in_slices(convolutions: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """Return features.N.* under the package's names, sliceK.N.*, for each layer the trunk keeps."""
    return {name: convolutions["features" + name[name.index(".") :]] for name in trunk.state_dict()}
