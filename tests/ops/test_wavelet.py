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
        coeffs = tuple(torch.from_numpy(bands))
        got = ops.idwt2d(coeffs, name, mode)
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)
        # A crop by more than the one sample of an odd side changes no value that it leaves.
        height, width = max(1, got.shape[2] - 3), max(1, got.shape[3] - 2)
        crop = ops.idwt2d(coeffs, name, mode, output_size=(height, width))
        np.testing.assert_allclose(crop.numpy(), expected[..., :height, :width], rtol=0, atol=1e-12)


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


def test_the_largest_level_is_pywavelets():
    for name in WAVELETS[::7]:
        for n in (7, 16, 63, 200):
            found = len(ops.wavedec2(torch.zeros(1, 1, n, 300), name)) - 1
            assert found == pywt.dwtn_max_level((n, 300), name), (name, n)


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


def test_filters_as_short_as_haars_that_are_not():
    """Each differs from Haar's in one number, and must not be taken for it."""
    r = np.sqrt(2) / 2
    x = np.random.default_rng(8).standard_normal((1, 2, 8, 6))
    for place in range(4):
        bank = np.array([[r, r], [-r, r], [r, r], [r, -r]])
        bank[place // 2, place % 2] *= -0.5
        bank[2:] = bank[:2, ::-1]
        mine = pywt.Wavelet("mine", bank.tolist())
        got = ops.dwt2d(torch.from_numpy(x), mine)
        for g, e in zip(got, flat(pywt.dwt2(x, mine, "periodization")), strict=True):
            np.testing.assert_allclose(g.numpy(), e, rtol=0, atol=1e-13)
        expected = pywt.idwt2((x, (x, x, x)), mine, "periodization")
        back = ops.idwt2d((torch.from_numpy(x),) * 4, mine)
        np.testing.assert_allclose(back.numpy(), expected, rtol=0, atol=1e-13)


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
    for backend in ("auto", "reference"):  # a slice of its channels too
        with use_backend(backend):
            some = ops.dwt2d(last[:, :2], "db2", "reflect")
        assert all(g.is_contiguous(memory_format=torch.channels_last) for g in some)
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


# ------------------------------------------------------------------- native operators

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def normal(*shape, dtype=torch.float64, layout=torch.contiguous_format, seed=0):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).to(memory_format=layout)


def exact(function, *arguments):
    """The reference's result in float64, which is that of PyWavelets (see above)."""
    with use_backend("reference"):
        return function(*arguments)


def assert_close(got, expected, dtype, growth=1.0):
    """Within the rounding of the result, and of sums in float32 before it."""
    eps = {torch.float64: 2e-14, torch.float32: 2e-6}.get(dtype, 2e-6)
    rtol = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 0.0) * 1.02
    scale = growth * max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=eps * scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("name", ["haar", "db2", "bior1.3", "db4", "sym8", "dmey"])
def test_native_agrees_with_the_reference(cpu_isa, name, dtype, layout):
    for mode in ("periodization", "symmetric", "smooth"):
        for shape in [(2, 3, 16, 24), (1, 9, 7, 41), (1, 1, 1, 5), (0, 2, 8, 8), (1, 17, 34, 70)]:
            x = normal(*shape, dtype=dtype, layout=layout)
            got = ops.dwt2d(x, name, mode)
            expected = exact(ops.dwt2d, x.double(), name, mode)
            for g, e in zip(got, expected, strict=True):
                assert g.dtype == dtype and g.is_contiguous(memory_format=layout)
                assert_close(g, e, dtype, 10)
            back = ops.idwt2d(got, name, mode)
            expected = exact(ops.idwt2d, [g.double() for g in got], name, mode)
            assert back.dtype == dtype and back.is_contiguous(memory_format=layout)
            assert_close(back, expected, dtype, 10)


