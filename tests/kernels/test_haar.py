"""The Triton Haar packets against the reference in float64 and PyWavelets, values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch

pytest.importorskip("triton")
from diffad_fast.kernels import haar as haar_kernel

import diffad_fast as daf
from diffad_fast import ops, reference
from diffad_fast.diffusion import NoiseSchedule
from diffad_fast.errors import BackendError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEVELS = (1, 2, 3, 4)
# Rounding of the output.
TOLERANCE = {
    torch.float64: dict(rtol=1e-13, atol=1e-13),
    torch.float32: dict(rtol=1e-6, atol=2e-6),
    torch.float16: dict(rtol=1e-3, atol=1e-5),
    torch.bfloat16: dict(rtol=8e-3, atol=1e-5),
}


def random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def both_ways(x, level):
    """Pack and unpack with gradients, by both; each gradient is the other transform. Returns the
    packet and the image made of it."""
    made = []
    for name in ("haar_pack", "haar_unpack"):
        results, upstream = [], None
        for backend, leaf in (("triton", x), ("reference", x.double())):
            leaf = leaf.detach().requires_grad_()
            with daf.use_backend(backend):
                y = getattr(ops, name)(leaf, level)
            upstream = random(*y.shape, seed=1, dtype=y.dtype) if upstream is None else upstream
            (grad,) = torch.autograd.grad(y, leaf, upstream.to(y.dtype))
            results.append((y, grad))
        for got, expected in zip(*results, strict=True):
            assert got.dtype == x.dtype and got.shape == expected.shape
            torch.testing.assert_close(got.double(), expected.double(), **TOLERANCE[x.dtype])
        x = results[0][0].detach()
        made.append(x)
    return made


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("level", LEVELS)
def test_odd_and_prime_sizes(level, layout):
    # Numbers of blocks and channels that fill no tile, and more than one tile each way.
    sizes = [(3, 5, 7), (1, 1, 37)] + [(2, 17, 1)] * (level == 1)
    for channels, rows, columns in sizes:
        x = random(1, channels, rows << level, columns << level).contiguous(memory_format=layout)
        for made in both_ways(x, level):
            assert made.is_contiguous(memory_format=layout) or channels == 1


def test_more_channels_than_lanes():
    both_ways(random(1, 37, 4, 6).contiguous(memory_format=torch.channels_last), 1)


@pytest.mark.parametrize("level", LEVELS)
def test_band_order_is_that_of_the_packet_paths(level):
    x = random(1, 2, 16, 16)
    with daf.use_backend("triton"):
        y = ops.haar_pack(x, level)[0].cpu()
    for c in range(2):
        image = x[0, c].cpu().numpy()
        tree = pywt.WaveletPacket2D(image, "haar", mode="periodization", maxlevel=level)
        for node in tree.get_level(level, "natural"):
            # A path is written from the finest level to the coarsest.
            band = sum("ahvd".index(letter) * 4**i for i, letter in enumerate(node.path))
            np.testing.assert_allclose(y[2 * band + c], node.data, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes_and_layouts(dtype):
    base = random(1, 4, 8, 24, dtype=dtype)
    last = base.contiguous(memory_format=torch.channels_last)
    one = base[:, :1].reshape(1, 8, 24, 1).permute(0, 3, 1, 2)  # channels_last with one channel
    assert all(y.stride(1) == 1 for y in both_ways(one, 2)[:1])
    views = (last[:, 1:4, 4:], base[:, :1].transpose(2, 3), base[:, ::3, :, ::3])
    for view in (*views, base[:1, :1, :1, :1].expand(2, 2, 4, 8)):
        both_ways(view, 2)


def test_every_position_is_written():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
    try:
        for level, last in ((1, False), (2, True)):
            x = random(1, 3, 5 << level, 3 << level)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            with daf.use_backend("triton"):
                y = ops.haar_pack(x, level)
                assert y.isfinite().all() and ops.haar_unpack(y, level).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(before)


def test_second_derivatives():
    # Of sum(pack(x)^3) = sum(y^3): the Hessian times u is pack^T (6 y pack(u)).
    x, u = random(1, 4, 2, 2).requires_grad_(), random(1, 4, 2, 2, seed=1)
    for name, inverse in (("haar_pack", "haar_unpack"), ("haar_unpack", "haar_pack")):
        with daf.use_backend("triton"):
            y = getattr(ops, name)(x, 1)
            (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            (got,) = torch.autograd.grad(grad, x, u)
        forward, back = getattr(reference, name), getattr(reference, inverse)
        expected = back(6 * forward(x, 1) * forward(u, 1), 1)
        torch.testing.assert_close(got, expected)


def test_gradient_of_a_sum():
    # Its gradient is expanded from one number: stride 0 in every dimension.
    x = random(1, 2, 4, 4).requires_grad_()
    with daf.use_backend("triton"):
        ops.haar_pack(x, 1).sum().backward()
    # Every output of a block counts once: 2 a from (a+b+c+d)/2 and so on, nothing from b, c, d.
    expected = torch.zeros(1, 2, 4, 4, dtype=x.dtype, device=DEVICE)
    expected[..., ::2, ::2] = 2
    torch.testing.assert_close(x.grad, expected)


def test_empty_batch():
    with daf.use_backend("triton"):
        y = ops.haar_pack(random(0, 3, 8, 8), 2)
        assert y.shape == (0, 48, 2, 2) and ops.haar_unpack(y, 2).shape == (0, 3, 8, 8)


def test_opcheck():
    namespace = torch.ops.diffad_fast_triton
    x = random(1, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(namespace.haar_pack, (x, 1))
    torch.library.opcheck(namespace.haar_unpack, (random(1, 4, 1, 2).requires_grad_(), 1))


def test_tiles():
    """No tile holds more than the threads' registers, whatever the channels."""
    for level in LEVELS:
        for channels in (1, 3, 64, 512):
            for last in (False, True):
                for config in haar_kernel._configs(level, channels, last):
                    sizes = config.kwargs
                    values = sizes["ROWS"] * sizes["BLOCKS"] * sizes["LANES"] * 4**level
                    assert 2048 <= values <= 16 * 32 * config.num_warps
                    assert sizes["LANES"] <= 32 and (last or sizes["LANES"] == 1)


