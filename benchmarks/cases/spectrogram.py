from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import peers
from ..case import Case, Contender, numpy_inputs, on, operator_case, random

RATE, N_FFT, HOP, N_MELS, SECONDS = 16000, 1024, 256, 64, 4


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    for clips in (64,) if quick else (64, 1):
        yield _case(clips)


def _case(clips: int) -> Case:
    from diffad_fast.representations.logmel import mel_filters

    filters = torch.from_numpy(mel_filters(RATE, N_FFT, N_MELS))
    window = torch.hann_window(N_FFT, dtype=torch.float64)
    samples = SECONDS * RATE
    frames = clips * ((samples - N_FFT) // HOP + 1)
    return operator_case(
        "log_mel",
        f"{clips} {'clips' if clips > 1 else 'clip'} of {SECONDS} s, {RATE // 1000} kHz, "
        f"{N_FFT}/{HOP}/{N_MELS}",
        lambda device: on(device, 0.1 * random(clips, samples), window, filters),
        lambda functions, *inputs: functions.log_mel(*inputs, HOP),
        formats=False,
        peers={
            "torch.stft, float32": Contender(
                in_float32, tolerance=1e-4, graph=True, note="as torchaudio does it, in float32"
            ),
            "torch.stft, float32, by clips": Contender(
                clip_by_clip,
                tolerance=1e-4,
                graph=True,
                note="in float32, one clip after the other",
            ),
            **_by_librosa(),
        },
        bytes=4 * (clips * samples + frames * N_MELS),
        # A real transform counts 2.5 n log2 n, powers 3 a bin; the filters are triangles of which
        # two overlap everywhere.
        flops=frames * (int(2.5 * N_FFT * 10) + N_FFT // 2 * (3 + 4)),
        rate=None,
        batch=clips,
        unit="clip",
    )


def in_float32(waves, window, filters):
    spectrum = torch.stft(
        waves, N_FFT, HOP, window=window.float(), center=False, return_complex=True
    )
    power = spectrum.abs().square()
    return 10 * (filters.float() @ power).clamp(min=1e-10).log10()


def clip_by_clip(waves, window, filters):
    """What one clip needs stays in the caches, and a power takes no root."""
    window, filters, found = window.float(), filters.float(), []
    for wave in waves:
        spectrum = torch.stft(wave, N_FFT, HOP, window=window, center=False, return_complex=True)
        power = torch.view_as_real(spectrum).square_().sum(dim=-1)
        found.append((filters @ power).clamp_(min=1e-10).log10_().mul_(10))
    return torch.stack(found)


def _by_librosa():
    if not peers.get("librosa"):
        return {}

    def run(waves, window, filters):
        import librosa

        power = librosa.feature.melspectrogram(
            y=waves, sr=RATE, n_fft=N_FFT, hop_length=HOP, n_mels=N_MELS, center=False
        )
        return torch.from_numpy(librosa.power_to_db(power, top_db=None))

    return {"librosa": numpy_inputs(run)}
