"""group_norm_silu against the formula in NumPy, and the native one against the reference, in
float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffad_fast import ops, reference, use_backend

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Of the largest value: a rounding to the dtype, after float32's own errors.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11 + 1e-5,
}


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
def test_against_formula(backend, groups, given, activation):
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


def test_eps_defaults_to_that_of_group_norm(backend):
    x = random((1, 4, 3, 3), 0) * 1e-3
    expected = by_formula(x.numpy(), 2, eps=1e-5)
    np.testing.assert_allclose(ops.group_norm_silu(x, 2).numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "dtype, atol", [(torch.float32, 3e-6), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)]
)
def test_dtypes_with_float32_parameters(backend, dtype, atol):
    x = random((2, 8, 6, 6), 0).to(dtype)
    parameters = [random(s, i).float() for i, s in enumerate([(8,), (8,), (2, 8), (2, 8)], 1)]
    weight, bias, scale, shift = parameters
    got = ops.group_norm_silu(x, 4, weight, bias, 1e-5, scale, shift)
    arrays = [p.double().numpy() for p in parameters]
    expected = by_formula(x.double().numpy(), 4, *arrays[:2], 1e-5, *arrays[2:])
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=0, atol=atol)


def test_channels_last_is_kept(backend):
    x = random((2, 8, 6, 5), 0)
    last = x.contiguous(memory_format=torch.channels_last)
    got = ops.group_norm_silu(last, 4, scale=random((2, 8), 1))
    assert got.is_contiguous(memory_format=torch.channels_last)
    expected = ops.group_norm_silu(x, 4, scale=random((2, 8), 1))
    assert expected.is_contiguous()
    assert torch.allclose(got, expected, rtol=0, atol=1e-13)


def test_gradients(backend):
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
def test_bad_arguments(backend, x, arguments, error, message):
    with pytest.raises(error, match=message):
        ops.group_norm_silu(x, **{"num_groups": 2, **arguments})


def parameters(n, c, dtype=torch.float64):
    """weight, bias, scale, shift."""
    return [random(s, i).to(dtype) for i, s in enumerate([(c,), (c,), (n, c), (n, c)], 1)]


def close(got, expected, tolerance):
    error = (got.double() - expected.double()).abs().max() if got.numel() else torch.tensor(0.0)
    size = expected.abs().max() if got.numel() else 1
    assert error <= tolerance * size + 1e-12, f"{float(error / size):.2e} of the largest value"


def derivatives(function, x, groups, given, grad, activation=True):
    """y, then the gradients of x and of the parameters that are given."""
    inputs = [x, *given]
    inputs = [p if p is None else p.detach().requires_grad_() for p in inputs]
    x, weight, bias, scale, shift = inputs
    y = function(x, groups, weight, bias, 1e-5, scale, shift, activation)
    return [y, *torch.autograd.grad(y, [p for p in inputs if p is not None], grad)]


def check_native(x, groups, given, activation=True, tolerance=None, grad=None):
    """The native operator and its gradients against the reference in float64."""
    grad = random(x.shape, 9).to(x.dtype) if grad is None else grad
    with use_backend("cpu"):
        got = derivatives(ops.group_norm_silu, x, groups, given, grad, activation)
    doubles = [p if p is None else p.double() for p in given]
    if given[0] is None and given[1] is not None:
        # PyTorch 2.13 fails in the backward of a group norm with a bias and no weight.
        doubles[0] = torch.ones_like(doubles[1])
    expected = derivatives(
        reference.group_norm_silu, x.double(), groups, doubles, grad.double(), activation
    )
    if doubles[0] is not None and given[0] is None:
        del expected[2]
    likes = [x, x, *(p for p in given if p is not None)]
    for ours, exact, like in zip(got, expected, likes, strict=True):
        assert ours.dtype == like.dtype and ours.shape == like.shape
        # Sums over all pixels carry more rounding than one value.
        close(ours, exact, (tolerance or TOLERANCE[x.dtype]) * (1 if ours is got[0] else 4))
    return got


# One tile and several, whole vectors of channels and tails, one pixel, one channel in a group.
SHAPES = [
    ((2, 8, 5, 7), 2), ((1, 80, 13, 11), 5), ((3, 6, 1, 1), 1), ((2, 5, 1, 9), 5),
    ((1, 1, 67, 71), 1), ((2, 3, 9, 1), 1), ((1, 33, 17, 19), 11), ((5, 64, 16, 16), 4),
]  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_native_agrees_with_the_reference_in_float64(cpu_isa, dtype, layout):
    for i, (shape, groups) in enumerate(SHAPES):
        x = (random(shape, 0) * 3 + 1).to(dtype).to(memory_format=layout)
        given = parameters(*shape[:2], dtype)
        if i % 2:  # float32 beside half precision, and without some
            given = [p.float() if dtype != torch.float64 else p for p in given]
            given[i // 2] = None
        got = check_native(x, groups, given, activation=i != 3)
        for dense in got[:2]:
            assert dense.is_contiguous(memory_format=layout)


@pytest.mark.native
def test_any_strides(cpu_isa):
    base = random((4, 48, 18, 20), 0).float()
    last = base.to(memory_format=torch.channels_last)
    views = {
        "rows": base[:, :, 3:9],
        "every second column": base[..., ::2],
        "transposed": base.transpose(2, 3),
        "channel slice": base[:, 16:32],
        "one column": base[..., 3:4],
        "channel slice of channels_last": last[:, 7:23],
        "crop of channels_last": last[:, :, 2:9, 3:14],
        "column of channels_last": last[..., 3:4],
        "every second sample of channels_last": last[::2],
        "expanded sample": base[:1].expand(4, -1, -1, -1),
        "pixel": base[:, :, 4:5, 4:5],
        # The stride of an axis of one entry may be any number.
        "row of channels_last, turned to a column": last[:, :, 3:4].contiguous(
            memory_format=torch.channels_last
        ).transpose(2, 3),
        "row, turned to a column": base[:, :, 3:4].contiguous().transpose(2, 3),
    }
    for name, x in views.items():
        n, c = x.shape[:2]
        both = random((n, 2 * c), 5).float()  # halves of one projection
        given = [None, None, *both.chunk(2, dim=1)]
        got = check_native(x, c // 8, given)
        is_last = "of channels_last" in name
        assert got[0].is_contiguous(memory_format=LAYOUTS[is_last]), name


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_strides(layout):
    x = random((2, 16, 9, 10), 0).float().to(memory_format=layout)
    other = random((2, 16, 9, 10), 1).float()
    for grad in (
        torch.tensor(0.7).expand(x.shape),
        other[:, :, :1, :1].expand(x.shape),
        other.to(memory_format=torch.channels_last),
        other.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        check_native(x, 2, parameters(2, 16, torch.float32), grad=grad)


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_digits_of_the_variance(cpu_isa, layout):
    # In float32, E[x^2] - E[x]^2 of such data is noise: x^2 is 1e6 with a spacing of 0.06.
    x = (random((2, 16, 48, 48), 0) + 1000).float().to(memory_format=layout)
    exact = reference.group_norm_silu(x.double(), 1)
    error = (ops.group_norm_silu(x, 1) - exact).abs().max()
    # z = a x + b with |a x| = 1000: half a unit of the product's last place, times 1.1 for SiLU.
    assert error < 1.5e-4


@pytest.mark.native
def test_values_at_the_ends_of_silu(cpu_isa):
    z = torch.tensor([0.0, -0.0, 1e-30, 20, -20, 86.9, -86.9, 88, -88, 200, -200, 3e38, -3e38])
    for dtype in (torch.float32, torch.float64):
        shift = z.to(dtype).reshape(1, -1).requires_grad_()
        x = torch.zeros(1, len(z), 1, 1, dtype=dtype)
        y = ops.group_norm_silu(x, 1, shift=shift)
        (gradient,) = torch.autograd.grad(y.sum(), shift)
        z = z.double()
        s = torch.sigmoid(z)
        for got, exact in ((y.flatten(), z * s), (gradient[0], s * (1 + z * (1 - s)))):
            assert ((got - exact).abs() <= 1e-6 * exact.abs() + 2e-35).all()


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_not_a_number_stays_in_its_sample(layout):
    x = random((3, 16, 4, 4), 0).float().to(memory_format=layout)
    expected = ops.group_norm_silu(x, 1)
    x[1, 5, 2, 2] = float("nan")
    got = ops.group_norm_silu(x, 1)
    assert got[1].isnan().all() and torch.equal(got[::2], expected[::2])


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_output_is_written(layout, written):
    x = random((2, 24, 70, 9), 0).float().to(memory_format=layout)
    given = parameters(2, 24, torch.float32)
    assert all(map(written, derivatives(ops.group_norm_silu, x, 3, given, torch.ones_like(x))))


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_threads_do_not_change_a_bit(by_threads, n, layout):
    x = random((n, 40, 37, 41), 0).float().to(memory_format=layout)
    given, grad = parameters(n, 40, torch.float32), random(x.shape, 5).float()
    with use_backend("cpu"):
        by_threads(lambda: derivatives(ops.group_norm_silu, x, 5, given, grad))


@pytest.mark.native
def test_a_sample_does_not_depend_on_its_neighbours():
    x = random((5, 64, 24, 24), 0).float().to(memory_format=torch.channels_last)
    got = ops.group_norm_silu(x, 4)
    for i in range(5):
        assert torch.equal(got[i : i + 1], ops.group_norm_silu(x[i : i + 1], 4))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
def test_empty_tensors(shape):
    x = torch.zeros(shape, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    y = ops.group_norm_silu(x, 2, weight)
    assert y.shape == shape
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == shape and torch.equal(dweight, torch.zeros(4))


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (1, 9, 2, 70)])
def test_native_gradients(shape, layout):
    n, c = shape[:2]
    inputs = [random(shape, 0).to(memory_format=layout), *parameters(n, c)]
    inputs = [p.requires_grad_() for p in inputs]
    with use_backend("cpu"):
        for activation in (True, False):
            assert torch.autograd.gradcheck(
                lambda x, w, b, s, t, a=activation: ops.group_norm_silu(
                    x, c // 3 or 1, w, b, 1e-3, s, t, a
                ) if c % 3 == 0 else ops.group_norm_silu(x, 2, w, b, 1e-3, s, t, a),
                inputs,
                fast_mode=c > 4,
            )  # fmt: skip


@pytest.mark.native
def test_only_the_gradients_asked_for():
    x, (weight, bias, scale, shift) = random((2, 6, 3, 3), 0), parameters(2, 6)
    for wanted in ("weight", "scale", "shift"):
        given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
        given[wanted] = given[wanted].clone().requires_grad_()
        (got,) = torch.autograd.grad(ops.group_norm_silu(x, 2, **given).sum(), given[wanted])
        (exact,) = torch.autograd.grad(
            reference.group_norm_silu(x, 2, **given).sum(), given[wanted]
        )
        close(got, exact, 1e-12)
    needs = torch.ops.diffad_fast.group_norm_silu_backward(
        x, x, torch.ones(2, 2, 2, dtype=x.dtype), 2, weight, bias, None, None, True, 0b10
    )
    assert [g.numel() for g in needs] == [0, 6, 0, 0, 0]


@pytest.mark.native
def test_twice_is_refused():
    x = random((1, 4, 3, 3), 0).requires_grad_()
    y = ops.group_norm_silu(x, 2).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    for dtype in (torch.float32, torch.bfloat16)[layout is torch.channels_last :]:
        x = random((2, 6, 5, 4), 0).to(dtype).to(memory_format=layout)
        weight, bias, scale, shift = parameters(2, 6, torch.float32)
        forward = torch.ops.diffad_fast.group_norm_silu.default
        torch.library.opcheck(forward, (x, 3, weight, None, 1e-5, None, shift, True))
        torch.library.opcheck(forward, (x[:0], 3, None, None, 1e-5, None, None, True))
        stats = forward(x, 3, weight, bias, 1e-5, scale, shift, True)[1]
        backward = torch.ops.diffad_fast.group_norm_silu_backward.default
        for needs in (0b11111, 0b00101):
            torch.library.opcheck(
                backward, (x, x, stats, 3, weight, bias, scale, shift, True, needs)
            )


def test_compiles_as_one_graph(backend):
    def block(x, weight, scale):
        return ops.group_norm_silu(x.tanh(), 2, weight, None, 1e-5, scale).square()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for size in (4, 6):
        x = random((2, 8, size, 5), 0).float().to(memory_format=torch.channels_last)
        inputs = [p.requires_grad_() for p in (x, random((8,), 1).float(), random((2, 8), 2))]
        got, expected = compiled(*inputs), block(*inputs)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
        )


@pytest.mark.native
@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 4), groups=st.integers(1, 5), size=st.integers(1, 20),
    h=st.integers(1, 30), w=st.integers(1, 30), last=st.booleans(), present=st.integers(0, 15),
    activation=st.booleans(),
)  # fmt: skip
def test_shapes(n, groups, size, h, w, last, present, activation):
    c = groups * size
    assume(n * size * h * w != 1)  # F.group_norm refuses a single value
    x = (random((n, c, h, w), 0) * 2 - 1).float().to(memory_format=LAYOUTS[last])
    given = [p if present >> i & 1 else None for i, p in enumerate(parameters(n, c, torch.float32))]
    if size * h * w < 16:  # a variance near 0, where 1 / deviation is steep
        x = x.double()
    check_native(x, groups, given, activation, tolerance=1e-5)


@pytest.mark.native
@pytest.mark.parametrize(
    "x, groups, options",
    [
        (torch.zeros(2, 6, 4), 2, {}),
        (torch.zeros(2, 6, 4, 4), 4, {}),
        (torch.zeros(2, 6, 4, 4), 0, {}),
        (torch.zeros(2, 6, 4, 4).int(), 2, {}),
        (torch.zeros(2, 6, 4, 4), 2, {"weight": torch.ones(5)}),
        (torch.zeros(2, 6, 4, 4), 2, {"scale": torch.ones(6)}),
        (torch.zeros(2, 6, 4, 4), 2, {"shift": torch.ones(3, 6)}),
    ],
)
def test_the_bare_operator_guards_its_memory(x, groups, options):
    given = {"weight": None, "bias": None, "scale": None, "shift": None, **options}
    with pytest.raises(RuntimeError):
        torch.ops.diffad_fast.group_norm_silu(x, groups, eps=1e-5, activation=True, **given)
