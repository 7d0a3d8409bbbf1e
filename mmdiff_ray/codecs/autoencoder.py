"""Autoencoders in the folder layout of diffusers, from local files: pictures to latents and back."""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff_ray.config import ConfigError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
KINDS = ("AutoencoderKL", "AutoencoderTiny")
TILE, OVERLAP = 512, 128
"""Pixels a side above which pictures are coded in tiles, and how far neighbours overlap."""
BATCH = 8
"""Pictures coded at a time."""


class Codec:
    """A frozen autoencoder. Making one reads the configuration and hashes the files; the weights load at the
    first use and never travel between processes.

    folder: holds config.json and diffusion_pytorch_model.safetensors; no other file is read. digest: SHA-256
    that the two files must have; None: any. Raises ConfigError for a folder that is none, or another codec.
    """

    def __init__(self, folder: str, digest: str | None = None) -> None:
        self.folder = str(Path(folder).expanduser().absolute())
        try:
            config, weights = ((Path(self.folder) / name).read_bytes() for name in (CONFIG, WEIGHTS))
            facts = json.loads(config)
            self.kind, self.channels = str(facts["_class_name"]), int(facts["latent_channels"])
            self.factor = 2 ** (len(facts["block_out_channels"]) - 1)
        except OSError as error:
            raise ConfigError(
                f"no codec in {folder} ({error.strerror}); want {CONFIG} and {WEIGHTS}, as diffusers saves "
                "them"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder}/{CONFIG} describes no autoencoder: {error!r}") from None
        if self.kind not in KINDS:
            raise ConfigError(f"{folder}/{CONFIG} is of a {self.kind}, want {' or '.join(KINDS)}")
        self.digest = hashlib.sha256(config + weights).hexdigest()
        self.codec_id = f"{self.kind}@{self.digest[:8]}"
        """Names the kind and, after the @, the files."""
        if digest not in (None, self.digest):
            raise ConfigError(
                f"{folder} holds the codec {self.codec_id}, but the latents are of one @{digest[:8]}; name "
                "the folder of that one, or build the data again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "model"}

    @functools.cached_property
    def model(self) -> Any:
        """Return the network, frozen, on a GPU if there is one. Raises ConfigError if it cannot be loaded."""
        diffusers = _diffusers()
        notes = diffusers.logging
        loud = notes.get_verbosity()
        notes.set_verbosity_error()  # it warns of keys that it wrote itself
        try:
            model, found = getattr(diffusers, self.kind).from_pretrained(
                self.folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
                torch_dtype=torch.float32, output_loading_info=True,
            )  # fmt: skip
            if missing := found["missing_keys"]:
                raise ValueError(f"the weights lack {len(missing)} tensors, such as {missing[0]}")
        except Exception as error:  # diffusers and safetensors raise kinds of their own
            reason = str(error).splitlines()[0]
            raise ConfigError(f"cannot load the codec in {self.folder}: {reason}") from None
        finally:
            notes.set_verbosity(loud)
        return model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the latents of pictures, float32 (B, channels, h, w), on the CPU; AutoencoderKL gives means.

        pictures: uint8 (B, 3, h * factor, w * factor). Raises ConfigError for other sizes.
        """
        if any(side % self.factor for side in pictures.shape[2:]):
            height, width = pictures.shape[2:]
            raise ConfigError(
                f"pictures of {height} x {width} pixels have no latents by {self.folder}: build them with "
                f"sides that are multiples of {self.factor} (size)"
            )
        return self._in_batches(lambda part: encoded(self.model, part.float() / 127.5 - 1), pictures, True)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures of latents (B, channels, h, w): uint8 (B, 3, h * factor, w * factor), on the
        CPU."""
        pixels = self._in_batches(lambda part: self.model.decode(part.float()).sample, latents, False)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def _in_batches(self, function: Callable[[Tensor], Tensor], values: Tensor, encodes: bool) -> Tensor:
        units = (self.factor, 1) if encodes else (1, self.factor)
        device, sizes = self.model.device, (max(1, TILE // self.factor), OVERLAP // self.factor)
        with torch.autocast(device.type, enabled=False):
            parts = [tiled(function, part.to(device), *sizes, *units).cpu() for part in values.split(BATCH)]
        return torch.cat(parts)


load_codec = functools.lru_cache(maxsize=4)(Codec)
"""Return the codec of (folder, digest), loaded once per process."""


def encoded(model: Any, pixels: Tensor) -> Tensor:
    """Return the latents of pixels in [-1, 1], (B, 3, H, W), of an AutoencoderKL the means."""
    found = model.encode(pixels)
    return found.latents if hasattr(found, "latents") else found.latent_dist.mean


def new_autoencoder(channels: int, factor: int, width: int, kl: bool) -> Any:
    """Return an untrained autoencoder of diffusers: an AutoencoderKL, or an AutoencoderTiny.

    channels: of the latents; factor: pixels a side per cell, a power of 2; width: channels inside.
    """
    stages = int(math.log2(factor)) + 1
    if kl:
        return _diffusers().AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=tuple(width * min(2**stage, 4) for stage in range(stages)),
            latent_channels=channels,
            norm_num_groups=math.gcd(32, width),
        )
    blocks, widths = (1, *(2,) * (stages - 1)), (width,) * stages
    return _diffusers().AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
        latent_channels=channels,
    )


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, side: int, overlap: int, unit_in: int, unit_out: int
) -> Tensor:
    """Return function(x), for a large x from tiles that overlap and are blended linearly.

    x: (B, C, h * unit_in, w * unit_in); the result has h * unit_out and w * unit_out. side, overlap: of a
    tile, in cells.
    """
    height, width = x.shape[2] // unit_in, x.shape[3] // unit_in
    if max(height, width) <= side:
        return function(x)
    total: Any = 0.0
    weights = x.new_zeros(height * unit_out, width * unit_out, dtype=torch.float32)
    for top in _starts(height, side, overlap):
        for left in _starts(width, side, overlap):
            rows, columns = slice(top, min(top + side, height)), slice(left, min(left + side, width))
            part = function(x[:, :, _scaled(rows, unit_in), _scaled(columns, unit_in)])
            ramps = [_ramp(length, overlap * unit_out, x.device) for length in part.shape[2:]]
            weight, place = (
                ramps[0][:, None] * ramps[1],
                (_scaled(rows, unit_out), _scaled(columns, unit_out)),
            )
            if isinstance(total, float):
                total = part.new_zeros(*part.shape[:2], *weights.shape)
            total[:, :, *place] += part * weight
            weights[place] += weight
    return total / weights


def _starts(length: int, side: int, overlap: int) -> list[int]:
    """Return where tiles begin that cover a length evenly."""
    count = max(1, math.ceil((length - overlap) / (side - overlap)))
    return [round(start) for start in torch.linspace(0, max(0, length - side), count).tolist()]


def _scaled(part: slice, unit: int) -> slice:
    return slice(part.start * unit, part.stop * unit)


def _ramp(length: int, overlap: int, device: torch.device) -> Tensor:
    """Return the weights of a tile's rows, which rise from its edges: (length,)."""
    steps = torch.arange(length, device=device) + 0.5
    return steps.minimum(length - steps).clamp(max=max(1, overlap))


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise ConfigError("latents need diffusers: pip install 'mmdiff-ray[latents]'") from None
    return diffusers
