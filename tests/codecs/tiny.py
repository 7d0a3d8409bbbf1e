"""Small autoencoders with random weights, in the layout of diffusers."""

from pathlib import Path

import pytest
import torch


def save_codec(folder: Path, *, channels: int = 3, factor: int = 2, kl: bool = False, seed: int = 0) -> str:
    """Save a random autoencoder and return its folder. Skips the test where diffusers is missing."""
    pytest.importorskip("diffusers", reason="pip install 'mmdiff-ray[latents]'")
    from mmdiff_ray.codecs.autoencoder import new_autoencoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new_autoencoder(channels, factor, width=8, kl=kl).save_pretrained(folder)
    return str(folder)
