"""The log-mel spectrogram of audio detectors against librosa's, in noise and in real recordings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffad_fast.data.audio import read_audio
from diffad_fast.representations import LogMel
from diffad_fast.representations.logmel import mel_filters

librosa = pytest.importorskip("librosa")

DCASE = {"rate": 16000, "n_fft": 1024, "n_mels": 128}
WIDE = {"rate": 44100, "n_fft": 2048, "n_mels": 48, "fmin": 50.0, "fmax": 14000.0}
ODD = {"rate": 22050, "n_fft": 1102, "n_mels": 64}  # 50 ms: no power of two


def assert_equal_to_librosa(wave: np.ndarray, hop: int, rate: int, n_fft: int, n_mels: int, **more):
    expected = librosa.power_to_db(
        librosa.feature.melspectrogram(
            y=wave, sr=rate, n_fft=n_fft, hop_length=hop, n_mels=n_mels, center=False, **more
        ),
        top_db=None,
    )
    found = LogMel(rate, n_fft, hop, n_mels, **more)(torch.from_numpy(wave)[None])[0].numpy()
    assert found.dtype == expected.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("options", [DCASE, WIDE, ODD])
def test_noise(options):
    limits = {k: v for k, v in options.items() if k in ("fmin", "fmax")}
    rate, n_fft, n_mels = options["rate"], options["n_fft"], options["n_mels"]
    theirs = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, **limits, dtype=np.float64)
    assert np.abs(mel_filters(**options) - theirs).max() < 1e-15
    ends = {"fmin": 0.0, "fmax": rate / 2} | limits
    middles = librosa.mel_frequencies(n_mels=n_mels + 2, **ends)[1:-1]
    frequencies = LogMel(rate, n_fft, 300, n_mels, **limits).frequencies
    np.testing.assert_allclose(frequencies, middles, rtol=1e-12)
    wave = 0.1 * np.random.default_rng(0).standard_normal(30_000, dtype=np.float32)
    assert_equal_to_librosa(wave, 300, **options)


def test_recordings(data_dir):
    """Their quiet bands lie up to 100 dB below the loud ones: float32 would not do."""
    paths = sorted((data_dir / "urbansound8k" / "audio" / "fold1").glob("*.flac"))[::20]
    if not paths:
        pytest.skip(f"{data_dir} has no recordings of UrbanSound8K")
    for path in paths:
        assert_equal_to_librosa(read_audio(str(path), 16000), 256, 16000, 1024, 64)
