"""Sounds: levels of known tones, sounds of given levels, files of any rate and format."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmdiff_ray.config import ConfigError
from mmdiff_ray.data.batches import split_batches
from mmdiff_ray.data.schema import make_column
from mmdiff_ray.datasets.build import build
from mmdiff_ray.datasets.inspect import _cell
from mmdiff_ray.evaluation.context import Context
from mmdiff_ray.evaluation.regression import evaluate_maps
from mmdiff_ray.modalities.audio import AudioModality, AudioOptions, read_sound
from mmdiff_ray.modalities.base import RowContext
from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.runs import job as jobs
from mmdiff_ray.sampling.generator import Generator
from tests import sprites
from tests.datasets.reading import read_rows
from tests.modalities.tiny import npy, tone, wav

RATE = 8000


def audio(size: tuple[int, int] = (32, 40), **options) -> AudioModality:
    given = {"seconds": 0.5, "rate": RATE, **options}
    return AudioModality("sound", AudioOptions(type="audio", **given), size)


def levels(samples: np.ndarray, modality: AudioModality | None = None, rate: int = RATE) -> np.ndarray:
    made = modality or audio()
    return made.decode({"sound": wav(samples, rate)})[0]


def mel(hertz: float) -> float:
    return 2595 * float(np.log10(1 + hertz / 700))


@pytest.mark.parametrize("hertz", [300, 1000, 2500])
def test_a_tone_is_loudest_in_the_band_of_its_frequency_and_as_loud_as_it_is(hertz):
    found = levels(tone(hertz, 0.5, RATE, 0.1))
    band = 31 - int(found[:, 20].argmax())  # the highest band is on top
    centre = (band + 1) * mel(RATE / 2) / 33
    assert abs(mel(hertz) - centre) <= mel(RATE / 2) / 33
    assert found.max() == pytest.approx(-20, abs=3.5)  # between two bands it is in both
    assert levels(tone(hertz, 0.5, RATE, 0.2)).max() - found.max() == pytest.approx(
        20 * np.log10(2), abs=0.05
    )


def test_short_sounds_end_in_silence_and_long_ones_are_cut():
    short, long = levels(tone(1000, 0.25)), levels(tone(1000, 2.0))
    assert short.shape == long.shape == (32, 40)
    assert short[:, 30:].max() == -80 and short[:, :15].max() > -10
    np.testing.assert_allclose(short[:, :12], long[:, :12], atol=0.5)
    assert levels(np.zeros(100)).max() == levels(np.zeros(0)).max() == -80


@pytest.mark.parametrize("rate", [4000, 11025, 44100])
def test_any_rate_gives_the_same_levels(rate):
    found = levels(tone(700, 0.5, rate), rate=rate)
    loud = levels(tone(700, 0.5)) > -40
    np.testing.assert_allclose(
        found[:, 4:-4][loud[:, 4:-4]], levels(tone(700, 0.5))[:, 4:-4][loud[:, 4:-4]], atol=1
    )


def test_flac_stereo_and_float_files_are_read_like_wav():
    soundfile = pytest.importorskip("soundfile", reason="pip install 'mmdiff-ray[audio]'")
    samples = tone(600)
    for form, subtype in (("FLAC", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "PCM_24"), ("WAV", "PCM_U8")):
        file = io.BytesIO()
        soundfile.write(file, np.stack([samples, samples], 1), RATE, subtype, format=form)
        found, rate = read_sound(file.getvalue())
        assert rate == RATE
        np.testing.assert_allclose(found, samples, atol=1 / 120 if subtype == "PCM_U8" else 1e-4)
        stored, _ = make_column("sound", {"kind": "audio"}).accept(file.getvalue())
        assert stored == file.getvalue()


def test_a_sound_of_given_levels_has_about_these_levels(tmp_path):
    modality = audio((48, 40))
    sweep = 0.5 * np.sin(2 * np.pi * np.cumsum(np.linspace(300, 3000, RATE // 2)) / RATE)
    data = torch.from_numpy(modality.decode({"sound": wav(sweep)}))
    rate, samples = modality.sound(data)
    assert rate == RATE and samples.dtype == np.int16 and len(samples) == RATE // 2
    again = levels(samples / 32768, modality)
    loud = data[0].numpy() > -25
    assert np.abs(again - data[0].numpy())[loud].mean() < 3
    modality.write(data, tmp_path / "out")
    np.testing.assert_array_equal(modality.parse(str(tmp_path / "out.npy")), data.numpy())
    heard = modality.parse(str(tmp_path / "out.wav"))[0]
    np.testing.assert_allclose(heard[again > -50], again[again > -50], atol=0.1)


def test_time_never_runs_backwards():
    row = {"sound": wav(tone(900, 0.2))}
    contexts = [RowContext((32, 40), 0, visit, 0) for visit in range(8)]
    assert {context.mirrored for context in contexts} == {True, False}
    first, *others = (audio().read(row, context, {}) for context in contexts)
    assert all(np.array_equal(first, other) for other in others)


def test_a_data_set_may_hold_spectrograms():
    made = np.full((1, 32, 40), -30, np.float32)
    options = AudioModality.resolve(
        "sound", AudioOptions(type="audio"), {"sound": {"kind": "map", "channels": 1, "range": [-60, 0]}}
    )
    modality = AudioModality("sound", options, (32, 40))
    assert options.range == [-60, 0] and np.array_equal(modality.decode({"sound": npy(made)}), made)
    with pytest.raises(ConfigError, match=r"a spectrogram has 1 channel, 'sound' 3"):
        AudioModality.resolve(
            "sound", AudioOptions(type="audio"), {"sound": {"kind": "map", "channels": 3, "range": [-60, 0]}}
        )


def test_a_column_takes_sounds_alone_and_is_drawn():
    with pytest.raises(ConfigError, match=r"want the bytes of a .wav or .flac file"):
        make_column("sound", {"kind": "audio"}).accept(npy(np.zeros(4)))
    drawn = _cell({"kind": "audio"}, wav(tone(900)), 0.0)
    assert drawn.shape == (64, 96, 3) and drawn.dtype == np.uint8 and drawn.std() > 10


HERTZ = (400, 1800)


def sounding_pictures(folder: Path, kind: str) -> str:
    """Write 20 red pictures with a deep tone and 20 blue ones with a high one, and return the source."""
    folder.mkdir()  # pytest's own folder is named like a split
    pictures, sounds = [], [wav(tone(hertz, 0.5, RATE)) for hertz in HERTZ]
    for channel in (0, 2):
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[..., channel] = 255
        pictures.append(to_png(pixels))
    if kind == "folder":
        for index in range(40):
            (folder / f"{index}.png").write_bytes(pictures[index % 2])
            (folder / f"{index}.wav").write_bytes(sounds[index % 2])
        return str(folder)
    if kind == "parquet":
        table = {
            part: [{"bytes": values[index % 2], "path": f"{index}"} for index in range(40)]
            for part, values in (("image", pictures), ("audio", sounds))
        }
        pq.write_table(pa.table(table), folder / "clips.parquet")
        return str(folder / "clips.parquet")
    with tarfile.open(folder / "clips.tar", "w") as archive:
        for index in range(40):
            for suffix, values in (("png", pictures), ("wav", sounds)):
                member = tarfile.TarInfo(f"{index:03d}.{suffix}")
                member.size = len(values[index % 2])
                archive.addfile(member, io.BytesIO(values[index % 2]))
    return str(folder / "clips.tar")


def test_a_sound_that_cannot_be_read_costs_its_row(tmp_path):
    source = sounding_pictures(tmp_path / "clips", "folder")
    (tmp_path / "clips" / "7.wav").write_bytes(b"no sound")
    (tmp_path / "clips" / "8.wav").unlink()
    build("folder", str(tmp_path / "set"), {"source": source, "size": "8"}, workers=0, progress=False)
    rows = read_rows(str(tmp_path / "set"))
    assert len(rows) == 39 and "7.png" not in rows and rows["8.png"]["sound"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("parquet", {"map": "pixels=image,sound=audio:audio"}),
        ("webdataset", {"map": "pixels=png,sound=wav"}),
        ("folder", {}),
    ],
)
def test_sounds_are_learned_from_pictures_of_a_built_data_set(kind, fields, tmp_path):
    source = sounding_pictures(tmp_path / "clips", kind)
    options = {"source": source, "size": "8", "val_share": 0.0, **fields}
    build(kind, str(tmp_path / "set"), options, workers=0, progress=False)
    plain = {
        "name": "sounds",
        "space": {"height": 8, "width": 8},
        "modalities": {
            "pixels": {"type": "image"},
            "sound": {"type": "audio", "seconds": 0.5, "rate": RATE},
        },
        "tasks": {"hear": {"roles": {"pixels": "given", "sound": "generated"}, "readout": "likely"}},
        "model": sprites.MODEL,
        "train": {"samples": 2400, "global_batch": 16, "learning_rate": 5e-3, "ema_samples": 64},
        "evaluate": {"evaluators": [], "steps": 5},
    }
    job = jobs.prepare(sprites.config(str(tmp_path / "set"), plain=plain), tmp_path)
    trainer = sprites.trainer(job)
    trainer.advance(sprites.batches(job), 2400)
    model = Generator(job.config, trainer.ema.model)
    splits = [manifest.splits["train"] for manifest in job.manifests]
    (batch,) = split_batches(job.reader(job.denoiser()), splits, 8, 8)
    findings = evaluate_maps(Context(model, batch))
    figures = {one.key: one for one in findings.figures}
    assert {"sound_0_predicted", "sound_0_true"} <= set(findings.sounds)
    for file in findings.sounds.values():
        samples, rate = read_sound(file)
        assert rate == model.modality("sound").options.rate and np.abs(samples).max() > 0
    assert figures["sound/rmse_likely"].value < 0.3 * figures["sound/rmse_likely"].floors["mean map"]
    drawn = model.draw({"pixels": batch.data["pixels"].numpy()}, 8).data["sound"]
    for pixels, levels_drawn in zip(batch.data["pixels"], drawn, strict=True):
        rate, samples = model.modality("sound").sound(levels_drawn)
        heard = np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples)
        assert heard == pytest.approx(HERTZ[int(pixels[2].any())], rel=0.35)  # a band of 8 is wide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, r"sound: seconds \(0\) must be above 0"),
        ({"rate": 8}, r"rate \(8\) at least 1000"),
        ({"range": [0, -80]}, r"sound\.range"),
        ({"sigma": 0}, r"sound\.sigma \(0\) must be above 0"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        audio(**options)
