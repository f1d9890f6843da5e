"""Images as standardised coefficients of the orthonormal Haar packet."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .. import ops
from .moments import Moments

# Rounding to 8 bits adds noise of this deviation to a pixel, and the orthonormal transform leaves
# white noise as it is: a sub-band with less than that holds nothing, and dividing by its deviation
# would blow rounding errors up to the size of a signal.
SMALLEST_DEVIATION = 1 / (255 * 12**0.5)


class WaveletRepresentation(nn.Module):
    """(N,C,H,W) images in [0,1] <-> (N, 4^level C, H/2^level, W/2^level) coefficients.

    The Haar packet of ``level`` levels (``ops.haar_pack``), each channel standardised by mean and
    deviation on normal data, so that every sub-band has unit variance and one noise level means
    the same signal-to-noise ratio in all of them. At level 0 these are pixels in [-1, 1], whatever
    the data.
    """

    def __init__(self, channels: int, level: int):
        super().__init__()
        self.level = level
        self.channels = channels * 4**level
        mean, deviation = (0.0, 1.0) if level else (0.5, 0.5)
        self.register_buffer("mean", torch.full((self.channels,), mean))
        self.register_buffer("deviation", torch.full((self.channels,), deviation))

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor]) -> None:
        """Set mean and deviation of every channel from batches (n,C,H,W) of normal images."""
        if self.level == 0:
            return
        moments = Moments()
        for images in batches:
            x = ops.haar_pack(images, self.level).double()
            mean = x.mean(dim=(0, 2, 3))
            scatter = (x - mean[:, None, None]).square().sum(dim=(0, 2, 3))
            moments.merge(x.numel() // self.channels, mean, scatter)
        variance = moments.scatter / moments.count
        self.mean.copy_(moments.mean)
        self.deviation.copy_(variance.sqrt().clamp(min=SMALLEST_DEVIATION))

    def shape(self, images: torch.Size) -> tuple[int, ...]:
        """Of the coefficients of ``images`` (N,C,H,W)."""
        n, _, height, width = images
        return n, self.channels, height >> self.level, width >> self.level

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N,C,H,W) to standardised coefficients, channels_last."""
        return ops.standardised_packet(images, self.mean, self.deviation, self.level)

    def noised_target(
        self,
        images: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        prediction_type: str,
        snr_limit: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``ops.noised_target`` of :meth:`encode`, in one pass where Triton serves."""
        return ops.noised_packet(
            images, self.mean, self.deviation, t, noise, alphas_cumprod, self.level,
            prediction_type, snr_limit,
        )  # fmt: skip

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`encode`."""
        x = x * self.deviation[:, None, None] + self.mean[:, None, None]
        return ops.haar_unpack(x, self.level) if self.level else x

    def finish(
        self, images: torch.Tensor, x_t: torch.Tensor, model_output: torch.Tensor, alpha_t: float,
        **step
    ) -> ops.Finish:  # fmt: skip
        """The last step of a reverse process, :meth:`decode` and how that differs from ``images``:
        ``ops.ddim_finish``, whose options ``step`` are."""
        mean, deviation = self.mean.to(x_t.dtype), self.deviation.to(x_t.dtype)
        images = images.to(x_t.dtype)
        return ops.ddim_finish(
            x_t, model_output, alpha_t, images, mean, deviation, self.level, **step
        )
