"""Scenes of known truth: what is written is what was drawn, and what was drawn has the shapes' areas."""

import io
import math

import numpy as np
import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.build import build
from mmdiff_ray.datasets.sprites import (
    FACTORS,
    SHAPES,
    WORDS,
    Scene,
    Shape,
    caption_of,
    draw_scene,
    factors_of,
)
from tests.datasets.reading import decode, read_rows

AREAS = {
    "circle": math.pi,
    "square": 2.0,
    "triangle": 3 * math.sqrt(3) / 4,
    "star": 10 * math.sin(math.pi / 5) * math.cos(2 * math.pi / 5) / math.cos(math.pi / 5) / 2,
    "ring": 0.7 * math.pi,
    "cross": 4 * 0.95 * 0.6 - 0.36,
}
"""The areas of the shapes in units of the radius squared, by geometry."""


def alone(name: str, angle: float = 0.3) -> Scene:
    shape = Shape(name, (250, 10, 20), 0.5, 0.5, 0.4, angle)
    return Scene((0, 0, 0), (40, 90, 200), 1.0, (shape,))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("sprites") / "set")
    build("sprites", out, {"count": 60, "size": 24, "most": 3, "seed": 5}, workers=0, progress=False)
    return read_rows(out)


@pytest.mark.parametrize("name", SHAPES)
def test_area_of_a_drawn_shape_is_that_of_geometry(name):
    _, mask = alone(name).draw(400)
    assert (mask > 0).mean() == pytest.approx(AREAS[name] * 0.4**2, rel=0.01)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_stays_inside_its_circle_at_any_angle(name):
    for angle in (0.0, 0.7, 2.0, 5.5):
        shape = alone(name, angle).shapes[0]
        assert not (shape.covers(128) & ~Shape("circle", *list(vars(shape).values())[1:]).covers(128)).any()


def test_written_rows_are_the_scenes_drawn_again(built):
    assert len(built) == 60
    for key, row in built.items():
        scene = draw_scene(5, int(key.split("/")[-1]), 3)
        pixels, mask = scene.draw(24)
        assert np.array_equal(decode(row["pixels"]), pixels)
        assert np.array_equal(decode(row["shapes"]), mask)
        assert row["name"].split(", ") == [shape.name for shape in scene.shapes]


def test_label_is_the_shape_that_most_pixels_show(built):
    for key, row in built.items():
        scene = draw_scene(5, int(key.split("/")[-1]), 3)
        owners = np.full((24, 24), -1)
        for index, shape in enumerate(scene.shapes):
            owners = np.where(shape.covers(24), index, owners)
        counts = [(owners == index).sum() for index in range(len(scene.shapes))]
        assert list(SHAPES)[row["shape"]] == scene.shapes[int(np.argmax(counts))].name


def test_factors_give_the_shape_back_exactly_enough_to_redraw_it():
    for index in range(20):
        (shape,) = draw_scene(1, index).shapes
        vector = factors_of(shape)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        one, *colors, x, y, radius, cos, sin = (vector.astype(float) / vector[0]).tolist()
        assert (one, len(vector)) == (1.0, len(FACTORS))
        color = tuple(round((level + 1) * 127.5) for level in colors)
        again = Shape(shape.name, color, (x + 1) / 2, (y + 1) / 2, radius / 2, math.atan2(sin, cos))
        assert again.color == shape.color
        assert (again.covers(64) != shape.covers(64)).sum() <= 1


def test_scenes_are_sprites_with_depth_attributes_place_and_caption(built, tmp_path):
    options = {"count": 60, "size": 24, "most": 3, "seed": 5}
    build("scenes", str(tmp_path / "set"), options, workers=0, progress=False)
    for key, row in read_rows(str(tmp_path / "set")).items():
        assert all(np.array_equal(row[column], value) for column, value in built[key].items())
        scene = draw_scene(5, int(key.split("/")[-1]), 3)
        main, mask = scene.main(24), decode(row["shapes"])
        assert row["place"].tolist() == pytest.approx([main.x, main.y, main.radius])
        assert (0 in row["attributes"]) == (main.radius > 0.27) and (1 in row["attributes"]) == (main.x < 0.5)
        words = row["caption"].split()
        assert set(words) <= set(WORDS) and words[3] == main.name
        assert ("large" in words, "left" in words) == (main.radius > 0.27, main.x < 0.5)
        depth = np.load(io.BytesIO(row["depth"]))[0]
        assert (depth[mask > 0] <= 2).all() and (depth[mask == 0] >= 3).all() and depth.min() >= 1
        front = scene.shapes[-1].covers(24)
        assert len(np.unique(depth[front])) == 1 and depth[front].max() <= depth.min()


def test_a_caption_says_what_the_shape_is_and_where():
    shape = Shape("star", (250, 10, 20), 0.3, 0.6, 0.33, 0.0)
    assert caption_of(shape) == "a large red star at the lower left"


def test_a_larger_shape_is_nearer_and_the_darker_end_of_the_background_farther():
    near, far = (Shape("circle", (9, 9, 9), 0.5, 0.5, radius, 0.0) for radius in (0.36, 0.18))
    depths = [Scene((200, 200, 200), (0, 0, 0), 0.0, (shape,)).depth(32) for shape in (near, far)]
    assert [float(depth[16, 16]) for depth in depths] == pytest.approx([1, 2])
    assert depths[0][0, 0] < depths[0][0, -1] and 3 <= depths[0][0].min() <= depths[0][0].max() <= 5


def test_scene_depends_on_seed_and_index_alone():
    assert draw_scene(3, 8) == draw_scene(3, 8)
    scenes = [draw_scene(3, 8), draw_scene(3, 9), draw_scene(4, 8)]
    assert len({repr(scene) for scene in scenes}) == 3


def test_scenes_have_every_number_of_shapes_up_to_the_most():
    assert {len(draw_scene(0, index, 4).shapes) for index in range(60)} == {1, 2, 3, 4}


def test_size_below_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"size \(0\) must be at least 1"):
        build("sprites", str(tmp_path / "out"), {"size": 0}, workers=0, progress=False)