def packet_arguments(shape, level, dtype=torch.float64, shared=False):
    """Images, mean, deviation, t, noise in contiguous strides, a table."""
    n, c, h, w = shape
    x = random(*shape, dtype=dtype)
    packed = (1 if shared else n, c * 4**level, h >> level, w >> level)
    mean = random(packed[1], seed=2, dtype=torch.promote_types(dtype, torch.float32))
    t = torch.arange(n, device=DEVICE) * 389 % 1000
    table = NoiseSchedule("cosine").alphas_cumprod.to(DEVICE)
    return x, mean, mean.abs() + 0.5, t, random(*packed, seed=3, dtype=dtype), table


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("level", [0, 1, 3])
def test_standardised_and_noised(level, kind):
    x, mean, deviation, t, noise, table = packet_arguments((2, 3, 16, 40), level, shared=level == 1)
    with daf.use_backend("triton"):
        plain = ops.standardised_packet(x, mean, deviation, level)
        got = ops.noised_packet(x, mean, deviation, t, noise, table, level, kind)
    x0 = reference.haar_pack(x, level) if level else x
    x0 = (x0 - mean[:, None, None]) / deviation[:, None, None]
    expected = reference.noised_target(x0, t, noise, table, kind)
    for a, b in zip((plain, *got[:2]), (x0, *expected[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert a.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packets_by_dtype_and_layout(dtype):
    x, *statistics, t, noise, table = packet_arguments((2, 1, 12, 44), 2, dtype)
    one = x.reshape(2, 12, 44, 1).permute(0, 3, 1, 2)  # channels_last with one channel
    scale = {torch.float64: 1, torch.float32: 5}.get(dtype, 2)
    close = {name: scale * value for name, value in TOLERANCE[dtype].items()}
    wide = [y.double() for y in (x, *statistics)]
    expected = reference.noised_packet(*wide, t, noise.double(), table, 2)
    last = noise.contiguous(memory_format=torch.channels_last)
    for image, z in ((x, noise), (one, last), (x.transpose(2, 3).clone().transpose(2, 3), noise)):
        with daf.use_backend("triton"):
            got = ops.noised_packet(image, *statistics, t, z, table, 2)
            plain = ops.standardised_packet(image, *statistics, 2)
        for a, b in zip(got[:2], expected, strict=False):
            assert a.dtype == dtype and a.stride(1) == 1
            torch.testing.assert_close(a.double(), b, rtol=close["rtol"], atol=close["rtol"])
        torch.testing.assert_close(got[2].double(), expected[2].double(), rtol=1e-6, atol=1e-7)
        exact = reference.standardised_packet(*wide, 2)
        torch.testing.assert_close(plain.double(), exact, rtol=close["rtol"], atol=close["rtol"])


def test_packets_refuse_gradients():
    x, *rest = packet_arguments((1, 1, 4, 4), 1)
    with daf.use_backend("triton"):
        with pytest.raises(BackendError, match="no gradient"):
            ops.standardised_packet(x.requires_grad_(), *rest[:2])
        with pytest.raises(BackendError, match="no gradient"):
            ops.noised_packet(x, *rest)
        with torch.no_grad():
            assert ops.standardised_packet(x, *rest[:2]).shape == (1, 4, 2, 2)


def test_opcheck_of_packets():
    x, mean, deviation, t, noise, table = packet_arguments((1, 1, 4, 6), 1)
    namespace = torch.ops.diffad_fast_triton
    torch.library.opcheck(namespace.standardise_packet, (x, mean, deviation, 1))
    arguments = (x, mean, deviation, t, noise, table, 1, 2, 5.0)
    torch.library.opcheck(namespace.noise_packet, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_on_a_gpu(dtype, level):
    for channels, layout in ((1, torch.channels_last), (3, torch.contiguous_format)):
        x = random(3, channels, 160, 272, dtype=dtype).contiguous(memory_format=layout)
        both_ways(x, level)

        def function(x):
            return ops.haar_unpack(ops.haar_pack(x, level), 1)

        with daf.use_backend("triton"):
            first = function(x)
            for again in (function(x), torch.compile(function, fullgraph=True)(x)):
                assert torch.equal(again, first)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = function(x)
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, first)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_other_sizes_compile_nothing():
    def compiled():
        return sum(len(cache[0]) for cache in haar_kernel._haar.device_caches.values())

    with daf.use_backend("triton"):
        ops.haar_pack(random(2, 3, 64, 128), 2)
        before = compiled()
        for shape in ((1, 3, 192, 64), (5, 3, 64, 320)):
            ops.haar_pack(random(*shape), 2)
        assert compiled() == before


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("level", [0, 2, 3])
def test_packets_on_a_gpu(level):
    arguments = packet_arguments((5, 1, 264, 136), level, torch.float32)

    def function(x, mean, deviation, t, noise, table):
        return (*ops.noised_packet(x, mean, deviation, t, noise, table, level),
                ops.standardised_packet(x, mean, deviation, level))  # fmt: skip

    x, mean, deviation, t, noise, table = arguments
    wide = (x.double(), mean.double(), deviation.double(), t, noise.double(), table)
    expected = (*reference.noised_packet(*wide, level),
                reference.standardised_packet(*wide[:3], level))  # fmt: skip
    with daf.use_backend("triton"):
        got = function(*arguments)
        compiled = torch.compile(function, fullgraph=True)(*arguments)
    for a, b, again in zip(got, expected, compiled, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)
        assert torch.equal(a, again)
