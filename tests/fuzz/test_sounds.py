"""Sounds: flipped bits in headers and samples."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from mmdiff_ray.modalities.audio import AudioModality, AudioOptions, read_sound
from tests.fuzz.cases import Refused, answer, damaged, fuzz
from tests.modalities.tiny import tone, wav

soundfile = pytest.importorskip("soundfile", reason="pip install 'mmdiff-ray[audio]'")


def encoded() -> list[bytes]:
    """Return short sounds in several formats."""
    found = [wav(tone(600, 0.05))]
    for form, subtype in (("WAV", "FLOAT"), ("WAV", "PCM_24"), ("FLAC", "PCM_16")):
        sink = io.BytesIO()
        soundfile.write(sink, tone(600, 0.05), 8000, subtype, format=form)
        found.append(sink.getvalue())
    return found


@fuzz(10, data=st.sampled_from(encoded()).flatmap(lambda one: damaged(one, 60)))
def test_a_damaged_sound_is_unreadable_or_finite(data, tmp_path_factory):
    try:
        samples, rate = read_sound(data)
        assert samples.ndim == 1 and np.isfinite(samples).all() and rate > 0
    except (OSError, ValueError):
        pass
    modality = AudioModality("sound", AudioOptions(type="audio", seconds=0.1), (8, 8))
    file = Path(tmp_path_factory.getbasetemp()) / "x.wav"
    file.write_bytes(data)
    value = answer(lambda: modality.parse(str(file)))
    if not isinstance(value, Refused):
        assert value.shape == (1, 8, 8) and np.isfinite(value).all()
