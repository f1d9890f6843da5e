"""The Triton kernels of wavelet_attention, in the interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import diffad_fast as daf
from diffad_fast import ops, reference
from diffad_fast.denoisers.wavelet_unet import WaveletUNet
from diffad_fast.errors import BackendError
from diffad_fast.ops import dispatch

pytestmark = pytest.mark.skipif(
    "triton" in dispatch.unavailable(), reason=dispatch.unavailable().get("triton", "")
)
interpreted = pytest.mark.skipif(not dispatch.INTERPRETER, reason="there is a GPU")
DEVICE = torch.device("cpu" if dispatch.INTERPRETER else "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("q", "k", "v", "logit_gain", "value_gain")


@pytest.fixture(autouse=True)
def _triton():
    with daf.use_backend("triton"):
        yield


def draw(shape, seed, dtype=torch.float32, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def layout(x, kind):
    """``x`` (N,heads,H,W,d) in other strides."""
    n, heads, h, w, d = x.shape
    if kind == "contiguous":
        return x
    if kind == "channels_last":  # heads and channels together, as in a slice of a projection
        y = x.new_full((n, h, w, 3, heads, d), float("nan"))
        y[:, :, :, 1] = x.permute(0, 2, 3, 1, 4)
        return y[:, :, :, 1].permute(0, 3, 1, 2, 4)
    if kind == "transposed":  # channels not side by side
        return x.transpose(3, 4).contiguous().transpose(3, 4)
    if kind == "sliced":
        y = x.new_full((n, heads, h + 1, 2 * w, d + 3), float("nan"))
        y[:, :, 1:, ::2, 2:-1] = x
        return y[:, :, 1:, ::2, 2:-1]
    raise AssertionError(kind)


def check(shape, level, dtype=torch.float32, w=True, g=True, kind="contiguous", scale=None):
    """Output and gradients of the kernels against ``reference`` in float64."""
    heads = shape[1]
    gains = [
        1 + 0.5 * draw((heads, 1 + 3 * level), s) if on else None for s, on in ((3, w), (4, g))
    ]
    inputs = [layout(draw(shape, s, dtype), kind) for s in range(3)] + gains
    compare(inputs, layout(draw(shape, 5, dtype), kind), level, scale)


def compare(inputs, grad, level=1, scale=None):
    """The kernels may be off by 4 times what the reference in the same dtype is, and by its
    rounding of the largest value; the gradients of q, k and logit_gain are differences of values
    of the size of v's (and 0 for a single block)."""

    def run(function, change):
        given = [x if x is None else change(x.detach()).requires_grad_() for x in inputs]
        out = function(*given, level, scale)
        given = [x for x in given if x is not None]
        return [out.detach(), *torch.autograd.grad(out, given, change(grad))]

    got = run(ops.wavelet_attention, lambda x: x)
    plain = run(reference.wavelet_attention, lambda x: x)
    exact = run(reference.wavelet_attention, lambda x: x.double())
    eps = torch.finfo(grad.dtype).eps
    names = ["output", *(name for name, x in zip(NAMES, inputs, strict=True) if x is not None)]
    for name, x, y, z in zip(names, got, plain, exact, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        largest = max(
            z.abs().max(), exact[3].abs().max() if name in ("q", "k", "logit_gain") else 0
        )
        allowed = 4 * (y - z).abs().max() + 8 * eps * largest
        error = (x - z).abs().max()
        assert error <= allowed, f"{name} is off by {error:.1e}, allowed is {allowed:.1e}"


# Blocks: 5 x 7 = 35 (no multiple of a tile), 1 x 37 (prime), 1, 3 x 3.
@pytest.mark.parametrize(
    "heads, size, level, d, kind",
    [
        (2, (10, 14), 1, 8, "channels_last"),
        (1, (2, 74), 1, 16, "contiguous"),
        (1, (74, 2), 1, 1, "sliced"),
        (2, (2, 2), 1, 5, "transposed"),
        (1, (4, 4), 2, 9, "channels_last"),
        (2, (12, 12), 2, 3, "sliced"),
        (1, (20, 28), 2, 2, "transposed"),
    ],
)
def test_equals_the_reference(heads, size, level, d, kind):
    check((1, heads, *size, d), level, kind=kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("level", [1, 2])
def test_half_precision(dtype, level):
    images = 3 - level
    check((images, 1, 6 * level, 6 * level, 24 // level), level, dtype, kind="channels_last")


@pytest.mark.parametrize("w, g", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("level", [1, 2])
def test_without_gains(w, g, level):
    check((1, 1, 6 * level, 2 * level, 4), level, w=w, g=g)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.5])
def test_scale(scale):
    check((1, 1, 2, 6, 4), 1, scale=scale)


@interpreted
@pytest.mark.parametrize(
    "level, heads, rows, columns, kind, wide",
    [  # of blocks; tiles are 32 queries and 16 keys
        (1, 1, 2, 32, "contiguous", True),  # a row is a tile, or two are
        (1, 1, 8, 8, "sliced", False),  # some rows are
        (1, 2, 1, 64, "channels_last", False),  # a part of one
        (2, 1, 16, 4, "channels_last", True),
        *(
            pytest.param(level, 2, rows, columns, kind, True, marks=pytest.mark.slow)
            for level, rows, columns, kind in (
                (1, 2, 32, "contiguous"),
                (1, 8, 8, "sliced"),
                (1, 1, 64, "channels_last"),
                (2, 16, 4, "channels_last"),
            )
        ),
    ],
)
def test_tiles_that_cover_all_blocks(level, heads, rows, columns, kind, wide, monkeypatch):
    kernels = importlib.import_module("diffad_fast.kernels.wavelet_attention")
    launched = whether_tiles_cover_all_blocks(kernels, monkeypatch)
    # Also no padded channel.
    shape = (1 + (kind == "sliced"), heads, rows << level, columns << level, 4 - (level == 2))
    check(shape, level, kind=kind)
    if wide:
        monkeypatch.setattr(kernels, "WIDE_FROM", 0)
        check(shape, level, kind=kind, w=False)
    assert launched == (6 if wide else 3) * [True]


@interpreted
@pytest.mark.parametrize("level", [1, 2])
def test_a_tile_of_one_and_a_half_rows(level, monkeypatch):
    kernels = importlib.import_module("diffad_fast.kernels.wavelet_attention")
    launched = whether_tiles_cover_all_blocks(kernels, monkeypatch)
    check((1, 1, 2 << level, 24 << level, 3), level)
    assert launched == 3 * [False]


def whether_tiles_cover_all_blocks(kernels, monkeypatch):
    """A list that will have an entry for each kernel that is launched."""
    launched, launch = [], kernels.launch

    def seen(*args, **constants):
        launched.append(constants["WHOLE"])
        launch(*args, **constants)

    monkeypatch.setattr(kernels, "launch", seen)
    return launched


def test_gains_of_zero():
    """The gradient of a value gain does not divide by it."""
    zero = torch.zeros(1, 4, device=DEVICE)
    compare([*(draw((1, 1, 4, 6, 4), s) for s in range(3)), zero, zero], draw((1, 1, 4, 6, 4), 5))


def test_very_negative_logits():
    """Beyond the last key there is no probability, however small the sum of exponentials is."""
    q, k, v = (draw((1, 1, 2, 6, 8), s) for s in range(3))
    q = (40 + q).requires_grad_()
    k = (k - 40).requires_grad_()
    out = ops.wavelet_attention(q, k, v)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), (q, k))))


