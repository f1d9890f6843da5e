"""The Triton group_norm_silu against the reference in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from diffad_fast.kernels import group_norm_silu as kernel

import diffad_fast as daf
from diffad_fast import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.contiguous_format, torch.channels_last]
NAMES = ("weight", "bias", "scale", "shift")
ALL = (True,) * 4


@pytest.fixture(params=["resident", "split"])
def path(request, monkeypatch):
    """Both ways through the kernel at sizes that the interpreter can bear."""
    if request.param == "split":
        monkeypatch.setattr(kernel, "RESIDENT", {})
        monkeypatch.setattr(kernel, "TILE", 128)
        monkeypatch.setattr(kernel, "SPLITS", 4)
        for config in kernel._PARAMETER_CONFIGS[False]:
            monkeypatch.setitem(config.kwargs, "BLOCK_S", 4)
    return request.param


def inputs(shape, dtype=torch.float64, memory_format=torch.contiguous_format, given=ALL):
    generator = torch.Generator().manual_seed(0)
    n, c = shape[:2]
    draw = [torch.randn(s, generator=generator, dtype=torch.float64)
            for s in (shape, shape, (c,), (c,), (n, c), (n, c))]  # fmt: skip
    x, dy = ((t * f + o).to(DEVICE, dtype) for t, f, o in zip(draw, (2, 1), (1, 0), strict=False))
    x = x.contiguous(memory_format=memory_format)
    wide = torch.promote_types(dtype, torch.float32)
    parameters = [p.to(DEVICE, wide) if g else None for p, g in zip(draw[2:], given, strict=True)]
    return x, dy, parameters


def run(function, x, dy, parameters, groups, **options):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *parameters)]
    arguments = dict(zip(NAMES, leaves[1:], strict=True))
    y = function(leaves[0], groups, **arguments, **options)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))


def check(x, dy, parameters, groups, tolerance, **options):
    with daf.use_backend("triton"):
        got = run(ops.group_norm_silu, x, dy, parameters, groups, **options)
    wide = [None if p is None else p.double() for p in parameters]
    if wide[0] is None and wide[1] is not None:  # PyTorch has no gradient of the bias alone
        wide[0] = torch.ones_like(wide[1])
    expected = run(reference.group_norm_silu, x.double(), dy.double(), wide, groups, **options)
    names = ["y", "x", *(k for k, p in zip(NAMES, parameters, strict=True) if p is not None)]
    if len(expected) > len(names):
        expected = expected[:2] + expected[3:]
    for name, a, b in zip(names, got, expected, strict=True):
        error = float((a.double() - b).abs().max() / b.abs().max().clamp(min=1))
        assert error < tolerance, (name, error)
    return got


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape, groups",
    [
        ((2, 6, 5, 7), 3), ((1, 10, 13, 11), 2), ((2, 3, 1, 1), 3), ((1, 7, 1, 17), 1),
        ((1, 14, 3, 2), 7),
    ],
)  # fmt: skip
def test_values_and_gradients(path, shape, groups, memory_format):
    got = check(*inputs(shape, memory_format=memory_format), groups, 1e-12)
    assert got[0].is_contiguous(memory_format=memory_format)
    assert got[1].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("number", range(16))
def test_any_parameters(number):
    given = tuple(bool(number >> i & 1) for i in range(4))
    check(*inputs((2, 4, 3, 2), given=given), 2, 1e-12, activation=number % 3 > 0, eps=1e-2)


def test_without_activation(path):
    check(*inputs((1, 6, 7, 5)), 2, 1e-12, activation=False, eps=1e-2)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_dtypes(path, dtype, tolerance, memory_format):
    got = check(*inputs((1, 6, 7, 5), dtype, memory_format), 3, tolerance)
    assert got[0].dtype == got[1].dtype == dtype
    assert {g.dtype for g in got[2:]} == {torch.float32}


def test_a_large_mean_does_not_cancel(path):
    x, dy, parameters = inputs((1, 2, 11, 7), torch.float32)
    check(x + 4096, dy, parameters, 1, 2e-3)


def test_views(path):
    x, dy, parameters = inputs((2, 12, 6, 5), memory_format=torch.channels_last)
    parameters = [p[..., ::2] for p in parameters]
    check(x[:, ::2], dy[:, :6], parameters, 3, 1e-12)
    check(x[:, 3:9, ::2, ::2], dy[:1, :1, :1, :1].expand(2, 6, 3, 3), parameters, 3, 1e-12)


def test_rows_of_scale_and_shift_lie_anywhere(path):
    """Parts of one matrix, or one row for all images."""
    x, dy, parameters = inputs((3, 6, 5, 5), memory_format=torch.channels_last)
    both = torch.cat(parameters[2:], dim=1)
    scale, shift = both.chunk(2, dim=1)
    check(x, dy, [*parameters[:2], scale, shift], 3, 1e-12)
    check(x, dy, [*parameters[:2], scale[:1].expand(3, 6), shift], 3, 1e-12)


def test_empty_batch():
    x, dy, parameters = inputs((0, 4, 3, 3))
    with daf.use_backend("triton"):
        y, *gradients = run(ops.group_norm_silu, x, dy, parameters, 2)
    assert y.shape == x.shape and [g.abs().sum() for g in gradients] == [0] * 5


def test_an_image_does_not_depend_on_its_neighbours(path):
    x, _, parameters = inputs((3, 6, 9, 9), torch.float32)
    with daf.use_backend("triton"):
        together = ops.group_norm_silu(x, 2, *parameters[:2])
        alone = ops.group_norm_silu(x[1:2], 2, *parameters[:2])
    assert torch.equal(together[1:2], alone)


def test_opcheck():
    x, dy, parameters = inputs((1, 2, 2, 3), torch.float32)
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    namespace = torch.ops.diffad_fast_triton
    forward = namespace.group_norm_silu_forward
    torch.library.opcheck(forward, (*leaves, 2, 1e-5, True))
    statistics = forward(*leaves, 2, 1e-5, True)[1].detach()
    detached = [t.detach() for t in leaves]
    arguments = (dy, detached[0], statistics, *detached[1:], 2, True, True)
    torch.library.opcheck(namespace.group_norm_silu_backward, arguments)


def test_torch_compile():
    x, _, parameters = inputs((2, 4, 6, 5), torch.float32, torch.channels_last)

    def function(x, *parameters):
        return ops.group_norm_silu(x, 2, *parameters[:2], scale=parameters[2], shift=parameters[3])

    with daf.use_backend("triton"):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, *parameters), function(x, *parameters))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 64, 128, 128), (16, 80, 32, 32), (1, 128, 8, 8)])
def test_on_a_gpu(shape, memory_format):
    x, dy, parameters = inputs(shape, torch.bfloat16, memory_format)
    groups = shape[1] // 16
    first = check(x, dy, parameters, groups, 2e-2)
    for _ in range(3):
        again = check(x, dy, parameters, groups, 2e-2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with daf.use_backend("triton"), torch.no_grad():
        compiled = torch.compile(
            lambda x: ops.group_norm_silu(x, groups, *parameters[:2]), fullgraph=True
        )
        expected = ops.group_norm_silu(x, groups, *parameters[:2])
        assert torch.equal(compiled(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.group_norm_silu(x, groups, *parameters[:2])
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
