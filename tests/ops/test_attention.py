"""wavelet_attention against PyWavelets and NumPy, and against attention between raw blocks."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F

from diffad_fast import ops


def random(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def by_pywavelets(q, k, v, logit_gain, value_gain, level, scale):
    """One image and head after the other; S and O as sums over sub-bands and positions."""

    def pyramid(x):  # (H,W,d) -> bands coarse to fine
        low, *details = pywt.wavedec2(x, "haar", "periodization", level, axes=(0, 1))
        return [low] + [band for bands in details for band in bands]

    def tokens(band, rows, columns):  # (h,w,d) -> (T, positions, d)
        r, c = band.shape[0] // rows, band.shape[1] // columns
        blocks = band.reshape(rows, r, columns, c, -1).transpose(0, 2, 1, 3, 4)
        return blocks.reshape(rows * columns, r * c, -1)

    def image(x, rows, columns, shape):
        r, c = shape[0] // rows, shape[1] // columns
        return x.reshape(rows, columns, r, c, -1).transpose(0, 2, 1, 3, 4).reshape(shape)

    out = np.empty_like(q)
    n, heads, height, width, _ = q.shape
    rows, columns = height // 2**level, width // 2**level
    for i in range(n):
        for h in range(heads):
            bands_q, bands_k, bands_v = (pyramid(x[i, h]) for x in (q, k, v))
            logits = 0.0
            for w, a, b in zip(logit_gain[h], bands_q, bands_k, strict=True):
                a, b = tokens(a, rows, columns), tokens(b, rows, columns)
                logits = logits + w * np.einsum("ipd,jpd->ij", a, b)
            e = np.exp(scale * logits - (scale * logits).max(axis=1, keepdims=True))
            mixing = e / e.sum(axis=1, keepdims=True)
            result = []
            for g, band in zip(value_gain[h], bands_v, strict=True):
                mixed = g * np.einsum("ij,jpd->ipd", mixing, tokens(band, rows, columns))
                result.append(image(mixed, rows, columns, band.shape))
            low, details = result[0], [tuple(result[j : j + 3]) for j in range(1, len(result), 3)]
            out[i, h] = pywt.waverec2([low, *details], "haar", "periodization", axes=(0, 1))
    return out


@pytest.mark.parametrize("level, size", [(1, (6, 4)), (1, (2, 2)), (2, (8, 12)), (2, (4, 4))])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_against_pywavelets(level, size, scale):
    d = 5
    q, k, v = (random((2, 3, *size, d), seed) for seed in range(3))
    w, g = random((3, 1 + 3 * level), 3), random((3, 1 + 3 * level), 4)
    used = (4**level * d) ** -0.5 if scale is None else scale
    expected = by_pywavelets(*(x.numpy() for x in (q, k, v, w, g)), level, used)
    got = ops.wavelet_attention(q, k, v, w, g, level, scale)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("level", [1, 2])
def test_without_gains_it_is_attention_between_blocks_of_pixels(level):
    n, heads, height, width, d = 2, 2, 8, 16, 3
    q, k, v = (random((n, heads, height, width, d), seed) for seed in range(3))
    b = 2**level

    def blocks(x):
        x = x.reshape(n, heads, height // b, b, width // b, b, d).permute(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(n, heads, -1, b * b * d)

    mixed = F.scaled_dot_product_attention(blocks(q), blocks(k), blocks(v))
    mixed = mixed.reshape(n, heads, height // b, width // b, b, b, d).permute(0, 1, 2, 4, 3, 5, 6)
    expected = mixed.reshape(q.shape)
    torch.testing.assert_close(
        ops.wavelet_attention(q, k, v, level=level), expected, rtol=0, atol=1e-13
    )
    ones = torch.ones(heads, 1 + 3 * level)
    torch.testing.assert_close(
        ops.wavelet_attention(q, k, v, ones, ones, level), expected, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize(
    "dtype, atol", [(torch.float32, 2e-6), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)]
)
def test_dtypes_and_strides(dtype, atol):
    q, k, v = (random((2, 8, 8, 4, 16), seed, dtype) for seed in range(3))
    w, g = random((4, 7), 3, torch.float32), random((4, 7), 4, torch.float32)
    # Heads last but one in memory, as a projection of channels_last features gives them.
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))
    got = ops.wavelet_attention(q, k, v, w, g, 2)
    assert got.dtype == dtype and got.shape == q.shape
    wide = [x.double() for x in (q, k, v, w, g)]
    torch.testing.assert_close(got.double(), ops.wavelet_attention(*wide, 2), rtol=0, atol=atol)


@pytest.mark.parametrize("level", [1, 2])
def test_gradients(level):
    shape = (1, 2, 4, 4, 2)
    inputs = [random(shape, s).requires_grad_() for s in range(3)]
    inputs += [random((2, 1 + 3 * level), s).requires_grad_() for s in (3, 4)]
    assert torch.autograd.gradcheck(lambda *a: ops.wavelet_attention(*a, level), inputs)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(1, 1, 6, 6)}, ValueError, "q must have 5 dimensions"),
        ({"k": torch.zeros(1, 1, 6, 4, 2)}, ValueError, "k must have shape"),
        ({"v": torch.zeros(1, 1, 6, 6, 2).half()}, TypeError, "v is torch.float16"),
        ({"level": 3}, ValueError, "level must be in"),
        ({"level": 1.0}, TypeError, "level must be an integer"),
        ({"level": 2}, ValueError, "divisible by 4 for level 2, got 6x6"),
        ({"logit_gain": torch.ones(1, 7)}, ValueError, r"logit_gain must have shape \(1, 4\)"),
        ({"value_gain": torch.ones(2, 4)}, ValueError, r"value_gain must have shape \(1, 4\)"),
        ({"scale": "x"}, TypeError, "scale must be a number"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 1, 6, 6, 2))
    with pytest.raises(error, match=message):
        ops.wavelet_attention(**{**arguments, **change})
