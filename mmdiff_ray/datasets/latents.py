"""The stage of a build that encodes pictures by a frozen autoencoder, once."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmdiff_ray.codecs.autoencoder import Codec
from mmdiff_ray.config import ConfigError, named
from mmdiff_ray.datasets.embedders import over_white

SOURCE, COLUMN = "pixels", "latent"


@dataclass(frozen=True)
class LatentStage:
    """The column `latent` from the column `pixels`, drawn over white where it is transparent. A picture's
    mirror image is encoded, too: mirrored latents are not the latents of what is mirrored."""

    codec: Codec

    @classmethod
    def of(cls, folder: str, columns: Mapping[str, Any]) -> "LatentStage":
        """Return the stage of a codec's folder. Raises ConfigError where there is none, or no picture."""
        if SOURCE not in columns:
            raise ConfigError(f"latent: the data set has no column {SOURCE!r} to encode")
        with named("latent"):
            return cls(Codec(folder))

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return the manifest's entry of the column."""
        codec = self.codec
        facts = {"codec": codec.codec_id, "codec_folder": codec.folder, "codec_digest": codec.digest}
        return {COLUMN: {"kind": "latent", "source": SOURCE, **facts}}

    def __call__(self, made: Any) -> Any:
        """Return a chunk (`Made`) with the column added to its rows; None where a row has no picture."""
        has = [index for index, row in enumerate(made.rows) if row.get(SOURCE) is not None]
        found: dict[int, np.ndarray] = {}
        if has:
            shown = [over_white(Image.open(io.BytesIO(made.rows[index][SOURCE]))) for index in has]
            pictures = torch.from_numpy(np.stack([np.asarray(one) for one in shown])).permute(0, 3, 1, 2)
            both = torch.stack([self.codec.encode(one) for one in (pictures, pictures.flip(-1))], 1)
            found = dict(zip(has, both.half().numpy(), strict=True))  # each (2, channels, h, w)
        return made._replace(rows=[{**row, COLUMN: found.get(i)} for i, row in enumerate(made.rows)])
