"""Sprites: drawn scenes of coloured shapes with known truth, for tests and exact checks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.base import Item, Options, Pipeline
from mmdiff_ray.modalities.image import to_png

Grid = np.ndarray
PLACE = ("x", "y", "radius")
NEAREST, FARTHEST = 1.0, 5.0
"""Range of depth: shapes lie from 1 to 2, the background from 3 to 5."""
FACTORS = ("one", "red", "green", "blue", "x", "y", "radius", "cos", "sin")


def _polygon(corners: int) -> Callable[[Grid, Grid], Grid]:
    """Return the inside of a regular polygon with a corner at (0, -1)."""

    def inside(x: Grid, y: Grid) -> Grid:
        normals = (math.pi / corners + 2 * math.pi * k / corners - math.pi / 2 for k in range(corners))
        reach = math.cos(math.pi / corners)
        return np.logical_and.reduce([x * math.cos(a) + y * math.sin(a) <= reach for a in normals])

    return inside


def _star(x: Grid, y: Grid) -> Grid:
    """Return the inside of a five-pointed star: its five edges' lines leave at most one of them outside."""
    normals = (2 * math.pi * k / 5 - math.pi / 2 for k in range(5))
    reach = math.cos(2 * math.pi / 5)
    return np.sum([x * math.cos(a) + y * math.sin(a) > reach for a in normals], axis=0) <= 1


SHAPES: dict[str, Callable[[Grid, Grid], Grid]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": _polygon(4),
    "triangle": _polygon(3),
    "star": _star,
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95),
}
"""Name -> the points inside the shape, within the circle of radius 1 (x to the right, y down)."""


@dataclass(frozen=True)
class Shape:
    """One shape. name: of SHAPES; color: RGB, 0..255; x, y, radius: in pictures (0..1); angle: in radians."""

    name: str
    color: tuple[int, int, int]
    x: float
    y: float
    radius: float
    angle: float

    def covers(self, size: int) -> Grid:
        """Return which pixels have their centre inside the shape, bool (size, size)."""
        centres = (np.arange(size) + 0.5) / size
        x = (centres[None, :] - self.x) / self.radius
        y = (centres[:, None] - self.y) / self.radius
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return SHAPES[self.name](x * cos + y * sin, y * cos - x * sin)


@dataclass(frozen=True)
class Scene:
    """A background, two colours that run into each other along an angle, and shapes, the last in front."""

    start: tuple[int, int, int]
    end: tuple[int, int, int]
    angle: float
    shapes: tuple[Shape, ...]

    def draw(self, size: int) -> tuple[Grid, Grid]:
        """Return the picture, uint8 (size, size, 3), and the class of each pixel (0 = background), uint8."""
        pixels, mask = self._background(size), np.zeros((size, size), np.uint8)
        for shape in self.shapes:
            covered = shape.covers(size)
            pixels[covered] = shape.color
            mask[covered] = 1 + list(SHAPES).index(shape.name)
        return pixels, mask

    def depth(self, size: int) -> Grid:
        """Return the depth of each pixel, float32 (size, size).

        The background recedes towards its darker end. Shapes in front are nearer; of one alone, the larger.
        """
        share = self._share(size)
        far = share if sum(self.start) >= sum(self.end) else 1 - share
        depth = 3 + 2 * far
        for index, shape in enumerate(reversed(self.shapes)):
            behind = (0.36 - shape.radius) / 0.18  # 0 for the largest, 1 for the smallest
            depth[shape.covers(size) & (depth >= 3)] = 1 + (index + behind) / len(self.shapes)
        return depth.astype(np.float32)

    def _share(self, size: int) -> Grid:
        """Return how much of the second colour the background has in each pixel, (size, size)."""
        centres = (np.arange(size) + 0.5) / size - 0.5
        along = centres[None, :] * math.cos(self.angle) + centres[:, None] * math.sin(self.angle)
        return along / math.sqrt(2) + 0.5

    def _background(self, size: int) -> Grid:
        share = self._share(size)[..., None]
        return np.round(np.array(self.start) * (1 - share) + np.array(self.end) * share).astype(np.uint8)

    def main(self, size: int) -> Shape:
        """Return the shape that most pixels of the picture show."""
        seen = np.full((size, size), -1)
        for index, shape in enumerate(self.shapes):
            seen[shape.covers(size)] = index
        return self.shapes[int(np.bincount(seen[seen >= 0], minlength=len(self.shapes)).argmax())]


def draw_scene(seed: int, index: int, most: int = 1) -> Scene:
    """Return scene number index of a seed, with 1 to `most` shapes. It depends on these three alone."""
    rng = np.random.default_rng([seed, index, most])
    start, end = _draw_color(rng), _draw_color(rng)
    shapes = tuple(_draw_shape(rng, start) for _ in range(rng.integers(1, most + 1)))
    return Scene(start, end, float(rng.uniform(0, 2 * math.pi)), shapes)


def _draw_color(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(level) for level in rng.integers(0, 256, 3))
    return red, green, blue


def _draw_shape(rng: np.random.Generator, background: tuple[int, int, int]) -> Shape:
    color = _draw_color(rng)
    while abs(np.subtract(color, background)).sum() < 160:
        color = _draw_color(rng)
    radius = float(rng.uniform(0.18, 0.36))
    x, y = (float(value) for value in rng.uniform(radius, 1 - radius, 2))
    name = list(SHAPES)[rng.integers(len(SHAPES))]
    return Shape(name, color, x, y, radius, float(rng.uniform(0, 2 * math.pi)))


