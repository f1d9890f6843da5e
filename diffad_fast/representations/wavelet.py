"""Images as standardised coefficients of the orthonormal Haar packet."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .. import ops

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
        count, mean, m2 = 0, 0.0, 0.0
        for images in batches:
            x = ops.haar_pack(images, self.level).double()
            n = x.numel() // self.channels
            batch_mean = x.mean(dim=(0, 2, 3))
            batch_m2 = (x - batch_mean[:, None, None]).square().sum(dim=(0, 2, 3))
            # Chan et al. (1979): merging two sets' means and sums of squared deviations.
            delta = batch_mean - mean
            m2 = m2 + batch_m2 + delta**2 * (count * n / (count + n))
            mean = mean + delta * (n / (count + n))
            count += n
        self.mean.copy_(mean)
        self.deviation.copy_((m2 / count).sqrt().clamp(min=SMALLEST_DEVIATION))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N,C,H,W) to standardised coefficients, channels_last."""
        x = _channels_last(images)
        x = ops.haar_pack(x, self.level) if self.level else x
        return (x - self.mean[:, None, None]) / self.deviation[:, None, None]

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`encode`."""
        x = x * self.deviation[:, None, None] + self.mean[:, None, None]
        return ops.haar_unpack(x, self.level) if self.level else x


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    """The same images in channels_last strides, which the packet then keeps.

    With one channel both formats have the same bytes, and PyTorch leaves the strides as they are.
    """
    n, c, h, w = images.shape
    if c == 1:
        return images.reshape(n, h, w, 1).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last)
