from __future__ import annotations

import numpy as np
import pytest
import torch

from diffad_fast.representations import AudioTokens, LogMel
from diffad_fast.representations.logmel import MODULATION_BANDS, mel_filters, time_map

RATE = 16000
DCASE = {"rate": RATE, "n_fft": 1024, "n_mels": 128}
WIDE = {"rate": 44100, "n_fft": 2048, "n_mels": 48, "fmin": 50.0, "fmax": 14000.0}


def chirp() -> np.ndarray:
    t = np.arange(RATE) / RATE
    rising = 0.5 * np.sin(2 * np.pi * (200 * t + 1500 * t * t))
    return (rising + 0.05 * np.sin(2 * np.pi * 3000 * t)).astype(np.float32)


def noise(clips=3, samples=RATE, seed=0, level=0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return level * torch.randn(clips, samples, generator=generator)


def tokens(window=32, step=8, n_mels=32) -> AudioTokens:
    return AudioTokens(LogMel(RATE, 512, 256, n_mels), window, step)


# --- log-mel spectrograms

# librosa 0.11: filters.mel(sr=rate, ..., dtype=float64): total, sum of squares, peaks (row, column)
FILTERS = [
    (DCASE, 8.18838044060668, 0.14269633507166332, {(0, 1): 0.028577779716932577,
     (20, 31): 0.030580147145066256, (47, 73): 0.028476442681966918}),
    (WIDE, 2.2290890001862134, 0.010778458956951177, {(0, 6): 0.012484680372526452,
     (20, 82): 0.007359680636897994, (47, 604): 0.001037513458900225}),
]  # fmt: skip

# librosa 0.11: power_to_db(feature.melspectrogram(y=chirp(), sr=16000, n_fft=1024, hop_length=256,
# n_mels=64, center=False), top_db=None) at (band, frame)
CHIRP = {(0, 0): -43.311279, (0, 58): -100.0, (10, 0): -36.467987, (30, 25): 16.498877,
         (30, 58): -100.0, (45, 58): 12.302532, (63, 25): -100.0}  # fmt: skip


@pytest.mark.parametrize(("options", "total", "squares", "peaks"), FILTERS)
def test_filters_equal_stored_figures_of_librosa(options, total, squares, peaks):
    filters = mel_filters(**options)
    assert filters.shape == (options["n_mels"], options["n_fft"] // 2 + 1)
    assert filters.sum() == pytest.approx(total, rel=1e-12)
    assert (filters**2).sum() == pytest.approx(squares, rel=1e-12)
    for (row, column), value in peaks.items():
        assert filters[row].argmax() == column
        assert filters[row, column] == pytest.approx(value, rel=1e-12)


def test_spectrogram_equals_stored_figures_of_librosa():
    found = LogMel(RATE, 1024, 256, 64)(torch.from_numpy(chirp())[None])[0]
    assert found.shape == (64, 59)
    for place, value in CHIRP.items():
        assert float(found[place]) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("cast", ["float", "half", "bfloat16", "double"])
def test_a_part_of_a_model_that_is_cast(cast):
    mel, waves = LogMel(16000, 256, 64, 16), torch.rand(2, 4000)
    whole = getattr(torch.nn.Sequential(mel, torch.nn.Linear(59, 2)), cast)()
    assert torch.equal(whole[0](waves), LogMel(16000, 256, 64, 16)(waves))
    assert whole[1].weight.dtype == getattr(torch, cast)


@pytest.mark.parametrize("limits", [(0.0, None), (500.0, 7000.0)])
def test_a_band_is_loudest_of_a_tone_at_its_frequency(limits):
    mel = LogMel(RATE, 4096, 1024, 32, *limits)
    assert mel.frequencies.shape == (32,) and (np.diff(mel.frequencies) > 0).all()
    tones = np.sin(2 * np.pi * mel.frequencies[:, None] * np.arange(8192) / RATE)
    heard = mel(torch.from_numpy(tones).float()).mean(dim=2)
    assert heard.argmax(dim=1).tolist() == list(range(32))


def test_silence_is_the_floor():
    assert torch.equal(
        LogMel(RATE, 512, 256, 16)(torch.zeros(1, 4096)), torch.full((1, 16, 15), -100.0)
    )


# --- tokens


def test_means_of_bands_follow_the_level():
    raw, waves = tokens(), noise()
    quiet, loud = raw._tokens(waves)[..., :32], raw._tokens(2 * waves)[..., :32]
    assert torch.allclose(loud - quiet, torch.full_like(quiet, 20 * np.log10(2)), atol=1e-3)
    mel = raw.logmel(waves)
    assert torch.allclose(quiet[:, 1], mel[:, :, 8:40].mean(dim=2), atol=1e-4)


@pytest.mark.parametrize("octave", [0, 1, 2, 3])
def test_modulation_stands_in_its_octave(octave):
    """A carrier in every band, its level swinging 2^octave times in each window of 32 frames."""
    raw = tokens()
    t = torch.arange(raw.window * 256 * 4, dtype=torch.float64)
    swing = 1 + 0.5 * torch.sin(2 * torch.pi * t / (raw.window * 256) * 1.3 * 2**octave)
    clicks = (t % 64 == 0).double()
    wave = (swing * clicks).float()[None]
    shape = raw._tokens(wave)[0, :, 48:112].unflatten(-1, (MODULATION_BANDS, -1))
    assert shape.shape[2] == 4  # octaves of a window of 32
    assert (shape.mean(dim=(0, 1)).argmax()) == octave
    assert shape.sum(dim=2).abs().max() < 1e-3


def test_depth_and_correlations_of_bands_that_move_together():
    """Noise below 1 kHz and noise above 4 kHz, faded together, against each other, or not."""
    raw = tokens(window=64, step=64)
    rng = np.random.default_rng(0)
    t = np.arange(64 * 256 + 512) / RATE
    spectrum = np.fft.rfft(rng.standard_normal((2, len(t))))
    hertz = np.fft.rfftfreq(len(t), 1 / RATE)
    low, high = (
        np.fft.irfft(spectrum[i] * keep, len(t))
        for i, keep in enumerate((hertz < 1000, hertz > 4000))
    )
    fade = np.exp(1.5 * np.sin(2 * np.pi * 4 * t))

    def of(wave):
        row = raw._tokens(torch.from_numpy(wave.astype(np.float32))[None])[0, 0]
        matrix = torch.zeros(8, 8)
        matrix[raw.pairs[0], raw.pairs[1]] = row[-28:]
        return row[32:48], matrix[0, 7]

    depth, together = of(fade * low + fade * high)
    _, against = of(fade * low + high / fade)
    still, neither = of(low + high)
    assert together > 0.8 and against < -0.8 and abs(neither) < 0.4
    # 1.5 in the exponent of an amplitude swings by 13 dB, some 20 times what the noise does.
    assert (depth[0] - still[0]) > 0.5 and (depth[15] - still[15]) > 0.5


def test_whitened_on_what_it_was_fitted_on():
    representation = tokens()
    batches = [noise(6, 40_000, seed) * 10 ** (torch.rand(6, 1) - 0.5) for seed in range(4)]
    representation.fit(lambda: batches)
    rows = torch.cat([representation.encode(x)[0] for x in batches])
    assert rows.shape == (24, 1, 16, 32 + 16 * 5 + 28) and [rows.shape[3]] == representation.dims
    rows = rows.flatten(0, 2).double()
    assert rows.mean(dim=0).abs().max() < 1e-3
    # Against the definition: correlations, eigenvalues no less than a tenth of the largest.
    raw = torch.cat([representation._tokens(x) for x in batches]).flatten(0, 1).double()
    values = torch.linalg.eigvalsh(torch.corrcoef(raw.T))
    expected = values / values.clamp(min=0.1 * values[-1])
    assert torch.allclose(rows.var(dim=0, correction=0), expected, atol=1e-4)
    covariance = torch.cov(rows.T)
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-4


def test_contributions_add_up_and_find_the_band():
    representation = tokens()
    waves = noise(8, 40_000)
    representation.fit(lambda: [waves])
    normal = representation.encode(waves)[0]
    t = torch.arange(40_000) / RATE
    strange = representation.encode(waves + 0.2 * torch.sin(2 * torch.pi * 2000 * t))[0]
    shares = representation.contributions(strange)
    assert torch.allclose(shares.sum(dim=-1), strange.square().mean(dim=-1), rtol=1e-3)
    filters = mel_filters(RATE, 512, 32)
    band = filters[:, round(2000 / RATE * 512)].argmax()
    assert (shares.mean(dim=(0, 1, 2)).argmax()) == band
    assert representation.contributions(normal).shape == (*normal.shape[:3], 32)


def test_time_map_is_the_mean_over_windows_at_each_time():
    shares = torch.arange(10.0).view(1, 5, 2)  # 5 windows, 2 bands
    found = time_map(shares, window=32, step=16)
    expected = torch.tensor([[0, 1, 3, 5, 7, 8], [1, 2, 4, 6, 8, 9]], dtype=torch.float32)
    assert torch.allclose(found[0], expected)
