from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import pywt
import torch
from torch.autograd import gradcheck, gradgradcheck

from diffad_fast import ops, reference, use_backend

LEVELS = (1, 2, 3, 4)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Rounding of the output, and of a few sums in float32 before it.
TOLERANCE = {
    torch.float64: dict(rtol=1e-13, atol=1e-13),
    torch.float32: dict(rtol=1e-5, atol=2e-6),
    torch.bfloat16: dict(rtol=8e-3, atol=1e-5),
    torch.float16: dict(rtol=1e-3, atol=1e-5),
}


def packet(image: np.ndarray, level: int) -> np.ndarray:
    """(H, W) -> (4**level, H', W') by pywt.dwt2 on every band, coarsest digit most significant."""
    bands = [image]
    for _ in range(level):
        split = []
        for band in bands:
            low, (ch, cv, cd) = pywt.dwt2(band, "haar", mode="periodization")
            split.append((low, ch, cv, cd))
        bands = [four[digit] for digit in range(4) for four in split]
    return np.stack(bands)


def image(n, c, h, w, dtype=torch.float64, layout=torch.contiguous_format) -> torch.Tensor:
    return torch.randn(n, c, h, w, dtype=torch.float64).to(dtype).to(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 9])
@pytest.mark.parametrize("level", LEVELS)
def test_values_are_pywavelets(backend, level, channels, layout):
    x = image(2, channels, 48, 80, layout=layout)
    y = ops.haar_pack(x, level)
    for n, c in product(range(2), range(channels)):
        expected = packet(x[n, c].numpy(), level)
        np.testing.assert_allclose(y[n, c::channels].numpy(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.haar_unpack(y, level), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_channel_order_is_that_of_the_packet_paths(backend, level):
    x = image(1, 2, 16, 24)
    y = ops.haar_pack(x, level)
    for c in range(2):
        tree = pywt.WaveletPacket2D(x[0, c].numpy(), "haar", mode="periodization", maxlevel=level)
        for path in map("".join, product("ahvd", repeat=level)):
            # A path is written from the finest level to the coarsest.
            band = sum("ahvd".index(letter) * 4**i for i, letter in enumerate(path))
            np.testing.assert_allclose(
                y[0, band * 2 + c].numpy(), tree[path].data, rtol=1e-12, atol=1e-12, err_msg=path
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 8, 33])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("level", LEVELS)
def test_native_agrees_with_the_reference_in_float64(cpu_isa, level, dtype, channels, layout):
    # Blocks of one row at level 1 fill more than one tile, and several rows of blocks one.
    size = (16, 4128) if channels == 1 else (64, 48)
    x = image(1, channels, *size, dtype, layout)
    with use_backend("cpu"):
        y = ops.haar_pack(x, level)
        back = ops.haar_unpack(y, level)
    assert y.dtype == back.dtype == dtype
    assert y.is_contiguous(memory_format=layout) and back.is_contiguous(memory_format=layout)
    close = TOLERANCE[dtype]
    torch.testing.assert_close(y.double(), reference.haar_pack(x.double(), level), **close)
    torch.testing.assert_close(back.double(), reference.haar_unpack(y.double(), level), **close)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_numbers_of_blocks_that_leave_part_of_a_vector(cpu_isa, level, layout):
    for channels, rows, columns in ((1, 3, 9), (3, 2, 5), (11, 1, 1)):
        x = image(2, channels, rows * 2**level, columns * 2**level, torch.float32, layout)
        with use_backend("cpu"):
            y = ops.haar_pack(x, level)
            back = ops.haar_unpack(y, level)
        close = TOLERANCE[torch.float32]
        torch.testing.assert_close(y.double(), reference.haar_pack(x.double(), level), **close)
        torch.testing.assert_close(back, x, **close)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_results_larger_than_the_caches(cpu_isa, level, layout, dtype):
    """They are written past the caches, with the bits of strips that are small enough not to be;
    also where rows of the bands start between the boundaries of vectors."""
    whole = image(1, 3, 64, 4 * 13 * 16, dtype, layout)
    for width in (13 * 16, whole.shape[3]):
        strip = whole[..., :width]
        x = strip.repeat(1, 1, 2**24 // strip.nbytes, 1).contiguous(memory_format=layout)
        assert 2 * x.nbytes > 2**24 > 2 * strip.nbytes
        small, large = ops.haar_pack(strip, level), ops.haar_pack(x, level)
        assert all(torch.equal(part, small) for part in large.split(small.shape[2], 2))
        back = ops.haar_unpack(large, level)
        small = ops.haar_unpack(small, level)
        assert all(torch.equal(part, small) for part in back.split(64, 2))


@pytest.mark.native
def test_every_half_survives_conversion():
    # (h, 0, 0, 0) unpacks to h / 2 four times: every bit pattern goes in, halves of all come out.
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    halves = halves.view(1, 1, 256, 256)
    y = torch.cat([halves, torch.zeros(1, 3, 256, 256, dtype=torch.float16)], dim=1)
    with use_backend("cpu"):
        x = ops.haar_unpack(y, 1)
    expected = (halves.float() / 2).half().repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.native
def test_float_sums_round_to_nearest_half():
    # The mean of two neighbouring halves is a tie; the sums reach subnormals and overflow too.
    x = torch.randn(1, 1, 256, 256) * torch.logspace(-8, 5, 256)
    x = x.clamp(-65504, 65504).half()
    with use_backend("cpu"):
        low = ops.haar_pack(x, 1)[:, :1]
    a, b, c, d = (x.float()[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    expected = ((a + c) * 0.5 + (b + d) * 0.5).half()
    assert expected.isinf().any() and ((expected != 0) & (expected.abs() < 2**-14)).any()
    torch.testing.assert_close(low, expected, rtol=0, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_any_strides(backend, level):
    base = image(4, 6, 64, 64)
    last = base.to(memory_format=torch.channels_last)
    views = {
        "rows": base[:, :, 16:48, ::1],
        "every second column": base[..., ::2],
        "transposed": base.transpose(2, 3),
        "batch and channels swapped": base.transpose(0, 1),
        "channel slice of channels_last": last[:, 1:4],
        "crop of channels_last": last[:, :, 16:48, 16:32],
        "expanded": base[:, :1, :1, :1].expand(4, 6, 32, 32),
        "offset": base.flatten()[1 : 1 + 6 * 32 * 32].view(1, 6, 32, 32),
    }
    for name, x in views.items():
        y = ops.haar_pack(x, level)
        torch.testing.assert_close(y, reference.haar_pack(x.contiguous(), level), msg=name)
        is_last = "of channels_last" in name
        assert y.is_contiguous(memory_format=LAYOUTS[is_last]), name
    y = image(2, 2 * 4**level, 6, 10)
    for x in (y[..., 1::2], y.transpose(2, 3), y.to(memory_format=torch.channels_last)[:, :, 1:]):
        torch.testing.assert_close(
            ops.haar_unpack(x, level), reference.haar_unpack(x.contiguous(), level)
        )


def test_empty_tensors(backend):
    assert ops.haar_pack(torch.empty(0, 3, 8, 8), 2).shape == (0, 48, 2, 2)
    assert ops.haar_unpack(torch.empty(0, 48, 2, 2), 2).shape == (0, 3, 8, 8)
    assert ops.haar_pack(torch.empty(2, 3, 0, 8), 2).shape == (2, 48, 0, 2)


def test_white_noise_stays_white(backend):
    y = ops.haar_pack(torch.randn(8, 1, 128, 128), 3)
    covariance = torch.cov(y.transpose(0, 1).flatten(1).double())  # of 64 bands, 2048 samples each
    assert (covariance - torch.eye(64)).abs().max() < 0.2  # 6 deviations


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_outputs_are_fully_written(level, layout, written):
    for channels, rows, columns in ((1, 1, 1), (3, 5, 9), (9, 2, 17)):
        r = 2**level
        y = ops.haar_pack(image(2, channels, rows * r, columns * r, torch.float32, layout), level)
        assert written(y) and written(ops.haar_unpack(y, level))


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(by_threads, dtype, layout):
    x = image(3, 5, 96, 160, dtype, layout)

    def both():
        y = torch.ops.diffad_fast.haar_pack(x, 3)
        return y, torch.ops.diffad_fast.haar_unpack(y, 3)

    by_threads(both)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", [1, 2])
def test_gradients(backend, level, layout):
    x = image(1, 2, 8, 4, layout=layout).requires_grad_()
    y = image(1, 2 * 4**level, 2, 1, layout=layout).requires_grad_()
    assert gradcheck(lambda x: ops.haar_pack(x, level), x)
    assert gradcheck(lambda y: ops.haar_unpack(y, level), y)
    assert gradgradcheck(lambda x: ops.haar_pack(x, level).square(), x)
    assert gradgradcheck(lambda y: ops.haar_unpack(y, level).square(), y)


def test_gradient_of_a_sum(backend):
    # Its gradient is expanded from one number: stride 0 in every dimension.
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    ops.haar_pack(x, 1).sum().backward()
    # Every output of a block counts once: 2a from (a+b+c+d)/2 and so on, nothing from b, c, d.
    expected = torch.zeros(2, 3, 8, 8)
    expected[..., 0::2, 0::2] = 2
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["haar_pack", "haar_unpack"])
def test_opcheck(name, layout):
    operator = getattr(torch.ops.diffad_fast, name).default
    shape = (2, 3, 8, 16) if name == "haar_pack" else (2, 48, 3, 2)
    for x in (
        image(*shape, torch.float32, layout).requires_grad_(),
        image(*shape, torch.bfloat16, layout),
        image(*shape, torch.float64, layout)[:0],
        image(*shape, torch.float32, layout)[:, :, :, ::1].transpose(2, 3).requires_grad_()
        if name == "haar_pack"
        else image(*shape, torch.float32, layout)[:, :16].requires_grad_(),
    ):
        torch.library.opcheck(operator, (x, 2))


def compiled_agrees(**how) -> None:
    def twice(x):
        return ops.haar_unpack(ops.haar_pack(x, 2).tanh(), 1)

    compiled = torch.compile(twice, fullgraph=True, **how)
    for size in (16, 32):
        x = torch.randn(2, 3, size, 8, requires_grad=True)
        torch.testing.assert_close(compiled(x), twice(x))
        ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, twice))
        torch.testing.assert_close(ours, theirs)


def test_compiles_as_one_graph(backend):
    compiled_agrees(backend="aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor(backend):
    compiled_agrees(dynamic=True)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ops.haar_pack(torch.zeros(1, 1, 12, 8), 3), ValueError, "12 x 8.*divide by 8"),
        (lambda: ops.haar_pack(torch.zeros(1, 1, 8, 12), 3), ValueError, "8 x 12.*divide by 8"),
        (lambda: ops.haar_pack(torch.zeros(1, 1, 32, 32), 0), ValueError, r"level.*\[1, 4\].*0"),
        (lambda: ops.haar_pack(torch.zeros(1, 1, 32, 32), 5), ValueError, r"level.*\[1, 4\].*5"),
        (lambda: ops.haar_pack(torch.zeros(1, 1, 8, 8), 1.0), TypeError, "level.*integer"),
        (lambda: ops.haar_pack(torch.zeros(1, 8, 8), 1), ValueError, r"\(1, 8, 8\)"),
        (lambda: ops.haar_pack(torch.zeros(1, 1, 8, 8).int(), 1), TypeError, "int32"),
        (lambda: ops.haar_pack(np.zeros((1, 1, 8, 8)), 1), TypeError, "ndarray"),
        (lambda: ops.haar_unpack(torch.zeros(1, 6, 8, 8), 1), ValueError, "6 channels.*by 4"),
        (lambda: ops.haar_unpack(torch.zeros(1, 64, 8, 8), -1), ValueError, "level"),
    ],
)
def test_bad_arguments(backend, call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.native
@pytest.mark.parametrize("bad", [(1, 1, 6, 8), (1, 8, 8)])
def test_the_bare_operator_guards_its_memory(bad):
    with pytest.raises(RuntimeError):
        torch.ops.diffad_fast.haar_pack(torch.zeros(bad), 2)


def test_the_reference_takes_any_level():
    x = image(1, 1, 64, 32)
    y = reference.haar_pack(x, 5)
    np.testing.assert_allclose(y[0].numpy(), packet(x[0, 0].numpy(), 5), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.haar_unpack(y, 5), x)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [1, 3, 8, 65, pytest.param(300, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("level", LEVELS)
def test_cuda_agrees_with_the_reference_in_float64(cuda, level, channels, dtype):
    """Threads with whole blocks, and tiles of one channel and of several, cut off on both sides."""
    close = TOLERANCE[dtype]
    for layout in LAYOUTS:
        columns = 2080 if cuda == "cuda" else 560
        x = image(2, channels, 32, columns if channels == 1 else 32, dtype, layout)
        y = ops.haar_pack(x.to(cuda), level).cpu()
        back = ops.haar_unpack(y.to(cuda), level).cpu()
        strided = ops.haar_pack(x.to(cuda).transpose(2, 3), level).cpu()
        assert y.is_contiguous(memory_format=layout) and back.is_contiguous(memory_format=layout)
        for ours, expected in (
            (y, reference.haar_pack(x.double(), level)),
            (back, reference.haar_unpack(y.double(), level)),
            (strided, reference.haar_pack(x.double().transpose(2, 3), level)),
        ):
            torch.testing.assert_close(ours.double(), expected, **close)