def test_expanded_gradient_and_empty_batch():
    grad = torch.ones((), device=DEVICE).expand(1, 1, 2, 4, 4)
    compare([*(draw((1, 1, 2, 4, 4), s) for s in range(3)), None, None], grad)
    q = torch.zeros(0, 2, 4, 4, 8, device=DEVICE, requires_grad=True)
    gain = torch.ones(2, 4, device=DEVICE, requires_grad=True)
    out = ops.wavelet_attention(q, q, q, gain, gain)
    assert out.shape == q.shape
    out.sum().backward()
    assert gain.grad.eq(0).all() and q.grad.shape == q.shape


def test_memory_layout_and_repeats():
    """The output lies in memory as q does; the same call gives the same bits."""
    inputs = [layout(draw((2, 2, 4, 6, 4), s), "channels_last") for s in range(3)]
    out = ops.wavelet_attention(*inputs)
    assert out.permute(0, 2, 3, 1, 4).is_contiguous()
    gain = draw((2, 4), 3).requires_grad_()
    inputs = [x[:1].requires_grad_() for x in inputs]

    def run():
        out = ops.wavelet_attention(*inputs, gain, gain)
        return [out, *torch.autograd.grad(out.square().sum(), (*inputs, gain))]

    first = run()
    assert first[0].permute(0, 2, 3, 1, 4).is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))


def test_results_do_not_depend_on_the_tiles(monkeypatch):
    """Every configuration computes the same function; partial sums fit any of them."""
    kernels = importlib.import_module("diffad_fast.kernels.wavelet_attention")
    import triton

    for m, n in ((16, 32), (64, 16)):
        config = triton.Config({"BLOCK_M": m, "BLOCK_N": n})
        monkeypatch.setattr(kernels, "configurations", lambda *_, config=config: [config])
        check((1, 1, 10, 14, 4), 1)


@pytest.mark.parametrize(
    "size, level, kind",
    [
        ((4, 34), 1, "sliced"),  # 2 x 17 = 34 blocks
        ((8, 60), 2, "contiguous"),
        pytest.param((8, 60), 1, "contiguous", marks=pytest.mark.slow),
        pytest.param((8, 60), 1, "sliced", marks=pytest.mark.slow),
        pytest.param((8, 68), 2, "sliced", marks=pytest.mark.slow),
    ],
)
def test_wide_offsets(size, level, kind, monkeypatch):
    """What serves images beyond 2^31 elements gives the same numbers on small ones."""
    kernels = importlib.import_module("diffad_fast.kernels.wavelet_attention")
    monkeypatch.setattr(kernels, "WIDE_FROM", 0)
    check((1, 1, *size, 4), level, kind=kind)


