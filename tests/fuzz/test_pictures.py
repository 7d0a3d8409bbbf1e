"""Pictures and masks: flipped bits in headers, EXIF and pixels."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from mmdiff_ray.data.manifest import MANIFEST
from mmdiff_ray.data.shards import verify
from mmdiff_ray.datasets.build import build
from mmdiff_ray.datasets.pictures import DEPTHS, FITS, UNREADABLE, open_picture
from mmdiff_ray.modalities.image import ORIENTATION
from tests.data import samples
from tests.fuzz.cases import Refused, answer, damaged, fuzz, junk

MODES = ("RGB", "RGBA", "L", "P", "1", "LA", "I;16", "CMYK")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def encoded() -> list[tuple[str, bytes]]:
    """Return small pictures in every format and mode that PIL writes, with EXIF where it can be."""
    rng = np.random.default_rng(0)
    found = []
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010F] = "maker"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    for mode in MODES:
        image = Image.fromarray(rng.integers(0, 256, (12, 16, 4), dtype=np.uint8)).convert("RGBA")
        image = (
            Image.fromarray(rng.integers(0, 2**16, (12, 16), dtype=np.uint16))
            if mode == "I;16"
            else image.convert(mode)
        )
        for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
            sink = io.BytesIO()
            try:
                image.save(sink, form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
            except (OSError, KeyError, ValueError):
                continue
            found.append((form.lower(), sink.getvalue()))
    return found


PICTURES = encoded()
picture = st.sampled_from(PICTURES).flatmap(lambda one: st.tuples(st.just(one[0]), damaged(one[1], 160)))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@fuzz(40, one=picture, depth=st.sampled_from(DEPTHS))
def test_a_damaged_picture_is_unreadable_or_decoded_whole(one, depth):
    ending, content = one
    for file in (io.BytesIO(content), Path(f"x.{ending}")):
        if isinstance(file, Path):
            file.write_bytes(content)
        try:
            opened = open_picture(file, depth)
        except UNREADABLE:
            continue
        assert opened.image.mode in ("RGB", "RGBA")
        assert sorted(opened.image.size) == sorted(opened.raw_size)
        assert np.asarray(opened.image).shape[:2] == opened.image.size[::-1]


@fuzz(20, one=picture, kind=st.sampled_from(["pixels", "alpha", "look", "category", "masked"]), text=junk)
def test_what_a_person_gives_is_refused_or_of_the_modality_s_shape(one, kind, text):
    modality = samples.modalities()[kind]
    Path(f"x.{one[0]}").write_bytes(one[1])
    for words in (f"x.{one[0]}", str(text)):
        value = answer(lambda: modality.parse(words))  # noqa: B023
        if not isinstance(value, Refused):
            assert value.shape == modality.data_shape and value.dtype == modality.data_type


@fuzz(10, vector=st.one_of(st.binary(max_size=90), st.just(0)), change=st.data())
def test_a_damaged_vector_is_refused_or_finite(vector, change):
    sink = io.BytesIO()
    np.save(sink, np.arange(4, dtype=np.float32))
    Path("x.npy").write_bytes(vector or change.draw(damaged(sink.getvalue(), 90)))
    value = answer(lambda: samples.modalities()["look"].parse("x.npy"))
    assert isinstance(value, Refused) or np.isfinite(value).all()


@fuzz(
    20,
    pictures=st.lists(picture, min_size=1, max_size=3),
    masks=st.lists(picture, max_size=3),
    fit=st.sampled_from(FITS),
    ignore=st.sampled_from(["auto", "none", "255", "#ffffff", "x"]),
)
def test_a_folder_of_damaged_pictures_is_refused_or_built_without_them(
    pictures, masks, fit, ignore, tmp_path
):
    for name in ("photos", "masks", "out"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name).mkdir()
    for folder, files in (("photos", pictures), ("masks", masks)):
        for number, (ending, content) in enumerate(files):
            Path(folder, f"{number}.{ending}").write_bytes(content)
    options = {
        "source": "photos",
        "size": "8",
        "fit": fit,
        "ignore": ignore,
        "bad_limit": "100%",
        "val_share": 0,
    }
    options |= {"masks": "masks"} if masks else {}
    built = answer(lambda: build("folder", "out", options, workers=0, progress=False))
    if isinstance(built, Refused):
        assert not Path("out", MANIFEST).exists()
    else:
        assert built.written + len(built.bad) == len(pictures) and verify("out") == []
