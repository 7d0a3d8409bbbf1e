import numpy as np
import pytest

from mmdiff_ray.evaluation import tiles


def test_equal_texts_look_equal_and_others_do_not() -> None:
    assert np.array_equal(tiles.text_tile("Food & Drink"), tiles.text_tile("Food & Drink"))
    assert not np.array_equal(tiles.text_tile("Food & Drink")[0, 0], tiles.text_tile("Flags")[0, 0])


def test_no_text_is_a_blank_tile() -> None:
    assert np.array_equal(tiles.text_tile(" "), tiles.blank_tile())


@pytest.mark.parametrize(
    "text", ["a", "woman in manual wheelchair facing right", "w" * 300, "many words " * 60]
)
@pytest.mark.parametrize("size", [24, 96, 192])
def test_a_text_stays_inside_its_tile(text: str, size: int) -> None:
    tile = tiles.text_tile(text, size)
    written = (tile != tile[0, 0]).any(axis=-1)
    assert tile.shape == (size, size, 3)
    assert written.any()
    margin = max(1, size // 32)
    assert not written[:margin].any() and not written[-margin:].any()
    assert not written[:, :margin].any() and not written[:, -margin:].any()


def test_wrapped_lines_fit_the_width_and_keep_all_words_if_there_is_room() -> None:
    text = "every word of this sentence has to come back in the order in which it went in"
    lines = tiles.wrap(text, 12, 120, 20)
    assert " ".join(lines) == text
    assert all(tiles.text_width(line, 12) <= 120 for line in lines)
    short = tiles.wrap(text, 12, 120, 2)
    assert len(short) == 2 and short[1].endswith("…") and tiles.text_width(short[1], 12) <= 120


@pytest.mark.parametrize("length", [1, 5, 64])
def test_a_short_vector_shows_its_components_by_sign(length: int) -> None:
    vector = np.where(np.arange(length) % 3 == 0, 1.0, -1.0) / np.sqrt(length)
    side = int(np.ceil(np.sqrt(length)))
    tile = tiles.vector_tile(vector, 20 * side)[10::20, 10::20].reshape(-1, 3).astype(int)[:length]
    assert ((tile[:, 0] > tile[:, 2]) == (vector > 0)).all()  # orange has more red than blue


def test_like_embeddings_look_alike_and_their_length_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    vector, other = rng.normal(size=384), rng.normal(size=384)
    near = vector + 0.3 * rng.normal(size=384)
    tile, near_tile, other_tile = (tiles.vector_tile(v, 96).astype(float) for v in (vector, near, other))
    assert np.array_equal(tile, tiles.vector_tile(7 * vector, 96))
    assert 0 < 2 * abs(tile - near_tile).mean() < abs(tile - other_tile).mean()


@pytest.mark.parametrize(("shape", "kept"), [((10, 20), (48, 96)), ((200, 100), (96, 48))])
def test_a_picture_keeps_its_proportions_on_white(shape: tuple[int, int], kept: tuple[int, int]) -> None:
    square = np.asarray(tiles.fit(np.zeros((*shape, 3), dtype=np.uint8), 96))
    dark = (square == 0).all(axis=-1)
    assert square.shape == (96, 96, 3)
    assert (dark.any(axis=1).sum(), dark.any(axis=0).sum()) == kept
    assert (square[~dark] == 255).all()
