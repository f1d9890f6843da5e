"""A U-Net on wavelet coefficients whose resampling and attention are wavelet transforms too."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..reference.modes import in_transform
from . import whole
from .recompute import recomputed

UNET_SIZES = {
    "unet-tiny": {"widths": (48, 64, 64), "blocks": 1},
    "unet-small": {"widths": (80, 128, 128), "blocks": 2},
    "unet-base": {"widths": (128, 256, 352), "blocks": 2},
}
"""Sizes by name: about 1, 6 and 30 million parameters."""

GROUP_CHANNELS = 16
HEAD_CHANNELS = 32


class WaveletUNet(nn.Module):
    """Denoiser for represented images.

    Three resolutions: residual blocks (GroupNorm + SiLU, modulated by the noise level), Haar
    down- and up-sampling (invertible, where pooling is not), ``wavelet_attention`` at the two
    coarsest. The Haar front-end is the representation itself
    (:class:`~diffad_fast.representations.WaveletRepresentation`).

    Input x (N,channels,h,w) with h and w divisible by 8, and log_sigma (N,); output of the shape
    and dtype of x, whatever the dtype of the convolutions. Channels_last runs fastest: on a CPU,
    without gradients and where no module has a hook, as one operator (:mod:`.whole`). The last
    convolution starts at zero.
    """

    def __init__(self, channels: int, widths: tuple[int, int, int], blocks: int):
        super().__init__()
        self.widths, self.blocks = tuple(widths), blocks
        embedding = 4 * widths[0]
        self.embedding = NoiseLevelEmbedding(embedding)
        self.conv_in = Conv3x3(channels, widths[0])

        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        previous = widths[0]
        for level, width in enumerate(widths):
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(Stage(previous, width, embedding, attention=level > 0))
                previous = width
            self.encoder.append(stage)
            if level < len(widths) - 1:
                self.down.append(Conv1x1(4 * width, width))

        self.middle = Stage(previous, previous, embedding, attention=True)

        self.decoder, self.up = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            width = widths[level]
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(Stage(previous + width, width, embedding, attention=level > 0))
                previous = width
            self.decoder.append(stage)
            if level > 0:
                self.up.append(Conv1x1(width, 4 * width))

        self.norm_out = NormSiLU(previous)
        self.conv_out = zero_init(Conv3x3(previous, channels))

    def forward(self, x: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        return self.denoise(x, self.conditioning(log_sigma))

    def conditioning(self, log_sigma: torch.Tensor) -> torch.Tensor:
        """(N,M): what modulates the residual blocks, one after another in the order of their use,
        by one product of matrices."""
        layers = [stage.residual.modulation for stage in self._stages()]
        weight, bias = (torch.cat([getattr(m, p) for m in layers]) for p in ("weight", "bias"))
        return F.linear(self.embedding(log_sigma), weight, bias)

    def _stages(self) -> Iterator[Stage]:
        for stages in self.encoder:
            yield from stages
        yield self.middle
        for stages in self.decoder:
            yield from stages

    def layers(self) -> Iterator[nn.Module | tuple[nn.Parameter, ...]]:
        """What has weights, in the order of its use, without what makes the modulation."""
        yield self.conv_in
        for level, stages in enumerate(self.encoder):
            for stage in stages:
                yield from stage.layers()
            yield from self.down[level : level + 1]
        yield from self.middle.layers()
        for level, stages in enumerate(self.decoder):
            for stage in stages:
                yield from stage.layers()
            yield from self.up[level : level + 1]
        yield from (self.norm_out, self.conv_out)

    def _of_stages(self, conditioning: torch.Tensor) -> Iterator[torch.Tensor]:
        """What of it (N,M) is each stage's."""
        sizes = [stage.residual.modulation.out_features for stage in self._stages()]
        return iter(conditioning.split(sizes, dim=1))

    def denoise(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """:meth:`forward` from what :meth:`conditioning` gives."""
        found = whole.evaluation(self, x, conditioning)
        if found is not None:
            return found[0]
        parts = self._of_stages(conditioning)
        h, skips = self._encode(x, parts)
        h = self.middle(h, next(parts))
        for level, stage in enumerate(self.decoder):
            for block in stage:
                h = block(torch.cat([h, skips.pop()], dim=1), next(parts))
            if level < len(self.up):
                h = ops.haar_unpack(self.up[level](h))
        return recomputed(self.conv_out, self.norm_out, h).to(x.dtype)

    def features(self, x: torch.Tensor, log_sigma: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of the encoder, fine to coarse: (N,w0,h,w), (N,w1,h/2,w/2), (N,w2,h/4,w/4).

        Half the cost of :meth:`forward`: the decoder does not run.
        """
        conditioning = self.conditioning(log_sigma)
        found = whole.evaluation(self, x, conditioning, features=True)
        if found is not None:
            return found
        parts = self._of_stages(conditioning)
        h, skips = self._encode(x, parts)
        maps = [*skips[self.blocks - 1 : -1 : self.blocks], self.middle(h, next(parts))]
        return [h.to(x.dtype) for h in maps]

    def _encode(
        self, x: torch.Tensor, parts: Iterator[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        skips = []
        for level, stage in enumerate(self.encoder):
            for block in stage:
                h = block(h, next(parts))
                skips.append(h)
            if level < len(self.down):
                h = self.down[level](ops.haar_pack(h))
        return h, skips


class Stage(nn.Module):
    """A residual block, then attention where asked for."""

    def __init__(self, channels: int, width: int, embedding: int, attention: bool):
        super().__init__()
        self.residual = ResidualBlock(channels, width, embedding)
        self.attention = WaveletAttention(width) if attention else None

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        x = self.residual(x, modulation)
        return x if self.attention is None else self.attention(x)

    def layers(self) -> Iterator[nn.Module | tuple[nn.Parameter, ...]]:
        """As of the U-Net."""
        residual, attention = self.residual, self.attention
        yield from (residual.norm1, residual.conv1)
        if isinstance(residual.skip, Conv1x1):
            yield residual.skip
        yield from (residual.norm2, residual.conv2)
        if attention is not None:
            yield from (attention.norm, attention.qkv)
            yield attention.logit_gain, attention.value_gain
            yield attention.projection


class ResidualBlock(nn.Module):
    """x + conv(norm-silu(conv(norm-silu(x)); scale and shift)), these (N, 2 width) from the noise
    level by ``modulation``, which the U-Net applies for all its blocks at once."""

    def __init__(self, channels: int, width: int, embedding: int):
        super().__init__()
        self.norm1 = NormSiLU(channels)
        self.conv1 = Conv3x3(channels, width)
        self.modulation = nn.Linear(embedding, 2 * width)
        self.norm2 = NormSiLU(width)
        self.conv2 = zero_init(Conv3x3(width, width))
        self.skip = Conv1x1(channels, width) if channels != width else nn.Identity()

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        scale, shift = modulation.chunk(2, dim=1)
        h = recomputed(self.conv1, self.norm1, x)
        skip = self.skip(x)
        return recomputed(lambda y: self.conv2(y, skip), self.norm2, h, scale, shift)


class WaveletAttention(nn.Module):
    """x + projection of ``ops.wavelet_attention`` over the Haar sub-bands of q, k and v."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // HEAD_CHANNELS)
        while width % self.heads:
            self.heads -= 1
        self.norm = NormSiLU(width, activation=False)
        self.qkv = Conv1x1(width, 3 * width)
        self.logit_gain = nn.Parameter(torch.ones(self.heads, 4))
        self.value_gain = nn.Parameter(torch.ones(self.heads, 4))
        self.projection = zero_init(Conv1x1(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        qkv = recomputed(self.qkv, self.norm, x).permute(0, 2, 3, 1)
        # Views of one channels_last projection: (3, N, heads, H, W, d) without a copy.
        q, k, v = qkv.reshape(n, h, w, 3, self.heads, c // self.heads).permute(3, 0, 4, 1, 2, 5)
        o = ops.wavelet_attention(q, k, v, self.logit_gain, self.value_gain)
        return x + self.projection(o.permute(0, 1, 4, 2, 3).reshape(n, c, h, w))


class Conv3x3(nn.Conv2d):
    """``ops.conv3x3``, with what is added to its output."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, width, 3, padding=1)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return ops.conv3x3(x, self.weight, self.bias, residual)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution: in channels_last on a GPU, and for a single image on a CPU, as the product
    of matrices that it is. On a GPU their library adds the bias while it writes, which a
    convolution leaves to a kernel of its own; on a CPU PyTorch gives a single image to its oldest
    convolution."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A program that is traced takes batches of any length.
        by_product = x.is_cuda or (not torch.compiler.is_compiling() and len(x) == 1)
        if by_product and not in_transform():  # where tensors have no memory format
            if x.is_contiguous(memory_format=torch.channels_last):
                return self.product(x)
        return super().forward(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The same for x in channels_last, as a product of matrices."""
        y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return y.permute(0, 3, 1, 2)


class NormSiLU(nn.Module):
    """GroupNorm with affine part, optional modulation (scale, shift) and SiLU, in one operator."""

    def __init__(self, channels: int, activation: bool = True):
        super().__init__()
        self.groups = math.gcd(channels, max(1, channels // GROUP_CHANNELS))
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return ops.group_norm_silu(
            x,
            self.groups,
            self.weight,
            self.bias,
            scale=scale,
            shift=shift,
            activation=self.activation,
        )


class NoiseLevelEmbedding(nn.Module):
    """log sigma (N,) -> (N,width): sinusoids, then two layers."""

    def __init__(self, width: int, frequencies: int = 32):
        super().__init__()
        # log sigma spans about [-5, 5] over a schedule: wavelengths from a fraction of a unit
        # (neighbouring levels differ) to longer than the span (the order of levels is visible).
        self.register_buffer(
            "frequencies", torch.logspace(math.log10(0.2), math.log10(20), frequencies)
        )
        self.layers = nn.Sequential(
            nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, log_sigma: torch.Tensor) -> torch.Tensor:
        angles = log_sigma.to(self.frequencies.dtype)[:, None] * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))


def zero_init(module: nn.Module) -> nn.Module:
    """Start a residual branch (or the output) at zero, so that training begins at the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
