"""The 3x3 convolution with the Triton kernel behind it, against PyTorch's in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import diffad_fast as daf
from diffad_fast import ops
from diffad_fast.ops import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    "triton" in dispatch.unavailable(), reason=dispatch.unavailable().get("triton", "")
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def tensors(n, inputs, outputs, height, width, dtype=torch.float64, layout=FORMATS[1]):
    """x, weight, bias, residual."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n, inputs, height, width), (outputs, inputs, 3, 3), (outputs,)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (*shapes, (n, outputs, height, width))
    )
    weight /= (9 * inputs) ** 0.5
    x, residual = (t.contiguous(memory_format=layout) for t in (x, residual))
    return [t.to(DEVICE, dtype) for t in (x, weight, bias, residual)]


def derivatives(function, inputs):
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y.square().sum(), [t for t in leaves if t is not None])]


def exact(x, weight, bias, residual):
    y = F.conv2d(x, weight, bias, padding=1)
    return y if residual is None else y + residual


def check(inputs, tolerance):
    with daf.use_backend("triton"):
        got = derivatives(ops.conv3x3, inputs)
    expected = derivatives(exact, [None if t is None else t.double() for t in inputs])
    for a, b in zip(got, expected, strict=True):
        error = float((a.double() - b).abs().max() / b.abs().max())
        assert error < tolerance, error
    return got


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("size", [(2, 3, 5, 7, 11), (1, 16, 48, 8, 8), (3, 1, 1, 1, 2)])
def test_values_and_gradients(size, layout):
    x, weight, bias, residual = tensors(*size, layout=layout)
    for with_bias, with_residual in itertools.product((True, False), repeat=2):
        inputs = x, weight, bias if with_bias else None, residual if with_residual else None
        y, *_ = check(inputs, 1e-12)
        if min(size) > 1:
            assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes_and_views(dtype):
    x, weight, bias, residual = tensors(2, 6, 10, 9, 6, dtype)
    check((x[:, ::2], weight[:, :3], bias, residual.contiguous()), TOLERANCE[dtype])
    check((x, weight[::2], bias[::2], residual[:1, :1].expand(2, 5, 9, 6)), TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter truncates to two bytes")
def test_rounded_once():
    """In two bytes, what the vendor's convolution gives plus both, as if in float32."""
    x, weight, bias, residual = tensors(2, 16, 32, 8, 8, torch.bfloat16)
    y = F.conv2d(x, weight, padding=1)
    expected = y.float() + bias.float()[:, None, None] + residual.float()
    with daf.use_backend("triton"), torch.inference_mode():
        assert torch.equal(ops.conv3x3(x, weight, bias, residual), expected.bfloat16())


def test_autocast_and_an_empty_batch():
    x, weight, bias, residual = tensors(2, 3, 4, 5, 5, torch.float32)
    with daf.use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
        y, *gradients = derivatives(ops.conv3x3, (x, weight, bias, residual.bfloat16()))
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [*[torch.float32] * 3, torch.bfloat16]
    with daf.use_backend("triton"):
        assert ops.conv3x3(x[:0], weight, bias, residual[:0]).shape == (0, 4, 5, 5)


def test_opcheck():
    _, _, bias, residual = (t.requires_grad_() for t in tensors(2, 3, 4, 3, 2))
    y = residual.detach().clone().requires_grad_()
    operator = torch.ops.diffad_fast_triton.add_bias_and_residual
    torch.library.opcheck(operator, (y, bias, residual))
    torch.library.opcheck(operator, (y, None, residual))
    torch.library.opcheck(operator, (y, bias, None))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    check(tensors(16, 80, 80, 64, 64, dtype), TOLERANCE[dtype])
    check(tensors(1, 128, 256, 33, 31, dtype), TOLERANCE[dtype])