@interpreted
@pytest.mark.parametrize("level, heads, gains", [(1, 2, False), (2, 1, True)])
def test_opcheck(level, heads, gains):
    kernels = torch.ops.diffad_fast_triton
    q, k, v = (layout(draw((1, heads, 4, 8, 3), s), "channels_last") for s in range(3))
    both = [draw((heads, 1 + 3 * level), s) if gains else None for s in (3, 4)]
    inputs = [x if x is None else x.requires_grad_() for x in (q, k, v, *both)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward = kernels.wavelet_attention_forward
    torch.library.opcheck(forward, (*inputs, level, 0.3, True), test_utils=tests)
    plain = [x if x is None else x.detach() for x in inputs]
    torch.library.opcheck(forward, (*plain, level, 0.3, False), test_utils=tests)
    out, mixed, lse = forward(*plain, level, 0.3, True)
    backward = kernels.wavelet_attention_backward
    arguments = (out, *plain[:3], mixed if gains else out, lse, *plain[3:], level, 0.3)
    torch.library.opcheck(backward, arguments, test_utils=tests)


def test_compiles_into_one_graph():
    q, k, v = (draw((1, 1, 4, 4, 4), s).requires_grad_() for s in range(3))
    gain = draw((1, 4), 3).requires_grad_()
    backend = "aot_eager" if dispatch.INTERPRETER else "inductor"
    compiled = torch.compile(ops.wavelet_attention, fullgraph=True, backend=backend)
    got = compiled(q, k, v, gain, gain)
    torch.testing.assert_close(got, ops.wavelet_attention(q, k, v, gain, gain))
    for x, y in zip(
        torch.autograd.grad(got.sum(), (q, gain)),
        torch.autograd.grad(ops.wavelet_attention(q, k, v, gain, gain).sum(), (q, gain)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_refuses_what_it_cannot_do():
    x = torch.zeros(1, 1, 4, 4, 33, device=DEVICE)
    with pytest.raises(BackendError, match="head_dim 33 is more than 32, its limit at level 2"):
        ops.wavelet_attention(x, x, x, level=2)
    with pytest.raises(BackendError, match="no float64"):
        ops.wavelet_attention(*3 * [x.double()])
    with daf.use_backend("auto"):
        assert ops.wavelet_attention(*3 * [x.double()], level=2).shape == x.shape


# --------------------------------------------------------------------------------- on a GPU alone


def unet():
    torch.manual_seed(0)
    net = WaveletUNet(4, (64, 128, 128), 1).cuda().to(memory_format=torch.channels_last)
    for parameter in net.parameters():  # the branches that start at zero
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    x = draw((2, 4, 32, 32), 1).to(memory_format=torch.channels_last)
    return net, x, torch.linspace(-2, 1, 2, device="cuda")


def everywhere(run):
    """What ``run`` gives on the current stream, on another one and as a CUDA graph."""
    first = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    return first, beside, captured


@pytest.mark.gpu
def test_unet_compiles_and_agrees():
    net, x, sigma = unet()
    with torch.autocast("cuda", torch.bfloat16), daf.use_backend("auto"):
        eager = net(x, sigma)
        run = torch.compile(net, fullgraph=True)
        compiled, beside, captured = everywhere(lambda: run(x, sigma))
        with daf.use_backend("reference"):
            plain = net(x, sigma)
        compiled.float().square().sum().backward()
    assert torch.equal(beside, compiled) and torch.equal(captured, compiled)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0.05 * eager.abs().max().item())
    torch.testing.assert_close(plain, eager, rtol=0, atol=0.05 * eager.abs().max().item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("level, d", [(1, 64), (1, 32), (2, 32), (2, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(level, d, dtype):
    check((2, 3, 52, 44, d), level, dtype, kind="channels_last")


@pytest.mark.gpu
def test_side_stream_graph_and_repeats():
    inputs = [draw((2, 4, 64, 64, 64), s, torch.bfloat16).requires_grad_() for s in range(3)]
    gain = draw((4, 4), 3).requires_grad_()

    def run():
        out = ops.wavelet_attention(*inputs, gain, gain)
        return [out, *torch.autograd.grad(out, (*inputs, gain), out.detach())]

    for x, y, z in zip(*everywhere(run), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


@pytest.mark.gpu
def test_other_sizes_compile_nothing():
    kernels = importlib.import_module("diffad_fast.kernels.wavelet_attention")
    # No number of blocks is a multiple of a tile, which is another kernel.
    ops.wavelet_attention(*(draw((2, 2, 34, 34, 32), s) for s in range(3)))

    def compiled():
        return sum(len(cache[0]) for cache in kernels._forward.device_caches.values())

    before = compiled()
    for shape in ((1, 2, 34, 38, 32), (3, 2, 2, 2, 32), (2, 5, 64, 30, 32)):
        ops.wavelet_attention(*(draw(shape, s) for s in range(3)))
    assert compiled() == before
