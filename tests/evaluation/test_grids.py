import io

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray.evaluation.grids import LINE, NOTES, Panel, cell_size, grid, mosaic, stack
from mmdiff_ray.modalities.image import to_png


def pictures(count: int = 3, size: int = 16, seed: int = 0) -> np.ndarray:
    """Return pictures with no white in them, so that they can be found on a page."""
    return np.random.default_rng(seed).integers(0, 200, (count, size, size, 3), dtype=np.uint8)


def cells(page: Image.Image, cell: int) -> list[tuple[int, int, np.ndarray]]:
    """Return (top, left, content) of every framed cell on a page, found by the corners of its frame."""
    array = np.asarray(page)
    line = (array == LINE).all(axis=-1)
    corner = line[:-1, :-1] & line[1:, :-1] & line[:-1, 1:] & ~line[1:, 1:]
    tops, lefts = np.nonzero(corner)
    found = [(int(top) + 1, int(left) + 1) for top, left in zip(tops, lefts, strict=True)]
    return [(y, x, array[y : y + cell, x : x + cell]) for y, x in found if _framed(line, y, x, cell)]


def _framed(line: np.ndarray, y: int, x: int, cell: int) -> bool:
    sides = (line[y - 1, x : x + cell], line[y + cell, x : x + cell], line[y : y + cell, x - 1])
    return all(len(side) == cell and bool(side.all()) for side in sides)


def enlarged(picture: np.ndarray, cell: int) -> np.ndarray:
    return np.kron(picture, np.ones((cell // len(picture), cell // len(picture), 1), dtype=np.uint8))


def test_every_picture_is_on_the_page_enlarged_pixel_by_pixel_samples_downwards() -> None:
    first, second = Panel("pixels", pictures(seed=1), "given"), Panel("mask", pictures(seed=2), "generated")
    found = cells(grid([first, second], "Title", "subtitle", names=["one", "two", "three"]), 96)
    assert len(found) == 6
    for number, (_, _, content) in enumerate(sorted(found, key=lambda cell: cell[:2])):
        panel = (first, second)[number % 2]
        assert np.array_equal(content, enlarged(panel.pictures[number // 2], 96))


def test_across_rows_is_the_same_table_turned() -> None:
    panels = [Panel("pixels", pictures(seed=1)), Panel("mask", pictures(seed=2))]
    found = cells(grid(panels, across="rows"), 96)
    assert len(found) == 6
    for number, (_, _, content) in enumerate(sorted(found, key=lambda cell: cell[:2])):
        assert np.array_equal(content, enlarged(panels[number // 3].pictures[number % 3], 96))


def test_blocks_deal_the_samples_to_tables_side_by_side() -> None:
    panel = Panel("pixels", pictures(5), captions=["a", "b", "c", "d", "e"])
    one, two = grid([panel]), grid([panel], blocks=2)
    assert len(cells(one, 96)) == len(cells(two, 96)) == 5
    assert len({left for _, left, _ in cells(two, 96)}) == 2
    assert two.height < one.height


def test_a_mosaic_is_about_square_and_in_reading_order() -> None:
    panel = Panel("Food & Drink", pictures(7))
    found = sorted(cells(mosaic(panel), 96), key=lambda cell: cell[:2])
    assert [len([1 for top, _, _ in found if top == row]) for row in sorted({f[0] for f in found})] == [
        3,
        3,
        1,
    ]
    for picture, (_, _, content) in zip(panel.pictures, found, strict=True):
        assert np.array_equal(content, enlarged(picture, 96))


@pytest.mark.parametrize(
    ("side", "cell"), [(16, 96), (28, 84), (32, 96), (64, 128), (80, 80), (96, 96), (128, 128), (512, 96)]
)
def test_cells_are_a_multiple_of_small_pictures(side: int, cell: int) -> None:
    assert cell_size([Panel("", pictures(1, side)), Panel("", pictures(1, 1024))], 96) == cell


def test_a_note_stands_once_over_neighbours_and_its_line_spans_them() -> None:
    panels = [
        Panel("a", pictures(), "given"),
        Panel("b", pictures(), "given"),
        Panel("c", pictures(), "truth"),
    ]
    page = np.asarray(grid(panels))
    lines = {note: (page == NOTES[note]).all(axis=-1).sum(axis=1).max() for note in ("given", "truth")}
    assert lines["truth"] == 96
    assert 2 * 96 < lines["given"] < 2.2 * 96


def test_titles_and_names_change_the_page_and_stay_on_it() -> None:
    plain = grid([Panel("", pictures())] * 4)
    long = "a name so long that it must be wrapped more than once and in the end be cut off, " * 3
    full = grid([Panel(long, pictures(), "note", [long] * 3)] * 4, long, long, names=[long] * 3)
    assert full.width > plain.width and full.height > plain.height
    edge = np.asarray(full).astype(int)
    for border in (edge[:8], edge[-8:], edge[:, :8], edge[:, -8:]):
        assert (border == 255).all()


@pytest.mark.parametrize("cell_px", [64, 96, 128])
@pytest.mark.parametrize("across", ["columns", "rows"])
def test_title_as_long_as_those_of_rules_is_not_cut_off(cell_px: int, across: str) -> None:
    """A cut title would draw the same page whatever its last word is."""
    titles = [f"nearest palette colour, unlike the {word}" for word in ("border", "margin")]
    pages = [grid([Panel(title, pictures())], across=across, cell_px=cell_px) for title in titles]
    assert pages[0].size != pages[1].size or np.any(np.asarray(pages[0]) != np.asarray(pages[1]))


@pytest.mark.parametrize(
    ("panels", "options", "message"),
    [
        ([], {}, "at least one picture"),
        ([Panel("a", pictures(0))], {}, "at least one picture"),
        ([Panel("a", pictures(2)), Panel("b", pictures(3))], {}, "'b': 3 pictures, 0 captions; want 2"),
        ([Panel("a", pictures(2), captions=["x"])], {}, "'a': 2 pictures, 1 captions; want 2"),
        ([Panel("a", pictures(2) / 255.0)], {}, "must be uint8"),
        ([Panel("a", pictures(2))], {"names": ["x"]}, "1 names for 2 samples"),
        ([Panel("a", pictures(2))], {"across": "diagonally"}, "columns or rows"),
    ],
)
def test_what_does_not_fit_together_is_refused(panels: list[Panel], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(panels, **options)


def test_the_bytes_of_a_page_are_a_png_of_the_same_page() -> None:
    page = grid([Panel("pixels", pictures())], "Title")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(to_png(page)))), np.asarray(page))


def test_stacked_pages_keep_their_pixels() -> None:
    pages = [grid([Panel("a", pictures(2))], "A"), grid([Panel("b", pictures(5))], "B" * 80)]
    whole = np.asarray(stack(pages, gap=3))
    assert np.array_equal(whole[: pages[0].height, : pages[0].width], np.asarray(pages[0]))
    assert np.array_equal(whole[pages[0].height + 3 :, : pages[1].width], np.asarray(pages[1]))
