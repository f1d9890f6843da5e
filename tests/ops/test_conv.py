"""conv3x3 against PyTorch's convolution in float64, and against shifts."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_fast import ops, use_backend
from diffad_fast.config import DetectorConfig
from diffad_fast.denoisers.wavelet_unet import Conv3x3
from diffad_fast.ops import conv
from diffad_fast.training.optimizer import Optimizer

LAST = torch.channels_last
# Of the largest value, at up to 256 channels; measured: 1.9e-6.
TOLERANCE = 4e-6


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def tensors(n, inputs, outputs, height, width, dtype=torch.float32):
    """x, weight, bias and residual, in channels_last."""
    x, residual = random(n, inputs, height, width), random(n, outputs, height, width, seed=3)
    weight = random(outputs, inputs, 3, 3, seed=1) / (9 * inputs) ** 0.5
    found = x.to(memory_format=LAST), weight, random(outputs, seed=2), residual
    return [t.to(dtype) for t in (*found[:3], residual.to(memory_format=LAST))]


def exact(x, weight, bias=None, residual=None):
    """In float64, by PyTorch."""
    x, weight, bias, residual = (
        t if t is None else t.double() for t in (x, weight, bias, residual)
    )
    return F.conv2d(x, weight, bias, padding=1) + (0 if residual is None else residual)


def derivatives(function, inputs, grad):
    """y, then the gradients of all inputs that are given."""
    inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], grad)]


def close(got, expected, tolerance=TOLERANCE):
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().amax() / expected.abs().amax()
    assert error <= tolerance, f"{float(error):.2e} of the largest value"


def check_native(inputs, grad=None):
    """The native operator and its gradients against float64; they have to be ours."""
    given = [t for t in inputs if t is not None]
    x, weight = given[:2]
    assert conv._served(x, given)
    if grad is None:
        grad = random(x.shape[0], weight.shape[0], *x.shape[2:], seed=4)
    with use_backend("cpu"):
        got = derivatives(ops.conv3x3, inputs, grad)
    for ours, expected in zip(got, derivatives(exact, inputs, grad.double()), strict=True):
        assert ours.dtype == torch.float32
        close(ours, expected)
    assert got[0].is_contiguous(memory_format=LAST)
    assert got[1].is_contiguous(memory_format=LAST)
    return got


# ------------------------------------------------------------------------ values


@pytest.mark.parametrize("tap", range(9))
def test_a_filter_of_one_tap_shifts(backend, tap):
    row, column = tap // 3 - 1, tap % 3 - 1
    x = random(2, 16, 8, 12).to(memory_format=LAST)
    weight = torch.zeros(16, 16, 3, 3)
    weight[range(16), range(16), row + 1, column + 1] = 1
    expected = F.pad(x, (1, 1, 1, 1))[:, :, 1 + row : 9 + row, 1 + column : 13 + column]
    close(ops.conv3x3(x, weight), expected.double(), 1e-6)


# A row of tiles and many, whole ones and cut ones; fewer and more tiles than are worked on at once;
# pairs of blocks of outputs and an odd one.
SHAPES = [
    (4, 16, 16, 4, 16), (1, 32, 48, 8, 8), (3, 16, 80, 17, 30), (2, 48, 16, 13, 9),
    (1, 80, 80, 32, 32), (5, 64, 32, 6, 7), (1, 256, 128, 16, 16), (8, 128, 128, 8, 8),
]  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize("shape", SHAPES)
def test_native_agrees_with_float64(cpu_isa, shape):
    inputs = tensors(*shape)
    check_native(inputs)
    check_native([*inputs[:2], None, None])


@pytest.mark.native
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 5), height=st.integers(1, 21), width=st.integers(1, 21),
    inputs=st.integers(1, 4), outputs=st.integers(1, 4), extra=st.integers(0, 1),
)  # fmt: skip
def test_any_shape(n, height, width, inputs, outputs, extra):
    with_all = tensors(n, 16 * inputs + extra, 16 * outputs, height, width)
    grad = random(n, 16 * outputs, height, width, seed=4)
    with use_backend("cpu"):
        got = derivatives(ops.conv3x3, with_all, grad)
    for ours, expected in zip(got, derivatives(exact, with_all, grad.double()), strict=True):
        close(ours, expected)


@pytest.mark.native
def test_errors_are_less_than_twice_those_of_the_direct_sum(cpu_isa):
    x, weight, *_ = tensors(1, 128, 128, 32, 32)
    expected = exact(x, weight)
    size = expected.square().mean().sqrt()

    def error(y):
        return float((y - expected).square().mean().sqrt() / size)

    ours, direct = error(ops.conv3x3(x, weight)), error(F.conv2d(x, weight, padding=1))
    # Measured: 1.07e-6 and 5.5e-7; with the points 0, 1, -1, 2, -2 it would be 2.3e-6.
    assert ours < 1.4e-6 and ours < 3 * direct


@pytest.mark.native
def test_sums_over_many_tiles_keep_their_digits():
    # 2048 tiles in eleven chunks, all of one sign: a sum that lost terms or digits would show.
    x, weight, *_ = tensors(8, 16, 16, 64, 64)
    x, grad = x.abs() + 1, random(8, 16, 64, 64, seed=4).abs() + 1
    got = torch.ops.diffad_fast.conv3x3_weight_gradient(grad, x)
    expected = derivatives(exact, [x, weight], grad.double())[2]
    close(got, expected, 2e-6)


@pytest.mark.native
def test_any_strides(cpu_isa):
    base = random(4, 48, 18, 20).to(memory_format=LAST)
    _, weight, bias, _ = tensors(1, 16, 32, 1, 1)
    views = {
        "channel slice": base[:, 7:23],
        "crop": base[:, :16, 2:9, 3:14],
        "every second row and column": base[:, :16, ::2, ::2],
        "every second sample": base[::2, :16],
        "expanded sample": base[:1, :16].expand(4, -1, -1, -1),
        "transposed": base[:, :16].transpose(2, 3),
    }
    for name, x in views.items():
        n, _, height, width = x.shape
        residual = random(n, 80, height, width, seed=5).to(memory_format=LAST)[:, 20:52]
        given = [x, weight.to(memory_format=LAST), bias[::1], residual]
        assert conv._served(x, given), name
        check_native(given)
    check_native([base[:, :16], weight.flip(0).transpose(2, 3), random(64)[::2], None])


@pytest.mark.native
def test_gradients_of_any_strides():
    inputs = tensors(2, 16, 16, 9, 10)
    other = random(2, 16, 9, 10, seed=1)
    for grad in (
        torch.tensor(0.7).expand(other.shape),
        other[:, :, :1, :1].expand(other.shape),
        other,
        other.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        check_native(inputs, grad)


@pytest.mark.native
def test_gradients_only_where_they_are_wanted():
    inputs = tensors(1, 32, 16, 8, 8)
    grad = random(1, 16, 8, 8, seed=4)
    everything = derivatives(exact, inputs, grad.double())[1:]
    for i in range(4):
        chosen = [t.detach().requires_grad_(k == i) for k, t in enumerate(inputs)]
        (got,) = torch.autograd.grad(ops.conv3x3(*chosen), chosen[i], grad)
        close(got, everything[i])


@pytest.mark.native
def test_a_value_that_is_not_finite_stays_within_its_window(cpu_isa):
    x, weight, bias, _ = tensors(2, 16, 16, 16, 16)
    expected = ops.conv3x3(x, weight, bias)
    for value in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[1, 3, 5, 9] = value
        got = ops.conv3x3(spoiled, weight, bias)
        assert not got[1, :, 4:7, 8:11].isfinite().any()
        got[1, :, 4:8, 8:12] = expected[1, :, 4:8, 8:12]  # its tile, whose windows hold the rest
        assert torch.equal(got, expected)


# ------------------------------------------------------------------------ the same bits


@pytest.mark.native
@pytest.mark.parametrize("shape", [(1, 48, 80, 8, 8), (1, 32, 16, 19, 33), (3, 16, 48, 40, 36)])
def test_threads_do_not_change_a_bit(by_threads, shape):
    inputs, grad = tensors(*shape), random(shape[0], shape[2], *shape[3:], seed=4)
    with use_backend("cpu"):
        by_threads(lambda: derivatives(ops.conv3x3, inputs, grad))


@pytest.mark.native
def test_a_sample_does_not_depend_on_its_neighbours():
    x, weight, bias, residual = tensors(5, 32, 16, 15, 24)
    got = ops.conv3x3(x, weight, bias, residual)
    for i in range(5):
        one = slice(i, i + 1)
        assert torch.equal(got[one], ops.conv3x3(x[one], weight, bias, residual[one]))


@pytest.mark.native
def test_every_output_is_written(cpu_isa, written):
    inputs, grad = tensors(2, 32, 48, 21, 9), random(2, 48, 21, 9, seed=4)
    assert all(map(written, derivatives(ops.conv3x3, inputs, grad)))


# ------------------------------------------------------------------------ the vendor's


def test_shapes_alone():
    made = ops.conv3x3(
        torch.empty(2, 16, 8, 8, device="meta"), torch.empty(32, 16, 3, 3, device="meta")
    )
    assert made.shape == (2, 32, 8, 8) and made.is_meta


def test_an_empty_batch(backend):
    inputs = [t.requires_grad_() for t in tensors(0, 16, 32, 8, 8)]
    y = ops.conv3x3(*inputs)
    assert y.shape == (0, 32, 8, 8)
    dx, dweight, dbias, _ = torch.autograd.grad(y.sum(), inputs)
    assert dx.shape == inputs[0].shape and not dweight.any() and not dbias.any()


@pytest.mark.native
def test_native_takes_an_empty_batch():
    x, weight, bias, residual = tensors(0, 16, 32, 8, 8)
    packed = torch.ops.diffad_fast.conv3x3_pack(weight, False)
    assert torch.ops.diffad_fast.conv3x3(x, packed, bias, residual).shape == (0, 32, 8, 8)
    assert not torch.ops.diffad_fast.conv3x3_weight_gradient(residual, x).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_pytorchs(backend, dtype):
    x, weight, bias, residual = tensors(2, 16, 32, 8, 12, dtype=dtype)
    got = ops.conv3x3(x, weight, bias, residual)
    assert torch.equal(got, F.conv2d(x, weight, bias, padding=1) + residual)


@pytest.mark.native
def test_what_is_not_served_is_pytorchs():
    x, weight, bias, _ = tensors(4, 16, 32, 8, 8)
    calls = [
        (x.contiguous(), weight, bias),  # the format decides
        (x[:, :15].contiguous(memory_format=LAST), weight[:, :15].clone(), bias),
        (x, weight[:31].clone(), bias[:31].clone()),
        (x[:, :, :4].contiguous(memory_format=LAST), weight, bias),  # two tiles, in any batch
        (x[:, :, :5, :5].contiguous(memory_format=LAST), weight, bias),  # mostly beside the image
    ]
    for call in calls:
        assert not conv._served(call[0], call)
        assert torch.equal(ops.conv3x3(*call), F.conv2d(*call, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.conv3x3(x, weight, bias).dtype == torch.bfloat16


def test_gradients(backend):
    inputs = [t.requires_grad_() for t in tensors(1, 3, 2, 4, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(ops.conv3x3, inputs)


# ------------------------------------------------------------------------ packed weights


@pytest.mark.native
@torch.no_grad()
def test_a_weight_is_packed_once_for_each_of_its_versions():
    x, weight, *_ = tensors(2, 16, 16, 8, 8)
    weight = torch.nn.Parameter(weight)
    ops.conv3x3(x, weight)
    kept = conv._packed[weight]
    ops.conv3x3(x[:1], weight)
    assert conv._packed[weight] is kept
    weight.mul_(2)
    close(ops.conv3x3(x, weight), exact(x, weight))
    weight.data = random(16, 16, 3, 3, seed=7)
    close(ops.conv3x3(x, weight), exact(x, weight))
    for optimizer in (torch.optim.AdamW, torch.optim.SGD):  # fused: no new version
        weight.grad = random(16, 16, 3, 3, seed=8)
        optimizer([weight], lr=0.1, fused=True).step()
        close(ops.conv3x3(x, weight), exact(x, weight))
    gc.collect()  # weights of other tests
    before = len(conv._packed)
    memory = conv._packed[weight][2]
    assert memory.data_ptr() == weight.data_ptr() and not memory.requires_grad
    del weight, kept, memory
    gc.collect()
    assert len(conv._packed) == before - 1


@pytest.mark.native
def test_weights_of_inference_mode_are_not_kept():
    x, weight, *_ = tensors(2, 16, 16, 8, 8)
    with torch.inference_mode():
        weight = weight.clone()
        for _ in range(2):
            close(ops.conv3x3(x, weight), exact(x, weight))
            weight.mul_(3)
    assert weight not in conv._packed


@pytest.mark.native
def test_the_optimizer_tells_that_weights_changed():
    module = Conv3x3(16, 16)
    x = random(2, 16, 8, 8).to(memory_format=LAST)
    optimizer = Optimizer(module, DetectorConfig())
    other = torch.cat([random(16 * 16 * 9, seed=5), random(16, seed=6)])

    def check():
        with torch.no_grad():
            close(module(x), exact(x, module.weight, module.bias))

    check()
    optimizer.exchange(other)
    check()
    optimizer.gradient.fill_(1.0)
    optimizer.set(0, 0.1)
    optimizer.update()
    check()
    names = ("values", "average", "first", "second")
    optimizer.load({name: torch.full_like(other, 0.25) for name in names}, 3)
    check()
    optimizer.release()
    check()


# ------------------------------------------------------------------------ torch


@pytest.mark.native
def test_second_derivatives_are_refused():
    inputs = [t.requires_grad_() for t in tensors(1, 16, 16, 8, 8)]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ops.conv3x3(*inputs).sum(), inputs[0], create_graph=True)


@pytest.mark.native
@pytest.mark.parametrize("shape", [(2, 16, 32, 8, 12), (4, 32, 16, 4, 1), (4, 16, 16, 1, 1)])
def test_opcheck(shape):
    x, weight, bias, residual = tensors(*shape)
    op = torch.ops.diffad_fast
    tests = ("test_schema", "test_faketensor")
    for turned in (False, True):
        torch.library.opcheck(op.conv3x3_pack.default, (weight, turned), test_utils=tests)
    packed = op.conv3x3_pack(weight, False)
    torch.library.opcheck(op.conv3x3.default, (x, packed, bias, residual), test_utils=tests)
    torch.library.opcheck(op.conv3x3.default, (x, packed, None, None), test_utils=tests)
    torch.library.opcheck(op.conv3x3_weight_gradient.default, (residual, x), test_utils=tests)


@pytest.mark.native
def test_compiles_whole():
    inputs = [t.requires_grad_() for t in tensors(2, 16, 32, 8, 8)]
    compiled = torch.compile(ops.conv3x3, fullgraph=True, backend="aot_eager")
    grad = random(2, 32, 8, 8, seed=4)
    for ours, expected in zip(
        derivatives(compiled, inputs, grad), derivatives(ops.conv3x3, inputs, grad), strict=True
    ):
        assert torch.equal(ours, expected)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), ops.conv3x3(*inputs))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": torch.zeros(16, 8, 8)}, ValueError, "4 dimensions"),
        ({"x": torch.zeros(2, 16, 8, 8).int()}, TypeError, "got torch.int32"),
        ({"weight": torch.zeros(32, 16, 5, 5)}, ValueError, r"\(32, 16, 3, 3\), got \(32, 16, 5"),
        ({"weight": torch.zeros(32, 8, 3, 3)}, ValueError, r"\(32, 16, 3, 3\), got \(32, 8"),
        ({"weight": torch.zeros(32, 16, 3, 3).half()}, TypeError, "weight is torch.float16 and x"),
        ({"bias": torch.zeros(16)}, ValueError, r"bias must have shape \(32,\)"),
        ({"bias": [0.0] * 32}, TypeError, "bias must be a torch.Tensor"),
        ({"residual": torch.zeros(2, 32, 8, 7)}, ValueError, r"residual.*\(2, 32, 8, 8\)"),
    ],
)
def test_bad_arguments(backend, changed, error, message):
    names = ("x", "weight", "bias", "residual")
    arguments = dict(zip(names, tensors(2, 16, 32, 8, 8), strict=True))
    with pytest.raises(error, match=message):
        ops.conv3x3(**{**arguments, **changed})


@pytest.mark.native
def test_the_bare_operators_refuse_what_does_not_fit():
    x, weight, bias, residual = tensors(1, 16, 32, 8, 8)
    op = torch.ops.diffad_fast
    packed = op.conv3x3_pack(weight, False)
    calls = [
        lambda: op.conv3x3_pack(weight.double(), False),
        lambda: op.conv3x3_pack(weight[:31], False),
        lambda: op.conv3x3_pack(weight[:, :15], True),
        lambda: op.conv3x3(x[:, :15], packed, None, None),
        lambda: op.conv3x3(x.double(), packed, None, None),
        lambda: op.conv3x3(residual, packed, None, None),
        lambda: op.conv3x3(x, packed[..., :8], None, None),
        lambda: op.conv3x3(x, packed, bias[:16], None),
        lambda: op.conv3x3(x, packed, None, residual[:, :, :7]),
        lambda: op.conv3x3_weight_gradient(residual[:, :, :7], x),
        lambda: op.conv3x3_weight_gradient(residual[:, :24], x),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="conv3x3"):
            call()
