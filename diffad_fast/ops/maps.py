"""The anomaly map and score of an image and its reconstruction."""

from __future__ import annotations

from functools import partial

import torch

from .. import native, reference
from ..reference.wavelet import traced_as_constant
from . import checks
from .dispatch import Operator, kernel

MAPS = ("pixel", "feature", "sub-band")
"""In the order of :func:`anomaly_map`'s arguments and of all that is by map."""


def _native(operator, x, x_hat, features, features_hat, weights, levels, stats, sigma, top,
            base):  # fmt: skip
    """Calls ``operator``, which wants lists, statistics as tensors and pairs of one dtype."""
    tensors = [x, x_hat, *features, *features_hat, *([] if base is None else [base])]
    for entry in stats or ():
        tensors += [value for value in entry or () if isinstance(value, torch.Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return reference.anomaly_map(
            x, x_hat, features, features_hat, weights, levels, stats, sigma, top, base
        )
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = compute == torch.float64
    if x.dtype != x_hat.dtype:
        x, x_hat = x.to(compute), x_hat.to(compute)
    if weights[1] == 0:
        features, features_hat = (), ()
    pairs = [
        (f, g) if f.dtype == g.dtype and (f.dtype == torch.float64) == wide
        else (f.to(compute), g.to(compute))
        for f, g in zip(features, features_hat, strict=True)
    ]  # fmt: skip
    flat = [
        (value.to(x.device, compute) if isinstance(value, torch.Tensor)
         # Numbers stay on the host.
         else torch.full((), value, dtype=compute, device="cpu")).expand(x.shape[2:])
        for entry in stats or ()
        for value in entry or (0.0, 1.0)
    ]  # fmt: skip
    return operator(
        x,
        x_hat,
        [f for f, _ in pairs],
        [g for _, g in pairs],
        list(weights),
        levels if weights[2] != 0 else 0,
        flat,
        sigma,
        top,
        None if base is None else base.to(compute),
    )


# What the CUDA kernels take, see csrc/cuda/anomaly_map_tile.h. The radius of a Gaussian is bounded
# by the shared memory of a thread block: 163 KiB and more in these generations, else 99.
CUDA_LEVELS, CUDA_FEATURES, CUDA_RADIUS, CUDA_LARGE_RADIUS = 4, 8, 44, 64
CUDA_LARGE = {(8, 0), (8, 7), (9, 0), (10, 0), (10, 3)}


def _cuda_refuses(x, x_hat, features, features_hat, weights, levels, stats, sigma, top, base):
    """Why the CUDA kernels cannot serve a call, or None."""
    if x.dtype == torch.float64:
        return "the CUDA kernels compute in float32, not float64"
    if weights[2] != 0 and levels > CUDA_LEVELS:
        return f"the CUDA kernels take up to {CUDA_LEVELS} levels, not {levels}"
    if weights[1] != 0 and len(features) > CUDA_FEATURES:
        return f"the CUDA kernels take up to {CUDA_FEATURES} feature maps, not {len(features)}"
    radius = int(4 * sigma + 0.5)
    if radius > CUDA_RADIUS and radius > (most := _largest_radius(x.device)):
        return f"the CUDA kernels take a sigma up to {most / 4:g} pixels here, not {sigma:g}"
    return None


def _largest_radius(device: torch.device) -> int:
    large = torch.cuda.get_device_capability(device) in CUDA_LARGE
    return CUDA_LARGE_RADIUS if large else CUDA_RADIUS


traced_as_constant(_largest_radius)


_anomaly_map = Operator(
    "anomaly_map",
    reference.anomaly_map,
    triton=kernel("anomaly_map", "anomaly_map"),
    **{k: partial(_native, f) for k, f in native.implementations("anomaly_map").items()},
    refuses={"cuda": _cuda_refuses, "triton": kernel("anomaly_map", "refuses")},
)


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
    """Where and how much ``x`` differs from ``x_hat``: a map (N,H,W) and a score (N,).

    x, x_hat: (N,C,H,W). Three maps at the resolution of ``x`` are standardised, weighted by
    ``weights`` and added:
    - pixel: mean over channels of |x - x_hat|;
    - feature, if ``features`` are given: sum over l of 1 - cos(features[l], features_hat[l]) over
      channels, each (N,C_l,h_l,w_l), upsampled bilinearly (align_corners=False);
    - sub-band, if ``levels`` > 0: sum over all sub-bands of the Haar pyramid of that many levels
      of mean over channels of |difference|, upsampled by nearest; H and W divide by 2^levels.
    A map whose weight is 0 is left out.

    stats: None, or three entries in that order, each (mean, deviation) as floats or tensors that
    broadcast to (H,W): z = (D - mean) / deviation. An entry may be None where its map is left out.
    sigma: deviation in pixels of the Gaussian that smooths the sum, cut at 4 sigma, borders
    reflected as ``scipy.ndimage.gaussian_filter`` does; 0 leaves it as it is.
    top: the score is the mean of the max(1, round(top H W)) largest values of the map; 0 is its
    maximum.
    base: None, or a map (N,H,W) to which the weighted ones are added before the smoothing: what is
    there already, standardised, as from :func:`ddim_finish`.

    Returns float32, or float64 for float64 input, and computes in that. Differentiable in x, x_hat,
    the features, the statistics and base: a call that needs gradients is served by the reference,
    since training never differentiates the map, and refused by Triton under
    ``use_backend("triton")``.
    Raises TypeError for dtypes, ValueError for shapes, devices and options.
    """
    checks.tensor("x", x, 4)
    if 0 in x.shape[1:]:
        raise ValueError(f"x has no pixels: shape {tuple(x.shape)}")
    checks.shaped("x_hat", x_hat, x.shape, x.device)
    if len(features) != len(features_hat):
        raise ValueError(f"{len(features)} features but {len(features_hat)} features_hat")
    for i, (f, f_hat) in enumerate(zip(features, features_hat, strict=True)):
        name = f"features[{i}]"
        checks.tensor(name, f, 4)
        if f.shape[0] != x.shape[0]:
            raise ValueError(f"{name} has {len(f)} samples, x has {len(x)}")
        if 0 in f.shape[1:]:
            raise ValueError(f"{name} is empty: shape {tuple(f.shape)}")
        checks.on_device(name, f, x.device)
        checks.shaped(f"features_hat[{i}]", f_hat, f.shape, x.device)
    if len(weights) != 3:
        raise ValueError(f"weights must be three, for {', '.join(MAPS)}; got {len(weights)}")
    weights = tuple(
        checks.number(f"the {name} map's weight", weight, -float("inf"))
        for name, weight in zip(MAPS, weights, strict=True)
    )
    levels = checks.integer("levels", levels, 0, 16)
    height, width = x.shape[2:]
    if height % 2**levels or width % 2**levels:
        raise ValueError(
            f"H and W must be divisible by {2**levels} for levels = {levels}, got {height}x{width}"
        )
    if stats is not None:
        used = [w != 0 for w in weights]
        used[1] &= len(features) > 0
        used[2] &= levels > 0
        _check_stats(stats, used, (height, width), x.device)
    sigma = checks.number("sigma", sigma, 0.0, 1e6)
    top = checks.number("top", top, 0.0, 1.0)
    if base is not None:
        checks.shaped("base", base, (x.shape[0], height, width), x.device)
    return _anomaly_map(x, x_hat, features, features_hat, weights, levels, stats, sigma, top, base)


def _check_stats(stats, used, size, device):
    if len(stats) != 3:
        raise ValueError(f"stats must be three entries, for {', '.join(MAPS)}; got {len(stats)}")
    for name, entry, needed in zip(MAPS, stats, used, strict=True):
        if entry is None:
            if needed:
                raise ValueError(f"stats has None for the {name} map, which takes part")
            continue
        if len(entry) != 2:
            raise ValueError(f"stats of the {name} map must be (mean, deviation)")
        for value in entry:
            if not isinstance(value, torch.Tensor):
                continue
            shape = tuple(value.shape)
            if len(shape) > 2 or any(
                a not in (1, b) for a, b in zip(reversed(shape), reversed(size), strict=False)
            ):
                raise ValueError(
                    f"stats of the {name} map have shape {shape}: it must broadcast to {size}"
                )
            if shape:
                checks.on_device(f"stats of the {name} map", value, device)


def _fake(x, *_):
    dtype = torch.promote_types(x.dtype, torch.float32)
    n, _, height, width = x.shape
    return x.new_empty((n, height, width), dtype=dtype), x.new_empty((n,), dtype=dtype)


if native.loaded():
    torch.library.register_fake("diffad_fast::anomaly_map", _fake)
