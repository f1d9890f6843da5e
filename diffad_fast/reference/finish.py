"""The end of a reverse process over Haar packets of images."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .diffusion import ddim_step
from .haar import haar_unpack
from .maps import subband_map


class Finish(NamedTuple):
    """What :func:`diffad_fast.ops.ddim_finish` gives."""

    x0: torch.Tensor
    """The clean state, in the shape and memory format of x_t."""
    x_hat: torch.Tensor
    """The image that it stands for (N,C,H,W)."""
    pixel: torch.Tensor
    """D_p (N,H,W): mean over channels of |images - x_hat|."""
    sub_band: torch.Tensor
    """D_w (N,H,W): the same over all sub-bands of the Haar pyramid, added up."""


def ddim_finish(
    x_t,
    model_output,
    alpha_t,
    images,
    mean,
    deviation,
    level=1,
    prediction_type="epsilon",
    clip=None,
    guidance=None,
    clamp=False,
):
    """The last step, what it means in pixels, and how that differs from the images::

        x0 = ddim_step(x_t, model_output, alpha_t, 1)
        x_hat = haar_unpack(x0 deviation + mean, level), if ``clamp`` within [0, 1]
        D_p = mean over channels of |images - x_hat|
        D_w = sum_b up(mean over channels of |W_b images - W_b x_hat|)

    with b over the sub-bands of ``level`` levels, as in ``anomaly_map``; at level 0 a state is an
    image and D_w is 0.
    """
    x0 = ddim_step(
        x_t, model_output, alpha_t, 1.0, prediction_type=prediction_type, clip=clip,
        guidance=guidance,
    )  # fmt: skip
    x_hat = x0 * deviation[:, None, None] + mean[:, None, None]
    x_hat = haar_unpack(x_hat, level) if level else x_hat
    x_hat = (x_hat.clamp(0, 1) if clamp else x_hat).contiguous()
    difference = images - x_hat
    pixel = difference.abs().mean(dim=1)
    return Finish(
        x0, x_hat, pixel, subband_map(difference, level) if level else torch.zeros_like(pixel)
    )
