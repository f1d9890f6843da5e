"""Standardised and noised packets against PyWavelets and the equations, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch

from diffad_fast import ops, reference, use_backend
from diffad_fast.diffusion import NoiseSchedule

ALPHAS = NoiseSchedule("cosine").alphas_cumprod


@pytest.fixture(params=("reference", pytest.param("auto", marks=pytest.mark.native)))
def backend(request):
    with use_backend(request.param):
        yield request.param


def arguments(level, channels=2, dtype=torch.float64, n=3):
    x = torch.rand(n, channels, 16, 24, dtype=torch.float64).to(dtype)
    mean = torch.randn(channels * 4**level, dtype=torch.float64)
    noise = torch.randn(n, channels * 4**level, 16 >> level, 24 >> level, dtype=torch.float64)
    t = torch.tensor([1, 400, 990])[:n]
    return x, mean, mean.abs() + 0.3, t, noise.to(dtype), ALPHAS


@pytest.mark.parametrize("level", [0, 1])
def test_standardised_values(backend, level):
    x, mean, deviation, *_ = arguments(level)
    y = ops.standardised_packet(x, mean, deviation, level)
    bands = [x.numpy()]
    if level:
        low, high = pywt.dwt2(x.numpy(), "haar", mode="periodization")
        bands = [low, *high]
    packet = np.concatenate(bands, axis=1)
    expected = (packet - mean.numpy()[:, None, None]) / deviation.numpy()[:, None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("level, channels", [(2, 1), (1, 3), (0, 1)])
def test_noised_values(backend, level, channels, kind):
    x, mean, deviation, t, noise, alphas = arguments(level, channels)
    x0 = ops.standardised_packet(x, mean, deviation, level)
    for z in (noise, noise[:1]):
        x_t, target, weight = ops.noised_packet(
            x, mean, deviation, t, z, alphas, level, kind, snr_limit=4.0
        )
        a = alphas[t][:, None, None, None]
        torch.testing.assert_close(x_t, a.sqrt() * x0 + (1 - a).sqrt() * z, rtol=0, atol=1e-12)
        v = a.sqrt() * z - (1 - a).sqrt() * x0
        wanted = {"epsilon": z.expand_as(x0), "sample": x0, "v_prediction": v}[kind]
        torch.testing.assert_close(target, wanted, rtol=0, atol=1e-12)
        snr = alphas[t] / (1 - alphas[t])
        divisor = {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[kind]
        expected = (snr.clamp(max=4.0) / divisor).float()
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
        for y in (x_t, target):
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(backend, dtype):
    given = arguments(2, dtype=dtype)
    exact = [y.double() if y.is_floating_point() else y for y in given]
    for layout in (torch.contiguous_format, torch.channels_last):
        x = given[0].contiguous(memory_format=layout)
        got = (ops.standardised_packet(x, *given[1:3], 2), *ops.noised_packet(x, *given[1:], 2)[:2])
        with use_backend("reference"):
            expected = (ops.standardised_packet(*exact[:3], 2), *ops.noised_packet(*exact, 2)[:2])
        tolerance = 2e-6 if dtype == torch.float32 else 8e-3
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_native_is_the_reference_in_float64(cpu_isa, level, channels, dtype):
    """Rows of blocks that leave part of a vector; of several tiles at the higher levels."""
    torch.manual_seed(level)
    close = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    mean = torch.randn(channels * 4**level)
    deviation = mean.abs() + 0.3
    for blocks in (1, 3, 16, 21, 48):
        x = torch.rand(2, channels, 3 << level, blocks << level, dtype=torch.float64).to(dtype)
        wide = torch.full((4, channels, *x.shape[2:]), torch.nan, dtype=dtype)
        wide[::2] = x
        expected = reference.standardised_packet(x.double(), mean, deviation, level)
        with use_backend("cpu"):
            double = x.repeat_interleave(2, 3)[..., ::2]
            turned = x.transpose(2, 3).contiguous().transpose(2, 3)
            last = x.contiguous(memory_format=torch.channels_last)
            for given in (x, last, wide[::2], double, turned):
                found = ops.standardised_packet(given, mean, deviation, level)
                assert found.dtype == dtype and found.stride(1) == 1
                bound = close[dtype]
                torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


@pytest.mark.native
def test_native_opcheck_and_threads(by_threads):
    x = torch.randn(3, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    mean, deviation = torch.randn(48), torch.rand(48) + 1
    operator = torch.ops.diffad_fast.standardised_packet.default
    torch.library.opcheck(operator, (x, mean, deviation, 2))
    found = operator(x, mean, deviation, 2)
    assert torch.equal(by_threads(lambda: operator(x, mean, deviation, 2)), found)


@pytest.mark.native
@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(1, 3, 8, 8)}, "channels_last images of 1 or 3 channels"),
        ({"x": torch.zeros(1, 2, 8, 8)}, "channels_last images of 1 or 3 channels"),
        ({"mean": torch.zeros(4)}, "mean must have 16 entries"),
        ({"deviation": torch.zeros(16, 1)}, "deviation must have 16 entries"),
        ({"level": 5}, "level must be 1 to 4"),
        ({"x": torch.zeros(1, 6, 8, 1).permute(0, 3, 1, 2)}, "6 x 8 does not divide by 4"),
    ],
)
def test_the_bare_operator_guards_its_memory(change, words):
    good = {"x": torch.zeros(1, 8, 8, 1).permute(0, 3, 1, 2), "mean": torch.zeros(16),
            "deviation": torch.ones(16), "level": 2}  # fmt: skip
    with pytest.raises(RuntimeError, match=words):
        torch.ops.diffad_fast.standardised_packet(*(good | change).values())


def test_gradients(backend):
    x, *rest = arguments(1, channels=1, n=1)
    x = x[..., :4, :4].clone().requires_grad_()
    rest[3] = rest[3][..., :2, :2]
    mean, deviation = (y.requires_grad_() for y in rest[:2])
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda *y: ops.standardised_packet(*y, 1), (x, mean, deviation))
    assert gradcheck(lambda y: ops.noised_packet(y, *rest, 1)[:2], x)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.zeros(1, 1, 6, 8)}, ValueError, "6 x 8.*divide by 4"),
        ({"x": torch.zeros(1, 8, 8)}, ValueError, r"\(1, 8, 8\)"),
        ({"x": torch.zeros(1, 1, 8, 8).int()}, TypeError, "int32"),
        ({"level": 5}, ValueError, r"level.*\[0, 4\].*5"),
        ({"mean": torch.zeros(4)}, ValueError, r"mean.*\(16,\).*\(4,\)"),
        ({"deviation": torch.ones(16).int()}, TypeError, "deviation.*int32"),
        ({"t": torch.zeros(2).long()}, ValueError, r"t must have shape \(1,\)"),
        ({"t": torch.zeros(1)}, TypeError, "t must be an int64"),
        ({"noise": torch.zeros(1, 16, 4, 4)}, ValueError, r"the packet, \(1, 16, 2, 2\)"),
        ({"prediction_type": "x0"}, ValueError, "'x0'.*epsilon, sample"),
        ({"snr_limit": 0.0}, ValueError, "snr_limit.*0.0"),
    ],
)
def test_bad_arguments(change, error, words):
    good = {"x": torch.zeros(1, 1, 8, 8), "mean": torch.zeros(16), "deviation": torch.ones(16),
            "t": torch.zeros(1).long(), "noise": torch.zeros(1, 16, 2, 2),
            "alphas_cumprod": ALPHAS, "level": 2}  # fmt: skip
    ops.noised_packet(**good)
    with pytest.raises(error, match=words):
        ops.noised_packet(**good | change)
