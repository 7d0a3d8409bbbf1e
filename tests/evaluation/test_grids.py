"""Grids of pictures: every picture is found on its page, pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray.evaluation.grids import LINE, NOTES, Panel, cell_size, grid, mosaic
from mmdiff_ray.modalities.image import to_png


def pictures(count: int = 3, size: int = 16, seed: int = 0) -> np.ndarray:
    """Return pictures without white, so that they can be found on a page."""
    return np.random.default_rng(seed).integers(0, 200, (count, size, size, 3), dtype=np.uint8)


def cells(page: Image.Image, cell: int = 96) -> list[tuple[int, int, np.ndarray]]:
    """Return (top, left, content) of every framed cell on a page in reading order, found by its frame."""
    array = np.asarray(page)
    line = (array == LINE).all(axis=-1)
    corner = line[:-1, :-1] & line[1:, :-1] & line[:-1, 1:] & ~line[1:, 1:]
    found = []
    for y, x in (np.argwhere(corner) + 1).tolist():
        sides = (line[y - 1, x : x + cell], line[y + cell, x : x + cell], line[y : y + cell, x - 1])
        if all(len(side) == cell and bool(side.all()) for side in sides):
            found.append((y, x, array[y : y + cell, x : x + cell]))
    return sorted(found, key=lambda cell: cell[:2])


def enlarged(picture: np.ndarray, cell: int = 96) -> np.ndarray:
    return np.kron(picture, np.ones((cell // len(picture), cell // len(picture), 1), dtype=np.uint8))


def test_a_grid_has_a_column_per_panel_and_a_row_per_sample() -> None:
    panels = [Panel("pixels", pictures(seed=1), "given"), Panel("mask", pictures(seed=2), "generated")]
    found = cells(grid(panels, "Title", "subtitle", names=["one", "two", "three"]))
    assert len(found) == 6
    for number, (_, _, content) in enumerate(found):
        assert np.array_equal(content, enlarged(panels[number % 2].pictures[number // 2]))


def test_blocks_share_the_samples_between_tables_side_by_side() -> None:
    panel = Panel("pixels", pictures(5))
    one, two = grid([panel]), grid([panel], blocks=2)
    assert len(cells(one)) == len(cells(two)) == 5
    assert len({left for _, left, _ in cells(two)}) == 2
    assert two.height < one.height


def test_a_mosaic_is_about_square_and_in_reading_order() -> None:
    panel = Panel("Food & Drink", pictures(7))
    found = cells(mosaic(panel))
    tops = [top for top, _, _ in found]
    assert [tops.count(top) for top in sorted(set(tops))] == [3, 3, 1]
    for picture, (_, _, content) in zip(panel.pictures, found, strict=True):
        assert np.array_equal(content, enlarged(picture))


@pytest.mark.parametrize(
    ("side", "cell"), [(16, 96), (28, 84), (32, 96), (64, 128), (80, 80), (96, 96), (128, 128), (512, 96)]
)
def test_cells_are_a_multiple_of_small_pictures(side: int, cell: int) -> None:
    assert cell_size([Panel("", pictures(1, side)), Panel("", pictures(1, 1024))]) == cell


def test_a_note_stands_once_over_neighbours_and_its_line_spans_them() -> None:
    panels = [
        Panel(name, pictures(), note) for name, note in zip("abc", ["given", "given", "truth"], strict=True)
    ]
    page = np.asarray(grid(panels))
    lines = {note: (page == NOTES[note]).all(axis=-1).sum(axis=1).max() for note in ("given", "truth")}
    assert lines["truth"] == 96
    assert 2 * 96 < lines["given"] < 2.2 * 96


def test_titles_and_names_enlarge_the_page_and_stay_on_it() -> None:
    plain = grid([Panel("", pictures())] * 4)
    long = "a name so long that it must be wrapped more than once and in the end be cut off, " * 3
    full = grid([Panel(long, pictures(), "note")] * 4, long, long, names=[long] * 3)
    assert full.width > plain.width and full.height > plain.height
    edge = np.asarray(full).astype(int)
    for border in (edge[:8], edge[-8:], edge[:, :8], edge[:, -8:]):
        assert (border == 255).all()


def test_a_title_as_long_as_those_of_rules_is_not_cut_off() -> None:
    """A cut title would draw the same page whatever its last word is."""
    titles = [f"nearest palette colour, unlike the {word}" for word in ("border", "margin")]
    pages = [np.asarray(grid([Panel(title, pictures())])) for title in titles]
    assert not np.array_equal(*pages)


@pytest.mark.parametrize(
    ("panels", "options", "message"),
    [
        ([], {}, "at least one picture"),
        ([Panel("a", pictures(0))], {}, "at least one picture"),
        ([Panel("a", pictures(2)), Panel("b", pictures(3))], {}, "'b': 3 pictures; want 2"),
        ([Panel("a", pictures(2) / 255.0)], {}, "must be uint8"),
        ([Panel("a", pictures(2))], {"names": ["x"]}, "1 names for 2 samples"),
    ],
)
def test_panels_that_do_not_fit_together_are_refused(
    panels: list[Panel], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grid(panels, **options)


def test_a_page_survives_png_unchanged() -> None:
    page = grid([Panel("pixels", pictures())], "Title")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(to_png(page)))), np.asarray(page))
