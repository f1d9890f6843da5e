"""Log-mel spectrograms: what waves look like to the token MLP."""

from __future__ import annotations

import torch

from .. import native, reference
from . import checks
from .dispatch import Operator

# Powers of two from here on are what the native transform is written for.
SMALLEST_FFT, LARGEST_FFT = 16, 1 << 16


def _native(waves, window, filters, hop):
    return torch.ops.diffad_fast.log_mel(waves, window, filters, hop)


def _refuses(waves, window, filters, hop):
    n_fft = len(window)
    if n_fft & (n_fft - 1) or not SMALLEST_FFT <= n_fft <= LARGEST_FFT:
        return f"it is written for n_fft a power of two from 16 to 65,536, which {n_fft} is not"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (waves, window, filters)):
        return "it has no gradients"
    return None


_log_mel = Operator(
    "log_mel",
    reference.log_mel,
    **dict.fromkeys(native.implementations("log_mel"), _native),
    refuses={"cpu": _refuses},
)


def log_mel(waves, window, filters, hop):
    """The logarithm, in dB, of bands of the power spectrum of every frame.

    waves: (N,samples), any strides, float32, bfloat16, float16 or float64, with at least n_fft
    samples. window: (n_fft,), n_fft even; filters: (bands,n_fft/2+1), what each band takes from
    each bin, usually little; both in float64. hop: samples from one frame to the next, at least 1.

    Returns (N,bands,frames) in float32, float64 for float64, frames = (samples - n_fft) // hop + 1:
    10 log10 of ``filters @ abs(rfft(frame * window))^2``, at least 1e-10 (-100 dB), for frame k the
    samples [k hop, k hop + n_fft). With the filters of ``librosa.filters.mel`` that is
    ``power_to_db(melspectrogram(center=False), top_db=None)``. The spectrum is computed in float64,
    as librosa's: rounded to float32 a frame has noise some 130 dB below its loudest bins, which
    changes quiet bands of real recordings by some 1e-3 dB.

    Differentiable, by the reference. On the CPU natively for powers of two up to 65,536, in one
    pass without temporary tensors; a frame's result depends on it alone, and not on the number of
    threads.
    Raises TypeError for dtypes and options, ValueError for shapes and options out of range.
    """
    checks.tensor("waves", waves, 2)
    checks.tensor("window", window, 1)
    n_fft = len(window)
    if n_fft < 2 or n_fft % 2:
        raise ValueError(f"window must have an even number of samples, got {n_fft}")
    checks.tensor("filters", filters, 2)
    checks.shaped("filters", filters, (len(filters), n_fft // 2 + 1), waves.device)
    checks.on_device("window", window, waves.device)
    for name, given in (("window", window), ("filters", filters)):
        if given.dtype != torch.float64:
            raise TypeError(f"{name} must be float64, got {given.dtype}: convert it with .double()")
    hop = checks.integer("hop", hop, 1, 2**31 - 1)
    if waves.shape[1] < n_fft:
        raise ValueError(
            f"waves have {waves.shape[1]} samples, fewer than a frame, {n_fft}: pad them or take a "
            "shorter window"
        )
    return _log_mel(waves, window, filters, hop)


def _fake(waves, window, filters, hop):
    frames = (waves.shape[1] - len(window)) // hop + 1
    dtype = torch.promote_types(waves.dtype, torch.float32)
    return waves.new_empty((waves.shape[0], filters.shape[0], frames), dtype=dtype)


if native.loaded():
    torch.library.register_fake("diffad_fast::log_mel", _fake)
