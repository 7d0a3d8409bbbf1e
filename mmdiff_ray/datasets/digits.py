"""Digits: the 1,797 handwritten digits of 8 x 8 pixels that scikit-learn brings along, for quick trials."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdiff_ray import registry
from mmdiff_ray.datasets.base import Item, Options, Pipeline, Stage, look_stages
from mmdiff_ray.modalities.image import to_png

BRIGHTEST = 16


@dataclass(frozen=True)
class DigitsOptions(Options):
    """look: embedder of the picture, which makes the column look: efficientnet-lite0,
    open_clip:MODEL[:weights] or off."""

    look: str = "off"


@registry.register("pipeline", "digits")
class Digits(Pipeline):
    """Handwritten digits of 8 x 8 grey levels on black, and which digit each is."""

    Options = DigitsOptions
    annotations = ("label",)
    credit = "Optical Recognition of Handwritten Digits, by E. Alpaydin and C. Kaynak, 1998, CC BY 4.0."

    def columns(self) -> dict[str, dict[str, Any]]:
        return {
            "pixels": {"kind": "image", "channels": 3},
            "label": {"kind": "label", "names": [str(digit) for digit in range(10)]},
        }

    def stages(self) -> list[Stage]:
        return look_stages(self.options.look)

    def items(self) -> list[Item]:
        from sklearn.datasets import load_digits

        found = load_digits()
        rows = zip(found.images, found.target.tolist(), strict=True)
        return [Item(f"{index:04d}", row) for index, row in enumerate(rows)]

    def row(self, item: Item) -> dict[str, Any]:
        levels, label = item.source  # (8, 8), 0 to 16
        grey = np.rint(levels * (255 / BRIGHTEST)).astype(np.uint8)
        return {"pixels": to_png(np.repeat(grey[..., None], 3, axis=2)), "label": label}
