"""The Triton forward process and training loss against the reference in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from diffad_fast.kernels import loss as loss_kernel
from diffad_fast.kernels import q_sample as q_sample_kernel

import diffad_fast as daf
from diffad_fast import ops, reference
from diffad_fast.diffusion import NoiseSchedule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALPHAS = NoiseSchedule("cosine").alphas_cumprod.to(DEVICE)
KINDS = ["epsilon", "sample", "v_prediction"]
SHAPES = [(2, 3, 7, 5), (5, 3), (3, 1), (1, 130), (0, 4), (3, 7, 1, 1)]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    for module in (q_sample_kernel, loss_kernel):
        monkeypatch.setattr(module, "TILE", 64)
    monkeypatch.setattr(loss_kernel, "SPLITS", 2)


def tensors(shape, dtype=torch.float64, count=2):
    return torch.randn(count, *shape, dtype=torch.float64).to(DEVICE, dtype).unbind()


def levels(n):
    return (torch.arange(n, device=DEVICE) * 389 + 7) % 1000


def close(got, expected, tolerance):
    assert got.shape == expected.shape
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_process(shape, kind):
    x0, noise = tensors(shape)
    t = levels(shape[0])
    with daf.use_backend("triton"):
        got = ops.noised_target(x0, t, noise, ALPHAS, kind)
        alone = ops.q_sample(x0, t, noise, ALPHAS)
    assert torch.equal(alone, got[0])
    expected = reference.noised_target(x0, t, noise, ALPHAS, kind)
    for a, b, tolerance in zip(got, expected, (1e-14, 1e-14, 1e-6), strict=True):
        assert a.dtype == b.dtype
        close(a, b, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_at_both_ends(kind):
    x0, noise = tensors((2, 3))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=DEVICE)
    with daf.use_backend("triton"):
        weight = ops.noised_target(x0, torch.arange(2, device=DEVICE), noise, ends, kind)[2]
    expected = {"epsilon": [1, 0], "sample": [0, 5], "v_prediction": [0, 0]}
    assert weight.tolist() == expected[kind]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes_and_layouts(dtype):
    x0, noise = tensors((2, 8, 6, 5), dtype)
    x0 = x0.contiguous(memory_format=torch.channels_last)
    t = levels(2)
    for x, z in (
        (x0, noise[:1]),
        (x0[:, 1:4], noise[:, ::3]),
        (x0[:, :, ::2, 1::3], noise[..., ::2, :2]),
    ):
        with daf.use_backend("triton"):
            got = ops.noised_target(x, t, z, ALPHAS)
            error = ops.weighted_mse(x, z.expand_as(x), got[2])
        assert got[0].dtype == got[1].dtype == dtype
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        expected = reference.noised_target(x.double(), t, z.double(), ALPHAS)
        for a, b in zip(got[:2], expected, strict=False):
            close(a, b, TOLERANCE[dtype])
        close(error, reference.weighted_mse(x.double(), z.double(), expected[2]), 1e-6)
        assert error.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("table", [torch.float32, torch.float64])
def test_tables(table):
    x0, noise = tensors((4, 9), torch.float32)
    t = torch.tensor([0, 1, 500, 999], device=DEVICE)
    with daf.use_backend("triton"):
        got = ops.noised_target(x0, t, noise, ALPHAS.to(table), "epsilon")
    expected = reference.noised_target(x0.double(), t, noise.double(), ALPHAS.to(table), "epsilon")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_gradients_of_the_forward_process(kind, shared):
    x0, noise = tensors((3, 2, 5))
    x0, noise = x0.requires_grad_(), noise[: 1 if shared else 3].clone().requires_grad_()
    t, upstream = levels(3), tensors((3, 2, 5))

    def gradients(functions):
        if kind is None:
            outputs = (functions.q_sample(x0, t, noise, ALPHAS),)
        else:
            outputs = functions.noised_target(x0, t, noise, ALPHAS, kind)[:2]
        return torch.autograd.grad(outputs, (x0, noise), upstream[: len(outputs)])

    with daf.use_backend("triton"):
        got = gradients(ops)
    for a, b in zip(got, gradients(reference), strict=True):
        close(a, b, 1e-14)


@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s] + [(2, 3, 17, 11)])
def test_loss(shape):
    prediction, target = (x.requires_grad_() for x in tensors(shape))
    weight = torch.rand(shape[0], dtype=torch.float64, device=DEVICE, requires_grad=True)
    expected = reference.weighted_mse(prediction, target, weight)
    gradients = torch.autograd.grad(3 * expected, (prediction, target, weight))
    with daf.use_backend("triton"):
        got = ops.weighted_mse(prediction, target, weight)
        close(got, expected, 1e-14)
        found = torch.autograd.grad(3 * got, (prediction, target, weight))
    for a, b in zip(found, gradients, strict=True):
        close(a, b, 1e-13)


def test_opcheck():
    x0, noise = tensors((2, 3), torch.float32)
    namespace = torch.ops.diffad_fast_triton
    x0.requires_grad_()
    torch.library.opcheck(namespace.rotation, (x0, noise, levels(2), ALPHAS, False, True, 2, 5.0))
    weight = torch.rand(2, device=DEVICE)
    torch.library.opcheck(namespace.weighted_mse_forward, (x0, noise, weight))
    grad = torch.tensor(2.0, device=DEVICE)
    torch.library.opcheck(namespace.weighted_mse_backward, (grad, x0.detach(), noise, weight))


def test_torch_compile():
    x0, noise = tensors((2, 3, 4, 4), torch.float32)
    t = levels(2)

    def step(x0, noise):
        x_t, target, weight = ops.noised_target(x0, t, noise, ALPHAS)
        return ops.weighted_mse(x_t * 2, target, weight)

    with daf.use_backend("triton"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x0, noise), step(x0, noise))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    x0, noise = tensors((4, 16, 65, 63), torch.bfloat16)
    t = levels(4)

    def step(x0, noise):
        x_t, target, weight = ops.noised_target(x0, t, noise, ALPHAS)
        return ops.weighted_mse(x_t * 2, target, weight)

    exact = reference.noised_target(x0.double(), t, noise.double(), ALPHAS)
    expected = reference.weighted_mse(exact[0] * 2, exact[1], exact[2])
    with daf.use_backend("triton"):
        first = step(x0, noise)
        assert float(first) == pytest.approx(float(expected), rel=1e-2)
        assert all(torch.equal(step(x0, noise), first) for _ in range(3))
        compiled = torch.compile(step, fullgraph=True)(x0, noise)
        torch.testing.assert_close(compiled, first, rtol=1e-6, atol=0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(x0, noise)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, first)
