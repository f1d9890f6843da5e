"""group_norm_silu against the formula in NumPy, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffad_fast import ops


def random(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def by_formula(x, groups, weight=1.0, bias=0.0, eps=1e-5, scale=0.0, shift=0.0, activation=True):
    n, c, h, w = x.shape
    grouped = x.reshape(n, groups, -1)
    mean = grouped.mean(axis=2, keepdims=True)
    variance = ((grouped - mean) ** 2).mean(axis=2, keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + eps)).reshape(x.shape)
    y = y * np.reshape(weight, (1, -1, 1, 1)) + np.reshape(bias, (1, -1, 1, 1))
    modulation = [np.broadcast_to(a, (n, c))[:, :, None, None] for a in (scale, shift)]
    y = y * (1 + modulation[0]) + modulation[1]
    return y / (1 + np.exp(-y)) if activation else y


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("given", [(), ("weight", "bias"), ("scale", "shift"), ("scale",),
                                   ("shift",), ("weight", "bias", "scale", "shift")])  # fmt: skip
def test_against_formula(groups, given, activation):
    x = random((3, 6, 5, 4), 0) * 3 + 1
    everything = {
        "weight": random((6,), 1), "bias": random((6,), 2),
        "scale": random((3, 6), 3), "shift": random((3, 6), 4),
    }  # fmt: skip
    chosen = {name: everything[name] for name in given}
    got = ops.group_norm_silu(x, groups, eps=1e-3, activation=activation, **chosen)
    arrays = {name: a.numpy() for name, a in chosen.items()}
    expected = by_formula(x.numpy(), groups, eps=1e-3, activation=activation, **arrays)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)


def test_eps_defaults_to_that_of_group_norm():
    x = random((1, 4, 3, 3), 0) * 1e-3
    expected = by_formula(x.numpy(), 2, eps=1e-5)
    np.testing.assert_allclose(ops.group_norm_silu(x, 2).numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "dtype, atol", [(torch.float32, 3e-6), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)]
)
def test_dtypes_with_float32_parameters(dtype, atol):
    x = random((2, 8, 6, 6), 0).to(dtype)
    parameters = [random(s, i).float() for i, s in enumerate([(8,), (8,), (2, 8), (2, 8)], 1)]
    weight, bias, scale, shift = parameters
    got = ops.group_norm_silu(x, 4, weight, bias, 1e-5, scale, shift)
    arrays = [p.double().numpy() for p in parameters]
    expected = by_formula(x.double().numpy(), 4, *arrays[:2], 1e-5, *arrays[2:])
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=0, atol=atol)


def test_channels_last_is_kept():
    x = random((2, 8, 6, 5), 0)
    last = x.contiguous(memory_format=torch.channels_last)
    got = ops.group_norm_silu(last, 4, scale=random((2, 8), 1))
    assert got.is_contiguous(memory_format=torch.channels_last)
    expected = ops.group_norm_silu(x, 4, scale=random((2, 8), 1))
    assert expected.is_contiguous()
    assert torch.allclose(got, expected, rtol=0, atol=1e-13)


def test_gradients():
    shapes = [(2, 4, 3, 2), (4,), (4,), (2, 4), (2, 4)]
    inputs = [random(s, i).requires_grad_() for i, s in enumerate(shapes)]
    assert torch.autograd.gradcheck(
        lambda x, w, b, s, t: ops.group_norm_silu(x, 2, w, b, 1e-5, s, t), inputs
    )


@pytest.mark.parametrize(
    "x, arguments, error, message",
    [
        (torch.zeros(2, 6, 4), {}, ValueError, "4 dimensions"),
        (torch.zeros(2, 6, 4, 4).int(), {}, TypeError, "got torch.int32"),
        (torch.zeros(2, 6, 4, 4), {"num_groups": 4}, ValueError, "6 channels.*num_groups = 4"),
        (torch.zeros(2, 6, 4, 4), {"num_groups": 0}, ValueError, "num_groups must be in"),
        (torch.zeros(2, 6, 4, 4), {"weight": torch.ones(4)}, ValueError, r"weight.*\(6,\)"),
        (torch.zeros(2, 6, 4, 4), {"scale": torch.ones(6)}, ValueError, r"scale.*\(2, 6\)"),
        (torch.zeros(2, 6, 4, 4), {"shift": [1.0]}, TypeError, "shift must be a torch.Tensor"),
        (torch.zeros(2, 6, 4, 4), {"eps": -1.0}, ValueError, "eps must be in"),
    ],
)
def test_bad_arguments(x, arguments, error, message):
    with pytest.raises(error, match=message):
        ops.group_norm_silu(x, **{"num_groups": 2, **arguments})
