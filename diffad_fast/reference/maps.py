"""The anomaly map and score of an image and its reconstruction."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .haar import haar_pack
from .modes import in_own_dtypes


@in_own_dtypes
def anomaly_map(
    x,
    x_hat,
    features=(),
    features_hat=(),
    weights=(1.0, 1.0, 1.0),
    levels=0,
    stats=None,
    sigma=4.0,
    top=0.01,
    base=None,
):
    """x, x_hat (N,C,H,W) -> map (N,H,W), score (N,).

    With y = x_hat, phi_l the given features, W_b the sub-bands of the Haar pyramid of ``levels``
    levels (3 a level and the coarsest low band), G the Gaussian and z the standardised maps, ::

        D_p = mean over channels of |x - y|
        D_f = sum_l up(1 - cos(phi_l(x), phi_l(y)))      bilinear, cosine over channels
        D_w = sum_b up(mean over channels of |W_b x - W_b y|)      nearest
        z_i = (D_i - mean_i) / deviation_i
        map = G_sigma * (base + sum_i weights_i z_i)      base (N,H,W), if given
        score = mean of the max(1, round(top H W)) largest values of the map

    D_f takes part if features are given, D_w if levels > 0, each only if its weight is not 0.
    Computed and returned in float32 at least.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    difference = x.to(compute) - x_hat.to(compute)
    size = difference.shape[2:]
    maps = (
        lambda: difference.abs().mean(dim=1),
        (lambda: _feature_map(features, features_hat, size)) if len(features) else None,
        (lambda: subband_map(difference, levels)) if levels else None,
    )
    total = torch.zeros_like(difference[:, 0]) if base is None else base.to(compute)
    for weight, make, standard in zip(weights, maps, stats or (None,) * 3, strict=True):
        if make is None or weight == 0:
            continue
        z = make().to(compute)
        if standard is not None:
            mean, deviation = standard
            z = (z - mean) / deviation
        total = total + weight * z
    total = gaussian_blur(total.to(compute), sigma)
    count = max(1, round(top * size[0] * size[1]))
    return total, total.flatten(1).topk(count, dim=1).values.mean(dim=1)


def gaussian_blur(x, sigma):
    """Gaussian of deviation ``sigma`` pixels over the last two axes of (N,H,W), cut at 4 sigma.

    Beyond a border the image is reflected, the outermost pixel repeated (d c b a | a b c d), as
    often as the radius asks; equal to ``scipy.ndimage.gaussian_filter``.
    """
    if sigma == 0:
        return x
    radius = int(4 * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1, dtype=torch.float64, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x.dtype)
    y = x.unsqueeze(1)
    for axis, shape in ((2, (1, 1, -1, 1)), (3, (1, 1, 1, -1))):
        n = y.shape[axis]
        i = torch.arange(-radius, n + radius, device=x.device) % (2 * n)
        y = F.conv2d(y.index_select(axis, torch.minimum(i, 2 * n - 1 - i)), kernel.reshape(shape))
    return y.squeeze(1)


def _feature_map(features, features_hat, size):
    total = 0
    for f, f_hat in zip(features, features_hat, strict=True):
        compute = torch.promote_types(f.dtype, torch.float32)
        f, f_hat = f.to(compute), f_hat.to(compute)
        distance = 1 - F.cosine_similarity(f, f_hat, dim=1, eps=1e-8)
        total = total + F.interpolate(
            distance.unsqueeze(1), size=size, mode="bilinear", align_corners=False
        ).squeeze(1)
    return total


def subband_map(difference, levels):
    """D_w (N,H,W) of x - x_hat (N,C,H,W) over ``levels`` >= 1 levels.

    The transform is linear: that of the difference is the difference of the transforms.
    """
    total, low = 0, difference
    channels = difference.shape[1]
    for level in range(1, levels + 1):
        bands = haar_pack(low).unflatten(1, (4, channels))
        low = bands[:, 0]
        magnitude = bands[:, 1:].abs().mean(dim=2).sum(dim=1)
        if level == levels:
            magnitude = magnitude + low.abs().mean(dim=1)
        factor = 2**level
        total = total + magnitude.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return total
