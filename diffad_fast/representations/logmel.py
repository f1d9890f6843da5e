"""Audio: log-mel spectrograms, and tokens that say how a window of them looks and moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import InputError
from .moments import JointMoments
from .whitening import Whitening

# Groups of neighbouring mel bands whose modulation spectra are taken.
MODULATION_BANDS = 16
# Wider groups of them, whose correlations over time are taken.
CORRELATION_BANDS = 8
# Added to the mean square of a modulation, in dB^2: a hundredth of what a shallow modulation of
# 0.3 dB has, so that silence and steady tones have a finite logarithm.
SMALLEST_MODULATION = 1e-3
# Added to a deviation over time in dB, so that silence has no correlations instead of wild ones.
SMALLEST_DEVIATION = 0.1
# Share of the largest eigenvalue of the tokens' correlations below which none may count. Training
# clips come from few recordings, so directions in which they hardly differ say little of others.
SMALLEST_EIGENVALUE = 0.1


def mel_filters(
    rate: int, n_fft: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None
) -> np.ndarray:
    """Triangles of equal area on Slaney's mel scale, (n_mels, n_fft/2+1) float64.

    rate in samples a second, fmin and fmax (None: rate/2) in Hz. Equal to ``librosa.filters.mel``
    with ``htk=False, norm="slaney"`` (M. Slaney, "Auditory Toolbox", 1998): linear below 1 kHz, 15
    mels there, logarithmic above, 27 mels to a factor of 6.4.
    """
    corners = _mel_corners(rate, n_mels, fmin, fmax)
    lower, centre, upper = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    hertz = np.linspace(0, rate / 2, n_fft // 2 + 1)
    rising, falling = (hertz - lower) / (centre - lower), (upper - hertz) / (upper - centre)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (upper - lower)


def _mel_corners(rate: int, n_mels: int, fmin: float, fmax: float | None) -> np.ndarray:
    """(n_mels+2,) Hz: triangle b rises from corner b to b+1 and falls to b+2."""
    linear, step = 200 / 3, math.log(6.4) / 27

    def mel(hertz: float) -> float:
        return hertz / linear if hertz < 1000 else 15 + math.log(hertz / 1000) / step

    mels = np.linspace(mel(fmin), mel(rate / 2 if fmax is None else fmax), n_mels + 2)
    return np.where(mels < 15, linear * mels, 1000 * np.exp(step * (mels - 15)))


class LogMel(nn.Module):
    """Waves (N,samples) to log-mel spectrograms (N,n_mels,frames) in dB.

    Frame k is the Hann-windowed samples [k hop, k hop + n_fft); nothing is padded, so frames =
    (samples - n_fft) // hop + 1. Equal to librosa's ``power_to_db(melspectrogram(center=False),
    top_db=None)``. Parameters as in :func:`mel_filters`. Raises InputError for bands so narrow that
    no bin of the spectrum falls into them.
    """

    def __init__(
        self,
        rate: int,
        n_fft: int,
        hop: int,
        n_mels: int,
        fmin: float = 0.0,
        fmax: float | None = None,
    ):
        super().__init__()
        self.hop = hop
        self.frequencies = _mel_corners(rate, n_mels, fmin, fmax)[1:-1]
        """(n_mels,) float64: of each band the frequency in Hz that it hears best."""
        filters = torch.from_numpy(mel_filters(rate, n_fft, n_mels, fmin, fmax))
        empty = int((filters.sum(dim=1) == 0).sum())
        if empty:
            raise InputError(
                f"{empty} of {n_mels} mel bands lie between two bins of the spectrum, "
                f"{rate / n_fft:g} Hz apart, and hear nothing: choose a smaller n_mels, a larger "
                "n_fft, or fmin and fmax further apart"
            )
        # Follow from the parameters: not stored in checkpoints.
        self.register_buffer("filters", filters, persistent=False)
        window = torch.hann_window(n_fft, dtype=torch.float64)
        self.register_buffer("window", window, persistent=False)

    def _apply(self, fn, recurse=True):
        """Onto the device, but not into the dtype of a model that this is a part of: the operator
        computes in float64."""
        constants = {"filters": self.filters, "window": self.window}
        super()._apply(fn, recurse)
        for name, constant in constants.items():
            setattr(self, name, constant.to(getattr(self, name).device))
        return self

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        return ops.log_mel(waves, self.window, self.filters, self.hop)


class AudioTokens(nn.Module):
    """Waves (N,samples) to one grid of whitened tokens (N,1,windows,dim), one for each window.

    A token says how the window sounds and how it moves: the mean of every mel band (n_mels numbers,
    in dB); of each of 16 groups of bands the modulation spectrum, as the mean of the logarithms of
    the mean squares in octaves of modulation frequency (its depth) and what each octave differs
    from that (its shape, which unlike the depth hardly depends on a recording's noise floor); and
    the correlations over time between 8 wider groups.

    window, step: frames a window has (a power of two, at least 8) and frames from one to the next.
    remove_level: take its mean over bands and frames off each clip's spectrogram.
    """

    by_one_scale = False

    def __init__(self, logmel: LogMel, window: int, step: int, remove_level: bool = False):
        super().__init__()
        self.logmel, self.window, self.step = logmel, window, step
        self.remove_level = remove_level
        self.whitening = Whitening(SMALLEST_EIGENVALUE, standardise=True)
        self.register_buffer("inverse", torch.zeros(0, 0))
        hann = torch.hann_window(window)
        self.register_buffer("hann", hann / hann.square().sum().sqrt(), persistent=False)
        pairs = torch.triu_indices(CORRELATION_BANDS, CORRELATION_BANDS, offset=1)
        self.register_buffer("pairs", pairs, persistent=False)
        self.register_buffer("bands", self._bands(), persistent=False)
        # (window/2+1, octaves): bins 2^j to 2^(j+1) - 1 of the modulation spectrum are octave j.
        means = torch.zeros(window // 2 + 1, self.octaves)
        for j in range(self.octaves):
            means[1 << j : 2 << j, j] = 2.0**-j
        self.register_buffer("octave_means", means, persistent=False)

    @property
    def dims(self) -> list[int]:
        """The size of the tokens, after ``fit``."""
        return [self.whitening.dim]

    @property
    def n_mels(self) -> int:
        return len(self.logmel.filters)

    @property
    def octaves(self) -> int:
        """Those of bins 1 to window/2 - 1 of the modulation spectrum."""
        return int(math.log2(self.window)) - 1

    def _bands(self) -> torch.Tensor:
        """(numbers of a token, n_mels): which bands a number speaks of; rows add up to 1."""
        bands = torch.eye(self.n_mels)
        groups = bands.unflatten(0, (MODULATION_BANDS, -1)).mean(dim=1)
        wide = bands.unflatten(0, (CORRELATION_BANDS, -1)).mean(dim=1)
        pairs = (wide[self.pairs[0]] + wide[self.pairs[1]]) / 2
        return torch.cat([bands, groups, groups.repeat_interleave(self.octaves, dim=0), pairs])

    @torch.no_grad()
    def fit(self, batches: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Set the whitening from waves of normal clips; ``batches()`` iterates over them."""
        moments = JointMoments()
        for waves in batches():
            moments.add(self._tokens(waves).flatten(0, 1))
        self.whitening.fit(moments)
        self.inverse = torch.linalg.inv(self.whitening.matrix.double()).float().contiguous()

    def encode(self, waves: torch.Tensor) -> list[torch.Tensor]:
        """The grid of waves."""
        return [self.whitening(self._tokens(waves))[:, None]]

    def _tokens(self, waves: torch.Tensor) -> torch.Tensor:
        """(N,windows,numbers), not whitened."""
        mel = self.logmel(waves)
        if self.remove_level:
            mel = mel - mel.mean(dim=(1, 2), keepdim=True)
        mean = mel.unfold(2, self.window, self.step).mean(dim=3)
        groups = mel.unflatten(1, (MODULATION_BANDS, -1)).mean(dim=2)
        groups = groups.unfold(2, self.window, self.step)
        groups = groups - groups.mean(dim=3, keepdim=True)
        found = torch.fft.rfft(groups * self.hann)
        power = found.real.square() + found.imag.square()
        spectrum = (power @ self.octave_means + SMALLEST_MODULATION).log()
        depth = spectrum.mean(dim=3)
        shape = spectrum - depth[..., None]
        wide = groups.unflatten(1, (CORRELATION_BANDS, -1)).mean(dim=2)
        deviation = wide.square().mean(dim=3, keepdim=True).sqrt()
        wide = (wide / (deviation + SMALLEST_DEVIATION)).transpose(1, 2)
        correlation = (wide @ wide.transpose(2, 3) / self.window)[..., self.pairs[0], self.pairs[1]]
        parts = [mean.transpose(1, 2), depth.transpose(1, 2), shape.transpose(1, 2).flatten(2)]
        return torch.cat([*parts, correlation], dim=2)

    def contributions(self, residual: torch.Tensor) -> torch.Tensor:
        """What each mel band has in the length of residuals of tokens: (...,dim) to (...,n_mels).

        With W the whitening's matrix, a residual r is u = r W^-1 in the token's own numbers, and
        |r|^2 = sum_f u_f (W r)_f: term f is the share of number f (partial decomposition, Alcala &
        Qin, J. Process Control 2009), spread evenly over the bands that it speaks of. The shares
        add up to mean(r^2), and one may be negative where numbers are correlated.
        """
        terms = (residual @ self.inverse) * (residual @ self.whitening.matrix.T)
        return terms @ self.bands / residual.shape[-1]


def time_map(shares: torch.Tensor, window: int, step: int) -> torch.Tensor:
    """Shares (N,windows,n_mels) as a map (N,n_mels,steps): the mean over windows at each time.

    Column i stands for the frames [i step, (i+1) step); steps = windows - 1 + window / step.
    """
    windows, width = shares.shape[1], window // step
    rows = F.pad(shares.transpose(1, 2), (width - 1, width - 1))
    steps = windows - 1 + width
    place = torch.arange(steps, device=shares.device)
    count = torch.minimum(place + 1, steps - place).clamp(max=min(width, windows))
    return F.avg_pool1d(rows, width, stride=1) * (width / count)