@pytest.mark.native
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["haar", "db3", "db4", "sym5"])
def test_each_direction_is_the_adjoint_of_the_other(name, mode):
    """<M x, c> = <x, M^T c> ties the two operators, border by border, at any crop."""
    filters = torch.tensor(pywt.Wavelet(name).filter_bank[:2], dtype=torch.float64)
    cropped = len(MODES)
    for border in (reference.wavelet.MODES.index(mode), cropped):
        for height, width in [(12, 10), (7, 16), (2, 3), (23, 5)]:
            rows, columns = (height + filters.shape[1]) // 2, (width + 1) // 2
            x = normal(2, 2, height, width)
            c = [normal(2, 2, rows, columns, seed=i) for i in range(4)]
            y = torch.ops.diffad_fast.dwt2d(x, filters, border, rows, columns)
            z = torch.ops.diffad_fast.idwt2d(*c, filters, border, height, width)
            left = sum((a * b).sum() for a, b in zip(y, c, strict=True))
            torch.testing.assert_close(left, (x * z).sum(), rtol=1e-11, atol=1e-11)


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    base = normal(4, 6, 40, 36, layout=layout)
    views = {
        "crop": base[:, :, 3:30, 5:28],
        "every second column": base[..., ::2],
        "flipped batch of channels": base.transpose(0, 1),
        "transposed": base.mT,
        "channels": base[:, 1:4],
        "expanded": base[:, :1, :1, :1].expand(4, 6, 20, 18),
    }
    for name, x in views.items():
        for wavelet in ("haar", "db4"):
            got = ops.dwt2d(x, wavelet, "symmetric")
            expected = exact(ops.dwt2d, x.contiguous(), wavelet, "symmetric")
            for g, e in zip(got, expected, strict=True):
                torch.testing.assert_close(g, e, msg=name)
    # Bands of unlike strides.
    bands = [
        base[..., :18],
        base[..., 1:19],
        base[..., ::2],
        base[:, :, :1, :18].expand(4, 6, 40, 18),
    ]
    for wavelet in ("haar", "db4"):
        torch.testing.assert_close(
            ops.idwt2d(bands, wavelet, "symmetric"), exact(ops.idwt2d, bands, wavelet, "symmetric")
        )


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["haar", "db4", "sym8"])
def test_outputs_are_fully_written(name, layout, written):
    for mode in MODES:
        for size in [(1, 1, 2, 2), (2, 3, 17, 30), (1, 5, 64, 64)]:
            bands = ops.dwt2d(normal(*size, dtype=torch.float32, layout=layout), name, mode)
            assert all(map(written, bands)) and written(ops.idwt2d(bands, name, mode))


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["haar", "db4", "sym8"])
def test_threads_do_not_change_a_bit(by_threads, name, layout):
    x = normal(3, 5, 95, 160, dtype=torch.float32, layout=layout).requires_grad_()

    def both():
        bands = ops.dwt2d(x, name, "reflect")
        back = ops.idwt2d(bands, name, "reflect")
        (grad,) = torch.autograd.grad(back.square().sum() + bands[1].sum(), x)
        return *bands, back, grad

    by_threads(both)


@pytest.mark.parametrize("mode", ["periodization", "antireflect"])
def test_gradient_of_a_sum(mode):
    """Its gradient is expanded from one number; the bands that are not used count as zeros."""
    x = normal(2, 3, 9, 8).requires_grad_()
    for pick in (slice(0, 1), slice(1, 4)):
        ours, theirs = (
            torch.autograd.grad(sum(b.sum() for b in bands[pick]), x)[0]
            for bands in (ops.dwt2d(x, "db3", mode), exact(ops.dwt2d, x, "db3", mode))
        )
        torch.testing.assert_close(ours, theirs)
    bands = [normal(2, 3, 9, 8, seed=i).requires_grad_() for i in range(4)]
    ours = torch.autograd.grad(ops.idwt2d(bands, "db3", mode).sum(), bands)
    theirs = torch.autograd.grad(exact(ops.idwt2d, bands, "db3", mode).sum(), bands)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["periodization", "smooth"])
def test_second_derivatives(mode):
    x = normal(1, 2, 5, 4).requires_grad_()
    square = lambda x: sum(b.square().sum() for b in ops.dwt2d(x, "db2", mode))  # noqa: E731
    assert torch.autograd.gradgradcheck(square, x)


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    for name, border in (("haar", 5), ("db3", 4)):
        filters = torch.tensor(pywt.Wavelet(name).filter_bank[:2], dtype=torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(2, 3, 8, 10, dtype=dtype, layout=layout).requires_grad_()
            torch.library.opcheck(torch.ops.diffad_fast.dwt2d.default, (x, filters, border, 4, 5))
            bands = [
                normal(2, 3, 4, 5, dtype=dtype, layout=layout, seed=i).requires_grad_()
                for i in range(4)
            ]
            torch.library.opcheck(
                torch.ops.diffad_fast.idwt2d.default, (*bands, filters, border, 8, 10)
            )


def test_compiles_as_one_graph():
    def twice(x):
        low, *details = ops.dwt2d(x, "db2", "symmetric")
        return ops.idwt2d((low.tanh(), *details), "db2", "symmetric")

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for size in (16, 21):
        x = normal(2, 3, size, 8).requires_grad_()
        torch.testing.assert_close(compiled(x), twice(x))
        ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, twice))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.native
@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(1, 8, 8), torch.zeros(2, 2).double(), 0, 4, 4),
        (torch.zeros(1, 1, 8, 8), torch.zeros(2, 2), 0, 4, 4),
        (torch.zeros(1, 1, 8, 8), torch.zeros(3, 2).double(), 0, 4, 4),
        (torch.zeros(1, 1, 8, 8), torch.zeros(2, 2).double(), 10, 4, 4),
        (torch.zeros(1, 1, 1, 8), torch.zeros(2, 2).double(), 6, 4, 4),
        (torch.zeros(1, 1, 8, 8).int(), torch.zeros(2, 2).double(), 0, 4, 4),
    ],
)
def test_the_bare_operator_guards_its_memory(arguments):
    with pytest.raises(RuntimeError):
        torch.ops.diffad_fast.dwt2d(*arguments)


@pytest.mark.native
def test_the_bare_inverse_refuses_unlike_bands():
    filters = torch.zeros(2, 2).double()
    x = torch.zeros(1, 1, 4, 4)
    for other in (torch.zeros(1, 1, 4, 3), x.double(), x[0]):
        with pytest.raises(RuntimeError):
            torch.ops.diffad_fast.idwt2d(x, x, x, other, filters, 0, 8, 8)
