"""Sound files of every kind come out as the same mono samples, in windows that cover them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from musiclm_fast.audio.reading import read_sound
from musiclm_fast.audio.windows import cut_windows

soundfile = pytest.importorskip("soundfile", reason="needs the demo extra")
soxr = pytest.importorskip("soxr", reason="needs the demo extra")


@pytest.fixture(scope="module")
def tone():
    """A second of a gliding tone with overtones below 4 kHz, at 16 kHz."""
    seconds = np.arange(16000) / 16000
    phase = 2 * np.pi * (300 + 100 * seconds) * seconds
    partials = [np.sin(order * phase) / order for order in range(1, 7)]
    return (0.2 * np.sum(partials, axis=0)).astype(np.float32)


def likeness(a, b):
    """Largest correlation coefficient over shifts of up to 0.1 s."""
    size = min(len(a), len(b))
    a, b = a[:size], b[:size]
    spectrum = np.fft.rfft(a, 2 * size) * np.fft.rfft(b, 2 * size).conj()
    shifts = np.fft.irfft(spectrum)
    return np.concatenate([shifts[:1600], shifts[-1600:]]).max() / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
@pytest.mark.parametrize(
    ("suffix", "at_least"), [(".wav", 0.9999), (".flac", 0.9999), (".ogg", 0.98), (".mp3", 0.98)]
)
def test_formats_and_rates(suffix, at_least, rate, tone, tmp_path):
    resampled = soxr.resample(tone, 16000, rate, quality="VHQ")
    back = soxr.resample(resampled, rate, 16000, quality="VHQ")  # 8 kHz holds a little less
    path = tmp_path / f"tone{suffix}"
    soundfile.write(path, np.stack([resampled * 0.4, resampled * 1.6], axis=1), rate)
    sound = read_sound(path, 16000)
    assert (sound.sample_rate, sound.file_rate, sound.file_channels) == (16000, rate, 2)
    assert sound.wav.dtype == torch.float32
    assert sound.seconds == pytest.approx(1.0, abs=0.1)
    assert likeness(sound.wav.numpy(), back) >= at_least


@pytest.mark.parametrize(
    ("length", "starts"),
    [(3, [0]), (10, [0]), (11, [0, 1]), (20, [0, 5, 10]), (23, [0, 5, 10, 13])],
)
def test_windows_cover_everything(length, starts):
    wav = torch.arange(1.0, length + 1)
    windows = cut_windows(wav, 10)
    padded = torch.nn.functional.pad(wav, (0, max(0, 10 - length)))
    assert windows.tolist() == [padded[s : s + 10].tolist() for s in starts]


def test_silent_windows_are_left_out():
    wav = torch.zeros(100)
    wav[50] = 1.0
    wav[90:] = 1e-4
    assert cut_windows(wav, 10).tolist() == [wav[45:55].tolist(), wav[50:60].tolist()]


@pytest.mark.parametrize("wav", [torch.zeros(100), torch.zeros(0)])
def test_silence_is_refused(wav):
    with pytest.raises(ValueError, match="silence"):
        cut_windows(wav, 10)
