"""What a backbone hears in windows of clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffad_fast.config import DetectorConfig
from diffad_fast.errors import InputError
from diffad_fast.representations import WindowEmbedding, embedding

CONFIG = DetectorConfig.create(
    kind="audio", sample_rate=8000, n_fft=256, hop=128, n_mels=16, window_frames=32, window_step=8
)


class Ear(torch.nn.Module):
    """Energies of eighths of what it hears, and its largest sample."""

    def __init__(self, samples=None, rate=None):
        super().__init__()
        if samples:
            self.samples = samples
        if rate:
            self.rate = rate

    def forward(self, waves):
        parts = waves.unflatten(1, (8, -1)).square().mean(dim=2)
        return torch.cat([parts, waves.abs().amax(dim=1, keepdim=True)], dim=1)


def expected(waves, size):
    """In float64, window by window and piece by piece."""
    window, step = CONFIG.window_samples, CONFIG.step_samples
    found = []
    for wave in waves.double().numpy():
        rows = []
        for start in range(0, len(wave) - window + 1, step):
            pieces = [
                wave[first : first + size]
                for first in range(start, start + window - size + 1, step)
            ]
            heard = [np.append((p.reshape(8, -1) ** 2).mean(axis=1), abs(p).max()) for p in pieces]
            mean = np.mean(heard, axis=0)
            rows.append(mean / np.linalg.norm(mean))
        found.append(rows)
    return np.array(found)


@pytest.mark.parametrize("size", [None, 1000, 1024, 4000])
def test_every_window_has_the_mean_of_its_pieces(size, monkeypatch):
    monkeypatch.setattr(embedding, "LARGEST_BATCH", 5)
    waves = torch.randn(3, CONFIG.window_samples + 5 * CONFIG.step_samples + 17)
    found = WindowEmbedding(Ear(size), CONFIG)(waves)
    assert found.shape == (3, 6, 9)
    np.testing.assert_allclose(found, expected(waves, size or CONFIG.window_samples), atol=1e-6)


def test_loudness_says_nothing():
    waves = torch.randn(2, CONFIG.window_samples)
    heard = WindowEmbedding(torch.nn.Linear(CONFIG.window_samples, 4, bias=False), CONFIG)
    torch.testing.assert_close(heard(waves), heard(100 * waves))


def test_a_network_is_frozen():
    heard = WindowEmbedding(torch.nn.Linear(CONFIG.window_samples, 4), CONFIG)
    assert not heard.backbone.training
    assert not any(p.requires_grad for p in heard.parameters())


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Ear(rate=16000), "hears 16000 samples a second and sample_rate is 8000"),
        (Ear(samples=8000), "hears 8000 samples at once and a window has 4224"),
        (Ear(samples=1000.0), "attribute samples is 1000.0: make it the whole number"),
    ],
)
def test_what_does_not_fit(backbone, message):
    with pytest.raises(InputError, match=message):
        WindowEmbedding(backbone, CONFIG)


@pytest.mark.parametrize("answer", [lambda x: x.mean(), lambda x: x[:1], lambda x: [x]])
def test_an_answer_that_is_no_embedding(answer):
    class Wrong(torch.nn.Module):
        def forward(self, x):
            return answer(x)

    with pytest.raises(InputError, match="must give one embedding"):
        WindowEmbedding(Wrong(), CONFIG)(torch.randn(2, CONFIG.window_samples))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.long(), "answered with torch.int64: it must give floating"),
        (lambda x: x.numpy(), "answered with float32: it must give floating"),
        (lambda x: x / 0, "answered normal clips with NaN or infinite"),
    ],
)
def test_an_answer_that_cannot_be_learnt_from(answer, message):
    class Wrong(torch.nn.Module):
        def forward(self, x):
            return answer(x)

    with pytest.raises(InputError, match=message):
        WindowEmbedding(Wrong(), CONFIG).of_normals(torch.randn(2, CONFIG.window_samples))
