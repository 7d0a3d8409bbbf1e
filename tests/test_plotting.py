"""Labels in figures do not overlap, and a figure in a page can be found by what it shows."""

import numpy as np
from matplotlib.text import Text

from mmdiff_ray.plotting import label_points, panels, spread, to_svg


def test_boxes_are_spread_close_to_their_places_and_inside_the_limits():
    assert spread([0.2, 0.8], [0.1, 0.1], 0, 1) == [0.2, 0.8]
    np.testing.assert_allclose(spread([0.5, 0.5, 0.5], [0.1, 0.2, 0.1], 0, 1), [0.35, 0.5, 0.65])
    np.testing.assert_allclose(spread([0.0, 0.0], [0.1, 0.1], 0, 1), [0.05, 0.15])
    np.testing.assert_allclose(spread([0.3, 0.99, 1.0], [0.1, 0.1, 0.1], 0, 1), [0.3, 0.85, 0.95])
    rng = np.random.default_rng(0)
    centres, heights = sorted(rng.random(12)), list(rng.uniform(0.02, 0.08, 12))
    found = np.array(spread(centres, heights, 0, 1))
    assert (np.diff(found) >= (np.array(heights[1:]) + heights[:-1]) / 2 - 1e-9).all()


def test_labels_of_crowded_points_do_not_overlap():
    figure, (axes,) = panels(1, 1, (9, 5))
    points = [(x, y) for x in (0.5, 0.503, 0.506) for y in (0.5, 0.505)] + [(0.0, 0.0), (1.0, 1.0)]
    axes.scatter(*zip(*points, strict=True))
    label_points(axes, [(x, y, str(at + 10)) for at, (x, y) in enumerate(points)], points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without its line
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])


def test_svg_marks_artists_by_their_gid_and_repeats_no_id():
    figure, axes = panels(2, 2, (4, 3))
    for panel in axes:
        panel.plot([0, 1], [0, 1], marker="o", gid="trial-7")
        panel.set_xlabel("samples < 10")
    svg = to_svg(figure, "first") + to_svg(figure, "second")
    assert svg.count('data-trial="7"') == 4 and "samples &lt; 10" in svg
    ids = [part.split('"')[0] for part in svg.split(' id="')[1:]]
    assert len(set(ids)) == len(ids) > 0, "an element would be drawn with the shape of another"
