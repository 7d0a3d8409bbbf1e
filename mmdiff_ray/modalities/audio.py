"""Sounds as log-mel spectrograms: a map of frequency and time, in decibels."""

import dataclasses
import io
import math
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mmdiff_ray.config import ConfigError, ModalityConfig, decoding
from mmdiff_ray.modalities.base import RowContext, need_column
from mmdiff_ray.modalities.map import NPY, MapModality
from mmdiff_ray.registry import register

RATES = (100, 768_000)
"""Lowest and highest rate of a sound that is read."""
GRIFFIN_LIM_STEPS = 32
"""Steps in which a phase is found for a spectrogram."""


@dataclass(frozen=True)
class AudioOptions(ModalityConfig):
    """The keys of audio.

    column: Parquet column; null: the modality's name.
    seconds: duration; longer sounds are cut, shorter ones end in silence.
    rate: samples per second; sounds of another rate are resampled.
    range: quietest and loudest level in dB; 0 is a sine of full scale. Levels outside are clipped.
    likelihood: gaussian or laplace.
    sigma: standard deviation of the likelihood, in standard deviations of the level.
    """

    column: str | None = None
    seconds: float = 1.0
    rate: int = 16_000
    range: list[float] = dataclasses.field(default_factory=lambda: [-80.0, 0.0])
    likelihood: str = "gaussian"
    sigma: float = 1.0
    dim: ClassVar[int] = 1
    content: ClassVar[str] = "values"
    unit: ClassVar[None] = None


@register("modality", "audio")
class AudioModality(MapModality):
    """Sounds. data: float32 (B, 1, H, W), the level in dB of H mel bands, the highest first, at W times;
    all else as of a map."""

    Options = AudioOptions

    def __init__(self, name: str, options: AudioOptions, size: tuple[int, int]) -> None:
        super().__init__(name, options, size)
        if not options.seconds > 0 or options.rate < 1000:
            raise ConfigError(
                f"modalities.{name}: seconds ({options.seconds:g}) must be above 0, rate ({options.rate}) at "
                "least 1000"
            )
        self.spectrum = MelSpectrum(size, options.rate, options.seconds)

    @classmethod
    def resolve(cls, name: str, options: Any, columns: Mapping[str, Mapping[str, Any]]) -> Any:
        column = options.column or name
        entry = need_column(name, column, columns, ("audio", "map"))
        if entry["kind"] == "map" and entry["channels"] != 1:
            raise ConfigError(
                f"modalities.{name}: a spectrogram has 1 channel, {column!r} {entry['channels']}"
            )
        limits = entry["range"] if entry["kind"] == "map" else options.range
        return dataclasses.replace(options, column=column, range=limits)

    def decode(self, row: Mapping[str, Any]) -> np.ndarray | None:
        stored = row[self.column]
        return None if stored is None else self._levels(stored)

    def augment(self, decoded: np.ndarray, context: RowContext) -> np.ndarray:
        return decoded  # a mirrored sound would run backwards

    def _levels(self, data: bytes) -> np.ndarray:
        """Return the spectrogram of a sound's or a .npy file's bytes. Raises ValueError."""
        if data.startswith(NPY):
            with decoding():
                values = np.load(io.BytesIO(data), allow_pickle=False)
            return self._fit(values, self.size)
        samples, rate = read_sound(data)
        levels = self.spectrum.levels(resample(samples, rate, self.options.rate))
        return levels.clip(self.low, self.high)[None].astype(np.float32)

    def sound(self, data: Tensor) -> tuple[int, np.ndarray]:
        """Return the sampling rate and a sound, int16 (n,), that has about the levels of one row's data."""
        samples = self.spectrum.samples(data[0].double().cpu().numpy())
        return self.options.rate, (samples.clip(-1, 1) * 32767).round().astype(np.int16)

    def parse(self, text: str) -> np.ndarray:
        """Return the spectrogram of a sound file, or the one in a .npy file. Raises ConfigError."""
        try:
            return self._levels(Path(text).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.name}: cannot read a sound from {text!r}: {error}; a sound is given as a .wav or "
                ".flac file, a spectrogram as a .npy file"
            ) from None

    def write(self, data: Tensor, stem: Path) -> Path:
        """Write the spectrogram as a .npy file, and beside it a sound with these levels, as a .wav file."""
        Path(f"{stem}.wav").write_bytes(self.wav(data))
        return super().write(data, stem)

    def wav(self, data: Tensor) -> bytes:
        (rate, samples), file = self.sound(data), io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setparams((1, 2, rate, len(samples), "NONE", ""))
            sound.writeframes(samples.astype("<i2").tobytes())
        return file.getvalue()


