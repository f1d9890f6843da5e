"""Augmentation of normal images on the device, a function of (seed, index, epoch)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .. import ops

# What each name of DetectorConfig.augment may do at most.
SHIFT = 1 / 16  # of a side
ROTATION = math.radians(5)
BRIGHTNESS = 0.1
# Of philox_normal's 2^32 steps the epochs' noise has the first half.
FIRST_STEP = 2**31


def augmented(
    x: torch.Tensor, names: Sequence[str], seed: int, index: torch.Tensor, epoch: torch.Tensor
) -> torch.Tensor:
    """Images (n,C,H,W) in [0, 1], changed in those ways of ``config.AUGMENTATIONS``.

    Flips happen to every second image; shifts, rotations and the factor of brightness are uniform
    within the limits above. index, epoch: (n,) int64, the image's place in its source and how often
    it was seen: with the seed they decide all. Borders are mirrored.
    """
    if not names:
        return x
    # Uniform in (-1, 1): a normal number through its distribution function.
    z = ops.philox_normal((len(x), 6), seed, draw=index + 1, step=epoch + FIRST_STEP)
    left, top, right, down, turn, light = torch.erf(z.to(x.device) / math.sqrt(2)).unbind(dim=1)
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
    return x
