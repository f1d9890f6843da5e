"""Log-mel spectrograms."""

from __future__ import annotations

import math

import torch

# Power below which nothing is told apart (-100 dB), as in librosa.power_to_db.
SMALLEST_POWER = 1e-10
# Samples whose spectrum is computed at once: on a CPU what its caches hold; elsewhere so many that
# the largest temporary tensors have some 128 MiB, where frames overlap by three quarters.
BLOCK_SAMPLES = {"cpu": 1 << 18}
LARGEST_BLOCK = 1 << 22


def log_mel(waves, window, filters, hop):
    """waves (N,samples), window (n_fft,), filters (bands,n_fft/2+1) -> (N,bands,frames) in dB.

    With frame k the samples [k hop, k hop + n_fft) times the window, 10 log10 of the filters'
    product with the squared magnitudes of its Fourier transform, at least 1e-10. In float64 up to
    the logarithm, which is taken in float32 at least; long clips piece by piece.
    """
    dtype = torch.promote_types(waves.dtype, torch.float32)
    n_fft, samples = len(window), waves.shape[1]
    frames = (samples - n_fft) // hop + 1
    if len(waves) == 0:
        return waves.new_empty((0, len(filters), frames), dtype=dtype)  # torch.stft refuses
    largest = BLOCK_SAMPLES.get(waves.device.type, LARGEST_BLOCK)
    parts = math.ceil(len(waves) / max(1, largest // samples))
    clips = math.ceil(len(waves) / parts)  # of much the same size
    block = max(1, (largest // clips - n_fft) // hop + 1)
    rows = []
    for part in waves.split(clips):
        pieces = []
        for first in range(0, frames, block):
            last = min(first + block, frames) - 1
            piece = part[:, first * hop : last * hop + n_fft].double()
            spectrum = torch.stft(
                piece, n_fft, hop, window=window, center=False, return_complex=True
            )
            power = spectrum.real.square() + spectrum.imag.square()
            pieces.append(10 * (filters @ power).to(dtype).clamp(min=SMALLEST_POWER).log10())
        rows.append(torch.cat(pieces, dim=2))
    return torch.cat(rows)
