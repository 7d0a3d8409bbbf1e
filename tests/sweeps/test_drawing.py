"""Names in pictures lie beside what they name, and not over each other."""

import numpy as np

from mmdiff_ray.sweeps.drawing import name_points, panels_of, spread


def test_things_are_spread_near_their_places_and_inside():
    assert spread([0.2, 0.8], [0.1, 0.1], 0, 1) == [0.2, 0.8]
    np.testing.assert_allclose(spread([0.5, 0.5, 0.5], [0.1, 0.2, 0.1], 0, 1), [0.35, 0.5, 0.65])
    np.testing.assert_allclose(spread([0.0, 0.0], [0.1, 0.1], 0, 1), [0.05, 0.15])
    np.testing.assert_allclose(spread([0.3, 0.99, 1.0], [0.1, 0.1, 0.1], 0, 1), [0.3, 0.85, 0.95])
    rng = np.random.default_rng(0)
    centres, heights = sorted(rng.random(12)), list(rng.uniform(0.02, 0.08, 12))
    found = np.array(spread(centres, heights, 0, 1))
    assert (np.diff(found) >= (np.array(heights[1:]) + heights[:-1]) / 2 - 1e-9).all()


def test_names_of_points_that_crowd_do_not_overlap():
    figure, ((axes,),) = panels_of("", 1, 1)
    points = [(x, y) for x in (0.5, 0.503, 0.506) for y in (0.5, 0.505)] + [(0.0, 0.0), (1.0, 1.0)]
    axes.scatter(*zip(*points, strict=True))
    name_points(axes, [(x, y, str(at + 10)) for at, (x, y) in enumerate(points)], points, "k")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])
