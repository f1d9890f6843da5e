"""The convolution of a U-Net."""

from __future__ import annotations

import torch.nn.functional as F


def conv3x3(x, weight, bias=None, residual=None):
    """(N,I,H,W) -> (N,O,H,W): ``conv2d(x, weight, bias, padding=1) + residual``.

    weight (O,I,3,3), bias (O,), residual (N,O,H,W).
    """
    y = F.conv2d(x, weight, bias, padding=1)
    return y if residual is None else y + residual
