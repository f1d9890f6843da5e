"""noised_target and weighted_mse by their formulas; the weights across predictions are in
tests/diffusion/test_schedule.py, the whole loss in tests/training/test_loop.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffad_fast import ops

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
def test_noise_shared_by_the_batch(kind):
    x0, noise = torch.randn(3, 2, 2), torch.randn(1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0, 1, 2])
    got = ops.noised_target(x0, t, noise, ALPHAS, kind)
    expected = ops.noised_target(x0, t, noise.float().expand(3, 2, 2), ALPHAS, kind)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


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