class MelSpectrum:
    """Levels of H mel bands at W times of a sound, and sounds of such levels.

    Windows are centred on the middles of the W times and overlap by three quarters or more. Bands are
    triangles between points that lie evenly on the mel scale, 2595 log10(1 + f / 700), up to half the rate.
    """

    def __init__(self, size: tuple[int, int], rate: int, seconds: float) -> None:
        bands, times = size
        self.length = round(rate * seconds)
        hop = self.length / times
        self.window = np.hanning(2 ** math.ceil(math.log2(max(4 * hop, rate / 20))) + 1)[:-1]
        width = len(self.window)
        starts = np.round((np.arange(times) + 0.5) * hop).astype(int)  # in a sound padded by half a window
        self.frames = starts[:, None] + np.arange(width)  # (W, width)
        frequency = np.fft.rfftfreq(width, 1 / rate)
        edges = 700 * (10 ** (np.linspace(0, np.log10(1 + rate / 1400), bands + 2)) - 1)
        below, middle, above = edges[:-2, None], edges[1:-1, None], edges[2:, None]
        rising, falling = (frequency - below) / (middle - below), (above - frequency) / (above - middle)
        self.bands = np.minimum(rising, falling).clip(0)  # (H, width / 2 + 1)
        nearest = np.abs(frequency - middle).argmin(1)
        self.bands[np.arange(bands), nearest] = self.bands[np.arange(bands), nearest].clip(1e-3)

    def levels(self, samples: np.ndarray) -> np.ndarray:
        """Return the levels of samples from -1 to 1 in dB, (H, W); at least -120."""
        held = np.zeros(self.length)
        held[: len(samples)] = samples[: self.length]
        power = np.abs(self._transform(held)) ** 2  # (W, width / 2 + 1)
        return 10 * np.log10((self.bands @ power.T)[::-1].clip(1e-12))

    def samples(self, levels: np.ndarray) -> np.ndarray:
        """Return samples (n,) that have about these levels, by a phase that fits them.

        Source: Griffin and Lim, "Signal Estimation from Modified Short-Time Fourier Transform", 1984.
        """
        power = np.linalg.pinv(self.bands) @ 10 ** (levels[::-1] / 10)
        magnitude = np.sqrt(power.clip(0)).T  # (W, width / 2 + 1)
        phase = np.random.default_rng(0).uniform(0, 2 * np.pi, magnitude.shape)
        spectrum = magnitude * np.exp(1j * phase)
        for _ in range(GRIFFIN_LIM_STEPS):
            found = self._transform(self._inverse(spectrum))
            spectrum = magnitude * found / np.abs(found).clip(1e-12)
        return self._inverse(spectrum)

    def _transform(self, samples: np.ndarray) -> np.ndarray:
        """Return the spectra of all windows; a sine of full scale has magnitude 1."""
        padded = np.pad(samples, len(self.window) // 2)
        return np.fft.rfft(padded[self.frames] * self.window) / (self.window.sum() / 2)

    def _inverse(self, spectrum: np.ndarray) -> np.ndarray:
        """Return the samples whose spectra are nearest to these."""
        width = len(self.window)
        parts = np.fft.irfft(spectrum, width) * (self.window.sum() / 2)
        squares = np.broadcast_to(self.window**2, parts.shape)
        total, weight = (
            np.bincount(self.frames.ravel(), values.ravel(), self.length + width)
            for values in (parts * self.window, squares)
        )
        return (total / weight.clip(1e-3))[width // 2 : width // 2 + self.length]


def read_sound(data: bytes) -> tuple[np.ndarray, int]:
    """Return the samples of a sound file's bytes, float (n,), 1 being full scale, the mean of its channels;
    and its rate. Raises OSError or ValueError; ConfigError where a format needs soundfile."""
    samples, rate = _read_pcm(data) or _read_any(data)
    if not RATES[0] <= rate <= RATES[1] or not np.isfinite(samples).all():
        raise ValueError(f"want finite samples at {RATES[0]:,} to {RATES[1]:,} per second; got {rate:,}")
    return samples, rate


def _read_pcm(data: bytes) -> tuple[np.ndarray, int] | None:
    """Return what `read_sound` does of a 16-bit .wav file, None for others."""
    if data[:4] != b"RIFF":
        return None
    try:
        with decoding(), wave.open(io.BytesIO(data)) as file:
            if file.getsampwidth() != 2:
                return None
            frames = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            return frames.reshape(-1, file.getnchannels()).mean(1) / 32768, file.getframerate()
    except ValueError:
        return None  # it may hold numbers other than PCM


def _read_any(data: bytes) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError:
        raise ConfigError(
            "sounds other than 16-bit .wav need soundfile: pip install 'mmdiff-ray[audio]'"
        ) from None
    with decoding():
        samples, rate = soundfile.read(io.BytesIO(data), always_2d=True)
    return samples.mean(1), rate


def checked_sound(data: bytes) -> bytes:
    """Return a sound file's bytes. Raises ValueError if they cannot be read."""
    if not len(read_sound(data)[0]):
        raise ValueError("the sound is empty")
    return data


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return samples at another rate."""
    from scipy.signal import resample_poly

    return samples if rate == wanted else resample_poly(samples, wanted, rate)
