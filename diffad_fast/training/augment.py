"""Augmentation of normal images on the device, a function of (seed, index, epoch)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .. import ops
from .philox_steps import AUGMENTATION_STEPS, PIXEL_STEPS

# What each name of DetectorConfig.augment may do at most.
SHIFT = 1 / 16  # of a side
ROTATION = math.radians(5)
BRIGHTNESS = 0.1
EXPOSURE = 0.1
BLUR = 1.0  # deviation of the Gaussian, in pixels
NOISE = 0.03  # deviation
QUALITY = 50  # of JPEG
# Of JPEG's quantisation at quality 50: ITU-T T.81, table K.1.
LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61,
    12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77,
    24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip


def augmented(
    x: torch.Tensor, names: Sequence[str], seed: int, index: torch.Tensor, epoch: torch.Tensor
) -> torch.Tensor:
    """Images (n,C,H,W) in [0, 1], changed in those ways of ``config.AUGMENTATIONS``.

    Flips, blur, noise and compression happen to every second image, each on its own. How far an
    image is shifted and turned, the factor of brightness, the offset of exposure, the deviations of
    blur and noise and JPEG's quality are uniform within the limits above. index, epoch: (n,) int64,
    the image's place in its source and how often it was seen: with the seed they decide all.
    Borders are mirrored, intensities clipped.
    """
    if not names:
        return x
    # Uniform in (-1, 1): a normal number through its distribution function.
    step = epoch + AUGMENTATION_STEPS.start
    z = ops.philox_normal((len(x), 10), seed, draw=index + 1, step=step)
    uniform = torch.erf(z.to(x.device) / math.sqrt(2))
    left, top, right, down, turn, light, offset, blur, noise, loss = uniform.unbind(dim=1)
    each = (slice(None), None, None, None)
    if "flip-horizontal" in names:
        x = torch.where((left > 0)[each], x.flip(3), x)
    if "flip-vertical" in names:
        x = torch.where((top > 0)[each], x.flip(2), x)
    if "shift" in names or "rotate" in names:
        angle = turn * (ROTATION if "rotate" in names else 0.0)
        # affine_grid's coordinates run over [-1, 1]: a side is 2.
        limit = 2 * SHIFT if "shift" in names else 0.0
        cos, sin, aspect = angle.cos(), angle.sin(), x.shape[2] / x.shape[3]
        rows = [cos, -sin * aspect, right * limit, sin / aspect, cos, down * limit]
        grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), x.shape, align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if "brightness" in names:
        x = (x * (1 + BRIGHTNESS * light)[each]).clamp(0, 1)
    if "exposure" in names:
        x = (x + (EXPOSURE * offset)[each]).clamp(0, 1)
    if "blur" in names:
        x = _blurred(x, BLUR * blur.clamp(min=0))
    if "noise" in names:
        step = epoch + PIXEL_STEPS.start
        field = ops.philox_normal(x.shape, seed, draw=index + 1, step=step)
        x = (x + (NOISE * noise.clamp(min=0))[each] * field.to(x.device)).clamp(0, 1)
    if "compress" in names:
        compressed = _compressed(x, 100 - (100 - QUALITY) * loss.abs())
        x = torch.where((loss > 0)[each], compressed, x)
    return x


def _blurred(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Each image by a Gaussian of its own deviation sigma (n,), cut at 4 BLUR."""
    reach = math.ceil(4 * BLUR)
    distance = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    # Of deviation 0 the limit: the middle alone.
    kernel = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None]).square())
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(x.shape[1], dim=0)
    planes = F.pad(x, (reach,) * 4, mode="reflect").flatten(0, 1)[None]
    for shape in ((-1, 1, 2 * reach + 1, 1), (-1, 1, 1, 2 * reach + 1)):
        planes = F.conv2d(planes, kernel.view(shape), groups=len(kernel))
    return planes[0].unflatten(0, x.shape[:2])


def _compressed(x: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """Each image as JPEG of its own quality (n,) from 50 to 100 leaves it.

    What loses is the rounding of the orthonormal DCT of blocks of 8 x 8 to multiples of
    ``LUMINANCE`` times 2 - quality/50, rounded (libjpeg's jpeg_set_quality); every channel is
    treated as luminance.
    """
    h, w = x.shape[2:]
    dct, steps = _jpeg(x.device, x.dtype)
    steps = ((steps * (200 - 2 * quality)[:, None, None] + 50) / 100).floor().clamp(min=1)
    blocks = F.pad((x * 255).round() - 128, (0, -w % 8, 0, -h % 8), mode="replicate")
    blocks = blocks.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    # libjpeg rounds halves away from 0, and they are common: DC is a multiple of 1/8.
    scaled = (dct @ blocks @ dct.T) / steps[:, None, None, None]
    kept = (scaled.abs() + (0.5 + 1e-5)).floor() * scaled.sign() * steps[:, None, None, None]
    blocks = (dct.T @ kept @ dct).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return (blocks[..., :h, :w] + 128).round().clamp(0, 255) / 255


@functools.cache
def _jpeg(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The orthonormal DCT (8,8) and ``LUMINANCE``, made once: nothing can be copied from the host
    while a CUDA graph is captured."""
    k = torch.arange(8, dtype=torch.float64)
    dct = torch.cos(math.pi / 16 * k[:, None] * (2 * k + 1)) / 2
    dct[0] /= math.sqrt(2)
    return dct.to(device, dtype), torch.tensor(LUMINANCE).view(8, 8).to(device, dtype)