def factors_of(shape: Shape) -> np.ndarray:
    """Return colour, position, radius and angle of a shape as a unit vector, float32 (9,), in FACTORS' order.

    The first number is 1 before normalising, so dividing by it gives the others back: colour and position in
    [-1, 1], the radius doubled.
    """
    color = [level / 127.5 - 1 for level in shape.color]
    place = [2 * shape.x - 1, 2 * shape.y - 1, 2 * shape.radius]
    vector = np.array([1, *color, *place, math.cos(shape.angle), math.sin(shape.angle)])
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@dataclass(frozen=True)
class SpritesOptions(Options):
    """count: how many scenes; size: pixels a side; most: most shapes in a scene; seed: of the scenes."""

    count: int = 2048
    size: int = 32
    most: int = 1
    seed: int = 0


@registry.register("pipeline", "sprites")
class Sprites(Pipeline):
    """Drawn scenes of coloured shapes: picture, mask of shapes, the main shape's name and exact factors."""

    Options = SpritesOptions
    annotations: ClassVar[tuple[str, ...]] = ("shapes", "shape", "factors")
    credit = "Drawn by mmdiff-ray; free to use."

    def __init__(self, options: SpritesOptions) -> None:
        super().__init__(options)
        for key in ("count", "size", "most"):
            if getattr(options, key) < 1:
                raise ConfigError(f"{key} ({getattr(options, key)}) must be at least 1")

    def columns(self) -> dict[str, dict[str, Any]]:
        names = list(SHAPES)
        return {
            "pixels": {"kind": "image", "channels": 3},
            "shapes": {"kind": "mask", "classes": 1 + len(names), "names": ["background", *names]},
            "shape": {"kind": "label", "names": names},
            "factors": {"kind": "embedding", "dim": len(FACTORS), "codec": "sprites-factors"},
            "name": {"kind": "text"},
        }

    def items(self) -> list[Item]:
        seed, most = self.options.seed, self.options.most
        return [Item(f"{seed}/{most}/{index:07d}", index) for index in range(self.options.count)]

    def row(self, item: Item) -> dict[str, Any]:
        return self.truth(draw_scene(self.options.seed, item.source, self.options.most))

    def truth(self, scene: Scene) -> dict[str, Any]:
        """Return a scene as a row."""
        pixels, mask = scene.draw(self.options.size)
        main = scene.main(self.options.size)
        return {
            "pixels": to_png(pixels),
            "shapes": to_png(mask),
            "shape": list(SHAPES).index(main.name),
            "factors": factors_of(main),
            "name": ", ".join(shape.name for shape in scene.shapes),
        }


ATTRIBUTES: dict[str, Callable[[Shape], bool]] = {
    "large": lambda shape: shape.radius > 0.27,
    "left": lambda shape: shape.x < 0.5,
    "upper": lambda shape: shape.y < 0.5,
    "warm": lambda shape: shape.color[0] > shape.color[2],
    "bright": lambda shape: sum(shape.color) > 1.5 * 255,
}
"""Name -> whether a shape has it."""


COLORS = {
    **{"black": (0, 0, 0), "grey": (128, 128, 128), "white": (255, 255, 255)},
    **{"red": (224, 32, 32), "green": (32, 192, 32), "blue": (32, 32, 224)},
    **{"yellow": (224, 224, 32), "cyan": (32, 224, 224), "pink": (224, 64, 224)},
}
"""Name -> the colour that it stands for; a shape's colour has the nearest one's name."""
WORDS = ["a", "large", "small", *COLORS, *SHAPES, "at", "the", "upper", "lower", "left", "right"]


def caption_of(shape: Shape) -> str:
    """Return a sentence of 8 words that describes a shape: "a large red star at the upper left"."""
    has = {name: holds(shape) for name, holds in ATTRIBUTES.items()}
    color = min(COLORS, key=lambda name: float(np.square(np.subtract(COLORS[name], shape.color)).sum()))
    where = ("upper" if has["upper"] else "lower", "left" if has["left"] else "right")
    return " ".join(("a", "large" if has["large"] else "small", color, shape.name, "at", "the", *where))


@registry.register("pipeline", "scenes")
class Scenes(Sprites):
    """Sprites with a depth map, and the attributes, the place and a description of the main shape."""

    annotations = (*Sprites.annotations, "depth", "attributes", "place", "caption")

    def columns(self) -> dict[str, dict[str, Any]]:
        return super().columns() | {
            "depth": {"kind": "map", "range": [NEAREST, FARTHEST]},
            "attributes": {"kind": "labels", "names": list(ATTRIBUTES)},
            "place": {"kind": "vector", "names": list(PLACE)},
            "caption": {"kind": "text", "words": WORDS},
        }

    def truth(self, scene: Scene) -> dict[str, Any]:
        main = scene.main(self.options.size)
        return super().truth(scene) | {
            "depth": scene.depth(self.options.size)[None],
            "attributes": [name for name, holds in ATTRIBUTES.items() if holds(main)],
            "place": [main.x, main.y, main.radius],
            "caption": caption_of(main),
        }
