"""noised_target and weighted_mse by their formulas; the weights across predictions are in
tests/diffusion/test_schedule.py, the whole loss in tests/training/test_loop.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffad_fast import ops, reference, use_backend

ALPHAS = torch.tensor([0.9999, 0.9, 0.5, 0.01], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (4, 7)])
def test_noised_target(kind, shape):
    x0, noise = torch.randn(2, *shape, dtype=torch.float64)
    t = torch.tensor([3, 0, 2, 1])
    x_t, target, weight = ops.noised_target(x0, t, noise, ALPHAS, kind, 3.0)
    for i in range(4):
        a = float(ALPHAS[t[i]])
        snr = a / (1 - a)
        x, z = x0[i].numpy(), noise[i].numpy()
        expected, factor = {
            "epsilon": (z, 1 / snr), "sample": (x, 1), "v_prediction": (
                a**0.5 * z - (1 - a) ** 0.5 * x, 1 / (snr + 1))}[kind]  # fmt: skip
        np.testing.assert_allclose(x_t[i], a**0.5 * x + (1 - a) ** 0.5 * z, rtol=0, atol=1e-14)
        np.testing.assert_allclose(target[i], expected, rtol=0, atol=1e-14)
        assert float(weight[i]) == pytest.approx(min(snr, 3) * factor, rel=1e-6)
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_weights_at_both_ends(kind):
    """Of schedules that end without signal, or begin without noise."""
    ends = {"epsilon": (1, 0), "sample": (0, 5), "v_prediction": (0, 0)}[kind]
    x, alphas = torch.randn(2, 3), torch.tensor([0.0, 1.0], dtype=torch.float64)
    weight = ops.noised_target(x, torch.tensor([0, 1]), x, alphas, kind)[2]
    assert tuple(weight.tolist()) == ends


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_noise_shared_by_the_batch(kind):
    x0, noise = torch.randn(3, 2, 2), torch.randn(1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0, 1, 2])
    got = ops.noised_target(x0, t, noise, ALPHAS, kind)
    expected = ops.noised_target(x0, t, noise.float().expand(3, 2, 2), ALPHAS, kind)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_the_loss_is_that_of_the_prediction(dtype):
    prediction = torch.randn(3, 5).to(dtype)
    for backend in ("auto", "reference"):
        with use_backend(backend):
            loss = ops.weighted_mse(prediction, prediction.float(), torch.ones(3).double())
        assert loss.dtype == torch.promote_types(dtype, torch.float32)


def test_weights_have_no_gradient():
    x0 = torch.randn(3, 5, requires_grad=True)
    for backend in ("auto", "reference"):
        with use_backend(backend):
            x_t, target, weight = ops.noised_target(x0, torch.tensor([0, 1, 2]), x0, ALPHAS)
        assert x_t.requires_grad and target.requires_grad and not weight.requires_grad


def test_weighted_mse():
    prediction, target = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    weight = torch.tensor([0.5, 2.0, 0.0])
    by_hand = sum(
        float(w) * np.mean((p.numpy() - t.numpy()) ** 2)
        for w, p, t in zip(weight, prediction, target, strict=True)
    )
    assert float(ops.weighted_mse(prediction, target, weight)) == pytest.approx(by_hand / 3)
    half = ops.weighted_mse(prediction.bfloat16(), target.bfloat16(), weight)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(by_hand / 3, rel=0.02)


def test_gradients():
    prediction, target = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.weighted_mse, (prediction, target, weight))
    assert torch.autograd.gradcheck(
        lambda x, z: ops.noised_target(x, torch.tensor([0, 2, 1]), z, ALPHAS)[:2],
        (prediction, target),
    )


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ops.noised_target(X, torch.zeros(2).long(), X, ALPHAS, "noise"), ValueError,
         "unknown prediction_type 'noise'"),
        (lambda: ops.noised_target(X, torch.zeros(3).long(), X, ALPHAS), ValueError, "t must have"),
        (lambda: ops.noised_target(X, torch.zeros(2).long(), X, ALPHAS, snr_limit=-1.0), ValueError,
         "snr_limit"),
        (lambda: ops.weighted_mse(X, X[:, :2], torch.ones(2)), ValueError, "target must have"),
        (lambda: ops.weighted_mse(X, X, torch.ones(3)), ValueError, "weight must have"),
        (lambda: ops.weighted_mse(X[:0], X[:0], torch.ones(0)), ValueError, "no samples"),
        (lambda: ops.weighted_mse(X.int(), X, torch.ones(2)), TypeError, "torch.int32"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------ the native operator

# Of results of size 1; the sums are computed in float32 and rounded once.
CLOSE = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(1, 1), (4, 7), (2, 3, 17, 5), (1, 1, 1, 13), (2, 4100), (0, 3), (3, 0, 2)]


def on_cpu(*arguments):
    with use_backend("cpu"):
        return ops.noised_target(*arguments)


@pytest.mark.native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_is_the_reference_in_float64(cpu_isa, shape):
    """All pairs of dtypes, noise of its own and shared; 4100 elements are three tiles."""
    t = torch.arange(shape[0]) - 2  # from the end of the table too
    for dtype, close in CLOSE.items():
        for other in CLOSE:
            x0, noise = torch.randn(shape).to(dtype), torch.randn(shape).to(other)
            for z in (noise, noise[:1]) if shape[0] else (noise,):
                for kind in ("v_prediction", "epsilon", "sample"):
                    found = on_cpu(x0, t, z, ALPHAS, kind, 3.0)
                    exact = reference.noised_target(x0.double(), t, z.double(), ALPHAS, kind, 3.0)
                    assert [y.dtype for y in found] == [dtype, dtype, torch.float32]
                    # A target that is the noise is rounded to the dtype of x0 as it is.
                    for a, b in zip(found, exact, strict=True):
                        torch.testing.assert_close(a.double(), b.double(), rtol=close, atol=close)


@pytest.mark.native
def test_native_weights_at_the_ends_of_the_schedule():
    alphas = torch.tensor([1.0, 1 - 1e-12, 1e-12, 0.0], dtype=torch.float64)
    x, t = torch.randn(4, 3), torch.arange(4)
    *_, weight = on_cpu(x, t, x, alphas)
    assert torch.equal(weight, reference.noised_target(x, t, x, alphas)[2])


@pytest.mark.native
def test_native_keeps_layouts_and_takes_any_strides():
    x0, noise = torch.randn(2, 4, 3, 5, 6)
    t = torch.tensor([0, 1, 2, 3])
    expected = on_cpu(x0, t, noise, ALPHAS)
    turned = x0.transpose(1, 3).contiguous().transpose(1, 3)
    for x in (x0.to(memory_format=torch.channels_last), turned):
        for z in (noise, noise.to(memory_format=torch.channels_last)):
            found = on_cpu(x, t, z, ALPHAS)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert found[0].stride() == found[1].stride() == x.stride()
    wide = torch.full((8, 3, 5, 12), torch.nan)
    wide[::2, :, :, ::2] = x0
    found = on_cpu(wide[::2, :, :, ::2], t, noise, ALPHAS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.native
def test_native_outputs_are_written_whole_and_nan_stays(written):
    for size in (1, 7, 2049, 5000):
        x = torch.randn(2, size)
        assert all(map(written, on_cpu(x, torch.tensor([0, 1]), x, ALPHAS)))
    x[1, 3] = torch.nan
    for y in on_cpu(x, torch.tensor([0, 1]), torch.randn_like(x), ALPHAS)[:2]:
        assert y.isnan().sum() == 1 and y[1, 3].isnan()


@pytest.mark.native
def test_native_gradients():
    x, z = (torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    shared = z.detach()[:1].requires_grad_()
    t = torch.tensor([0, 2, 1])
    for noise in (z, shared):
        assert torch.autograd.gradcheck(lambda x, z: on_cpu(x, t, z, ALPHAS)[:2], (x, noise))
    on_cpu(x, t, z, ALPHAS)[1].sum().backward()  # one of the results alone
    expected = (ALPHAS[t].sqrt(), (1 - ALPHAS[t]).sqrt())
    torch.testing.assert_close(z.grad, expected[0][:, None, None].expand(3, 2, 2))
    torch.testing.assert_close(x.grad, -expected[1][:, None, None].expand(3, 2, 2))


@pytest.mark.native
def test_native_opcheck_and_compile():
    x, z = torch.randn(2, 2, 3, 4, 5)
    t = torch.tensor([0, 2])
    operator = torch.ops.diffad_fast.noised_velocity.default
    for x_ in (x.clone().requires_grad_(), x.to(memory_format=torch.channels_last), x[:, ::2]):
        torch.library.opcheck(operator, (x_, t, z[:, : x_.shape[1]], ALPHAS, 5.0))
    compiled = torch.compile(on_cpu, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(x, t, z, ALPHAS), on_cpu(x, t, z, ALPHAS), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.native
def test_native_refuses_times_beyond_the_table():
    with pytest.raises(RuntimeError, match=r"t\[1\] = 4 is not an index into the table of 4"):
        on_cpu(X, torch.tensor([0, 4]), X, ALPHAS)


def loss_on_cpu(*arguments):
    with use_backend("cpu"):
        return ops.weighted_mse(*arguments)


@pytest.mark.native
@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s] + [(2, 3, 8195)], ids=str)
def test_native_loss_is_the_reference_in_float64(cpu_isa, shape):
    """All pairs of dtypes; 8195 elements a row are seven tiles a sample, the last one short."""
    weight = torch.rand(shape[0])
    for dtype, close in CLOSE.items():
        for other in CLOSE:
            x = torch.randn(shape).to(dtype).requires_grad_()
            z = torch.randn(shape).to(other).requires_grad_()
            w = weight.clone().requires_grad_()
            loss = loss_on_cpu(x, z, w)
            assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.shape == ()
            (3 * loss).backward()
            exact = [y.detach().double().requires_grad_() for y in (x, z, w)]
            expected = reference.weighted_mse(*exact)
            (3 * expected).backward()
            # A float64 target of a float32 prediction is rounded first.
            close_sum = 1e-14 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(loss.double(), expected, rtol=close_sum, atol=0)
            torch.testing.assert_close(w.grad.double(), exact[2].grad, rtol=1e-6, atol=1e-12)
            # A difference is as exact as the larger of its terms.
            size = float(6 * weight.max()) / x.numel() * 8
            for y, e, kind in ((x, exact[0], dtype), (z, exact[1], other)):
                assert y.grad.dtype == kind
                bound = max(close, CLOSE[kind]) * size
                torch.testing.assert_close(y.grad.double(), e.grad, rtol=0, atol=bound)


@pytest.mark.native
def test_native_loss_takes_any_strides_and_repeats_for_any_number_of_threads(by_threads):
    x, z = torch.randn(2, 4, 33, 50, 60)
    w = torch.rand(4)
    loss = loss_on_cpu(x, z, w)

    def gradient(x, z):
        x = x.detach().requires_grad_()
        loss_on_cpu(x, z, w).backward()
        return x.grad

    expected = gradient(x, z)
    wide = torch.full((8, 33, 50, 120), torch.nan)
    wide[::2, :, :, ::2] = x
    for layout in (torch.contiguous_format, torch.channels_last):
        for a in (x, x.to(memory_format=torch.channels_last), wide[::2, :, :, ::2]):
            b = z.to(memory_format=layout)
            torch.testing.assert_close(loss_on_cpu(a, b, w), loss, rtol=1e-6, atol=0)
            assert torch.equal(gradient(a, b), expected)
            assert gradient(a, b).stride() == torch.empty_like(a).stride()
    found = by_threads(lambda: (loss_on_cpu(x, z, w), gradient(x, z)))
    torch.testing.assert_close(found, (loss, expected), rtol=0, atol=0)
    shared = x[:1].expand_as(x)  # stride 0
    torch.testing.assert_close(
        loss_on_cpu(shared, z, w), loss_on_cpu(shared.contiguous(), z, w), rtol=0, atol=0
    )


@pytest.mark.native
def test_native_loss_gradients_opcheck_and_compile():
    x, z = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    w = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss_on_cpu, (x, z, w))
    names = torch.ops.diffad_fast
    x, z = torch.randn(2, 2, 3, 4, 5)
    w = torch.rand(2)
    for x_ in (x.clone().requires_grad_(), x.to(memory_format=torch.channels_last), x[:, ::2]):
        z_ = z[:, : x_.shape[1]]
        torch.library.opcheck(names.weighted_mse.default, (x_, z_, w))
        torch.library.opcheck(
            names.weighted_mse_backward.default, (torch.tensor(2.0), x_.detach(), z_, w)
        )
    x.requires_grad_()
    compiled = torch.compile(loss_on_cpu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, z, w), loss_on_cpu(x, z, w))
    grads = [torch.autograd.grad(f(x, z, w), x)[0] for f in (compiled, loss_on_cpu)]
    assert torch.equal(*grads)


@pytest.mark.native
def test_native_loss_of_values_that_are_not_finite():
    x, z, w = torch.zeros(2, 5000), torch.zeros(2, 5000), torch.ones(2)
    x[1, 4999] = torch.nan
    assert loss_on_cpu(x, z, w).isnan()
    x[1, 4999] = torch.inf
    assert loss_on_cpu(x, z, w).isinf()
    assert loss_on_cpu(x, z, torch.tensor([1.0, 0.0])).isnan()  # as in the reference: 0 inf
