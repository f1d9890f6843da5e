"""The wavelet transforms against PyWavelets."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_fast import ops, reference
from diffad_fast.errors import BackendError
from diffad_fast.ops.dispatch import use_backend

WAVELETS = pywt.wavelist(kind="discrete")
MODES = pywt.Modes.modes
FEW = ["haar", "db2", "sym5", "coif3", "bior3.1", "bior2.6", "rbio1.3", "dmey", "db38"]
SIZES = [(8, 6), (7, 5), (1, 9), (33, 2)]


def flat(coeffs):
    low, details = coeffs
    return [low, *details]


def tolerance(mode, length, data):
    """Rounding grows with the extended signal, which "smooth" extrapolates over length samples."""
    growth = length**2 if mode in ("smooth", "antireflect") else 1
    return 1e-14 * growth * (10 + np.abs(data).max())


def assert_like_pywt(x, name, mode):
    """dwt2d and idwt2d of x against PyWavelets, and back to x."""
    length = pywt.Wavelet(name).dec_len
    atol = tolerance(mode, length, x)
    if "reflect" in mode and 1 in x.shape[2:]:
        with pytest.raises(ValueError, match="at least 2 samples"):
            ops.dwt2d(torch.from_numpy(x), name, mode)
        return
    expected = flat(pywt.dwt2(x, name, mode))
    got = ops.dwt2d(torch.from_numpy(x), name, mode)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g.numpy(), e, rtol=0, atol=atol)
    restored = ops.idwt2d(got, name, mode)
    expected = pywt.idwt2((got[0].numpy(), tuple(g.numpy() for g in got[1:])), name, mode)
    np.testing.assert_allclose(restored.numpy(), expected, rtol=0, atol=atol)
    if name != "dmey":  # an approximation that does not reconstruct exactly
        restored = ops.idwt2d(got, name, mode, output_size=x.shape[2:])
        np.testing.assert_allclose(restored.numpy(), x, rtol=0, atol=1e6 * atol)


def test_the_modes_are_those_of_pywavelets():
    assert sorted(reference.wavelet.MODES) == sorted(MODES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FEW)
def test_few_wavelets_every_mode(name, mode):
    rng = np.random.default_rng(1)
    for size in SIZES:
        assert_like_pywt(rng.standard_normal((2, 3, *size)), name, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WAVELETS)
def test_every_wavelet_every_mode(name, mode):
    rng = np.random.default_rng(2)
    for size in [*SIZES, (64, 48), (2, 3), (51, 77)]:
        assert_like_pywt(rng.standard_normal((1, 2, *size)), name, mode)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(WAVELETS),
    st.sampled_from(MODES),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 2**31),
)
def test_any_size(name, mode, size, seed):
    x = np.random.default_rng(seed).standard_normal((1, 2, *size))
    assert_like_pywt(x, name, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FEW)
def test_inverse_of_any_coefficients(name, mode):
    """Not only of those that a transform gave: bands need not be consistent with each other."""
    rng = np.random.default_rng(3)
    enough = pywt.Wavelet(name).dec_len // 2
    for rows, columns in [(enough, enough + 3), (enough + 4, enough + 1)]:
        bands = rng.standard_normal((4, 2, 1, rows, columns))
        expected = pywt.idwt2((bands[0], tuple(bands[1:])), name, mode)
        got = ops.idwt2d(tuple(torch.from_numpy(bands)), name, mode)
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)


def test_bands_that_are_none_count_as_zeros():
    bands = np.random.default_rng(4).standard_normal((4, 1, 2, 6, 5))
    for keep in range(4):
        arrays = [bands[i] if i == keep else None for i in range(4)]
        tensors = [None if a is None else torch.from_numpy(a) for a in arrays]
        expected = pywt.idwt2((arrays[0], tuple(arrays[1:])), "db3", "symmetric")
        got = ops.idwt2d(tensors, "db3", "symmetric")
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ["periodization", "symmetric", "smooth", "antireflect"])
@pytest.mark.parametrize("name", ["haar", "db3", "bior2.4"])
@pytest.mark.parametrize("size", [(64, 48), (37, 53), (9, 30)])
def test_multilevel(name, mode, size):
    x = np.random.default_rng(5).standard_normal((2, 2, *size))
    deepest = pywt.dwtn_max_level(size, name)
    for level in (None, 0, min(1, deepest), deepest):
        expected = pywt.wavedec2(x, name, mode, level)
        got = ops.wavedec2(torch.from_numpy(x), name, level, mode)
        assert len(got) == len(expected)
        np.testing.assert_allclose(got[0].numpy(), expected[0], rtol=0, atol=1e-10)
        for g, e in zip(got[1:], expected[1:], strict=True):
            for band, band_expected in zip(g, e, strict=True):
                np.testing.assert_allclose(band.numpy(), band_expected, rtol=0, atol=1e-10)
        restored = ops.waverec2(got, name, mode)
        expected = pywt.waverec2(expected, name, mode)
        np.testing.assert_allclose(restored.numpy(), expected, rtol=0, atol=1e-10)
        restored = restored[:, :, : size[0], : size[1]]
        np.testing.assert_allclose(restored.numpy(), x, rtol=0, atol=1e-10)


def test_multilevel_without_some_details():
    x = np.random.default_rng(6).standard_normal((1, 1, 37, 26))
    expected = pywt.wavedec2(x, "db2", "symmetric", 3)
    expected[1] = (None, None, None)
    expected[3] = (expected[3][0], None, expected[3][2])
    got = [torch.from_numpy(expected[0])]
    got += [tuple(None if b is None else torch.from_numpy(b) for b in d) for d in expected[1:]]
    np.testing.assert_allclose(
        ops.waverec2(got, "db2", "symmetric").numpy(),
        pywt.waverec2(expected, "db2", "symmetric"),
        rtol=0,
        atol=1e-12,
    )


def test_too_many_levels_warn_as_in_pywavelets():
    x = np.random.default_rng(7).standard_normal((1, 1, 9, 8))
    with pytest.warns(UserWarning, match="level 4 is more than the 1"):
        got = ops.wavedec2(torch.from_numpy(x), "db2", 4, "symmetric")
    with pytest.warns(UserWarning):
        expected = pywt.wavedec2(x, "db2", "symmetric", 4)
    np.testing.assert_allclose(got[0].numpy(), expected[0], rtol=0, atol=1e-11)


def test_a_wavelet_object():
    r = np.sqrt(2) / 2
    mine = pywt.Wavelet("mine", [[r, r], [-r, r], [r, r], [r, -r]])
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(ops.dwt2d(x, mine), ops.dwt2d(x, "haar"), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["periodization", "smooth"])
def test_dtypes(mode, dtype):
    """Half precision is computed in float32 and rounded once: half a unit in the last place."""
    x = torch.randn(2, 3, 21, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = flat(pywt.dwt2(x.double().numpy(), "db4", mode))
    got = ops.dwt2d(x, "db4", mode)
    rtol = 0.51 * torch.finfo(dtype).eps
    atol = 1e-4 if mode == "smooth" else 2e-6
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        np.testing.assert_allclose(g.double().numpy(), e, rtol=rtol, atol=atol)
    bands = [g.double().numpy() for g in got]
    expected = pywt.idwt2((bands[0], tuple(bands[1:])), "db4", mode)
    back = ops.idwt2d(got, "db4", mode)
    assert back.dtype == dtype
    np.testing.assert_allclose(back.double().numpy(), expected, rtol=rtol, atol=atol)


def test_strides_and_channels_last():
    x = torch.randn(2, 3, 10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = ops.dwt2d(x, "db2", "reflect")
    last = x.contiguous(memory_format=torch.channels_last)
    got = ops.dwt2d(last, "db2", "reflect")
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in got)
    assert ops.idwt2d(got, "db2").is_contiguous(memory_format=torch.channels_last)
    transposed = ops.dwt2d(x.mT.contiguous().mT, "db2", "reflect")
    for g, t, e in zip(got, transposed, expected, strict=True):
        assert torch.allclose(g, e, rtol=0, atol=1e-14)
        assert torch.allclose(t, e, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(lambda x: ops.dwt2d(x, "db3", mode), x.requires_grad_())
    bands = [b.detach().requires_grad_() for b in ops.dwt2d(x, "db3", mode)]
    assert torch.autograd.gradcheck(lambda *b: ops.idwt2d(b, "db3", mode, (5, 4)), bands)


def test_filters_first_used_in_inference_mode_serve_training():
    x = torch.randn(1, 1, 8, 8)
    with torch.inference_mode():
        ops.dwt2d(x, "rbio6.8")
    x.requires_grad_()
    ops.dwt2d(x, "rbio6.8")[0].sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: ops.dwt2d(x, "db"), ValueError, "unknown discrete wavelet 'db'.*did you mean"),
        (lambda x: ops.dwt2d(x, "morl"), ValueError, "unknown discrete wavelet 'morl'"),
        (lambda x: ops.dwt2d(x, 3), TypeError, "a name or a pywt.Wavelet, got int"),
        (lambda x: ops.dwt2d(x, mode="period"), ValueError, "'period'.*periodic or periodization"),
        (lambda x: ops.dwt2d(x.long()), TypeError, "float32.*got torch.int64"),
        (lambda x: ops.dwt2d(x.numpy()), TypeError, "must be a torch.Tensor, got ndarray"),
        (lambda x: ops.dwt2d(x[0]), ValueError, r"4 dimensions, got shape \(1, 8, 8\)"),
        (lambda x: ops.dwt2d(x[:, :, :0]), ValueError, "no pixels"),
        (lambda x: ops.wavedec2(x, level=-1), ValueError, "level must be in .*got -1"),
        (lambda x: ops.idwt2d((x, x, x)), ValueError, "must be .cA, cH, cV, cD.* a tuple of 3"),
        (lambda x: ops.idwt2d((None,) * 4), ValueError, "all None"),
        (lambda x: ops.idwt2d((x, x, x, x[:, :, :5])), ValueError, r"cD must have shape.*5, 8\)"),
        (lambda x: ops.idwt2d((x, x, x, x.double())), TypeError, "cD is torch.float64 and cA"),
        (lambda x: ops.idwt2d((x,) * 4, output_size=(17, 16)), ValueError, r"size \(17, 16\)"),
        (lambda x: ops.idwt2d((x,) * 4, "db10", "zero"), ValueError, "8 coefficients.*length 20"),
        (lambda x: ops.waverec2([]), ValueError, "a list of 0"),
        (lambda x: ops.waverec2([x, (x, x)]), ValueError, "level 1 must be .cH, cV, cD."),
        (lambda x: ops.waverec2([x, (x, x, x[0])]), ValueError, "cD of level 1 must have shape"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(1, 1, 8, 8))


def test_a_backend_without_these_operators_is_refused():
    bands = (torch.zeros(1, 1, 4, 4),) * 4
    calls = [
        lambda: ops.dwt2d(bands[0]),
        lambda: ops.idwt2d(bands),
        lambda: ops.wavedec2(bands[0]),
        lambda: ops.waverec2([bands[0], bands[1:]]),
    ]
    for call in calls:
        with pytest.raises(BackendError), use_backend("cuda"):
            call()
        with use_backend("reference"):
            call()
