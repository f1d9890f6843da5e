"""wavelet_attention against PyWavelets and NumPy, and against attention between raw blocks."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_fast import ops, reference, use_backend


def random(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def by_pywavelets(q, k, v, logit_gain, value_gain, level, scale):
    """One image and head after the other; S and O as sums over sub-bands and positions."""

    def pyramid(x):  # (H,W,d) -> bands coarse to fine
        low, *details = pywt.wavedec2(x, "haar", "periodization", level, axes=(0, 1))
        return [low] + [band for bands in details for band in bands]

    def tokens(band, rows, columns):  # (h,w,d) -> (T, positions, d)
        r, c = band.shape[0] // rows, band.shape[1] // columns
        blocks = band.reshape(rows, r, columns, c, -1).transpose(0, 2, 1, 3, 4)
        return blocks.reshape(rows * columns, r * c, -1)

    def image(x, rows, columns, shape):
        r, c = shape[0] // rows, shape[1] // columns
        return x.reshape(rows, columns, r, c, -1).transpose(0, 2, 1, 3, 4).reshape(shape)

    out = np.empty_like(q)
    n, heads, height, width, _ = q.shape
    rows, columns = height // 2**level, width // 2**level
    for i in range(n):
        for h in range(heads):
            bands_q, bands_k, bands_v = (pyramid(x[i, h]) for x in (q, k, v))
            logits = 0.0
            for w, a, b in zip(logit_gain[h], bands_q, bands_k, strict=True):
                a, b = tokens(a, rows, columns), tokens(b, rows, columns)
                logits = logits + w * np.einsum("ipd,jpd->ij", a, b)
            e = np.exp(scale * logits - (scale * logits).max(axis=1, keepdims=True))
            mixing = e / e.sum(axis=1, keepdims=True)
            result = []
            for g, band in zip(value_gain[h], bands_v, strict=True):
                mixed = g * np.einsum("ij,jpd->ipd", mixing, tokens(band, rows, columns))
                result.append(image(mixed, rows, columns, band.shape))
            low, details = result[0], [tuple(result[j : j + 3]) for j in range(1, len(result), 3)]
            out[i, h] = pywt.waverec2([low, *details], "haar", "periodization", axes=(0, 1))
    return out


@pytest.mark.parametrize("level, size", [(1, (6, 4)), (1, (2, 2)), (2, (8, 12)), (2, (4, 4))])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_against_pywavelets(backend, level, size, scale):
    d = 5
    q, k, v = (random((2, 3, *size, d), seed) for seed in range(3))
    w, g = random((3, 1 + 3 * level), 3), random((3, 1 + 3 * level), 4)
    used = (4**level * d) ** -0.5 if scale is None else scale
    expected = by_pywavelets(*(x.numpy() for x in (q, k, v, w, g)), level, used)
    got = ops.wavelet_attention(q, k, v, w, g, level, scale)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("level", [1, 2])
def test_without_gains_it_is_attention_between_blocks_of_pixels(backend, level):
    n, heads, height, width, d = 2, 2, 8, 16, 3
    q, k, v = (random((n, heads, height, width, d), seed) for seed in range(3))
    b = 2**level

    def blocks(x):
        x = x.reshape(n, heads, height // b, b, width // b, b, d).permute(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(n, heads, -1, b * b * d)

    mixed = F.scaled_dot_product_attention(blocks(q), blocks(k), blocks(v))
    mixed = mixed.reshape(n, heads, height // b, width // b, b, b, d).permute(0, 1, 2, 4, 3, 5, 6)
    expected = mixed.reshape(q.shape)
    torch.testing.assert_close(
        ops.wavelet_attention(q, k, v, level=level), expected, rtol=0, atol=1e-13
    )
    ones = torch.ones(heads, 1 + 3 * level)
    torch.testing.assert_close(
        ops.wavelet_attention(q, k, v, ones, ones, level), expected, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize(
    "dtype, atol", [(torch.float32, 2e-6), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)]
)
def test_dtypes_and_strides(backend, dtype, atol):
    q, k, v = (random((2, 8, 8, 4, 16), seed, dtype) for seed in range(3))
    w, g = random((4, 7), 3, torch.float32), random((4, 7), 4, torch.float32)
    # Heads last but one in memory, as a projection of channels_last features gives them.
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))
    got = ops.wavelet_attention(q, k, v, w, g, 2)
    assert got.dtype == dtype and got.shape == q.shape
    wide = [x.double() for x in (q, k, v, w, g)]
    torch.testing.assert_close(got.double(), ops.wavelet_attention(*wide, 2), rtol=0, atol=atol)


@pytest.mark.parametrize("level", [1, 2])
def test_gradients(level):
    shape = (1, 2, 4, 4, 2)
    inputs = [random(shape, s).requires_grad_() for s in range(3)]
    inputs += [random((2, 1 + 3 * level), s).requires_grad_() for s in (3, 4)]
    assert torch.autograd.gradcheck(lambda *a: ops.wavelet_attention(*a, level), inputs)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(1, 1, 6, 6)}, ValueError, "q must have 5 dimensions"),
        ({"q": torch.zeros(1, 1, 6, 6, 0)}, ValueError, "q has heads without channels"),
        ({"k": torch.zeros(1, 1, 6, 4, 2)}, ValueError, "k must have shape"),
        ({"v": torch.zeros(1, 1, 6, 6, 2).half()}, TypeError, "v is torch.float16"),
        ({"level": 3}, ValueError, "level must be in"),
        ({"level": 1.0}, TypeError, "level must be an integer"),
        ({"level": 2}, ValueError, "divisible by 4 for level 2, got 6x6"),
        ({"logit_gain": torch.ones(1, 7)}, ValueError, r"logit_gain must have shape \(1, 4\)"),
        ({"value_gain": torch.ones(2, 4)}, ValueError, r"value_gain must have shape \(1, 4\)"),
        ({"scale": "x"}, TypeError, "scale must be a number"),
    ],
)
def test_bad_arguments(backend, change, error, message):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 1, 6, 6, 2))
    with pytest.raises(error, match=message):
        ops.wavelet_attention(**{**arguments, **change})


# ------------------------------------------------------------------------- the C++ operator

# Sides and channels that fill no vector, no tile and no work item; one token; one row; more tokens
# than a work item (96), a tile (64) and a chunk of keys; more numbers in a block than the 256 that
# one product takes.
SHAPES = [
    ((1, 1, 2, 2, 1), 1),
    ((2, 3, 2, 10, 5), 1),
    ((2, 1, 6, 10, 2), 1),
    ((1, 2, 26, 38, 3), 1),
    ((1, 1, 2, 194, 16), 1),
    ((3, 1, 4, 4, 2), 2),
    ((1, 2, 44, 36, 7), 2),
    ((1, 1, 8, 12, 40), 2),
]


def projection(shape, dtype, gap=0):
    """q, k, v as views of one channels_last projection, with ``gap`` more channels in memory."""
    n, heads, height, width, d = shape
    qkv = random((n, height, width, 3 * heads * d + gap), 0, dtype)[..., : 3 * heads * d]
    return qkv.unflatten(3, (3, heads, d)).permute(3, 0, 4, 1, 2, 5)


def layouts(shape, dtype):
    n, heads, height, width, d = shape
    yield "contiguous", [random(shape, s, dtype) for s in range(3)]
    yield "projection", projection(shape, dtype)
    yield "slice of a projection", projection(shape, dtype, gap=1)
    first = random((n, 3 * heads * d, height, width), 0, dtype)
    yield "channels first", first.unflatten(1, (3, heads, d)).permute(1, 0, 2, 4, 5, 3)
    yield (
        "transposed, every second, expanded",
        [
            random((n, heads, width, height, d), 0, dtype).transpose(2, 3),
            random((n, heads, height, 2 * width, d), 1, dtype)[:, :, :, ::2],
            random((n, heads, 1, 1, 1), 2, dtype).expand(shape),
        ],
    )


def gains(shape, level):
    return [1 + random((shape[1], 1 + 3 * level), s, torch.float32) / 2 for s in (3, 4)]


def result_and_gradients(function, arguments, grad, level):
    leaves = [x if x is None else x.detach().requires_grad_() for x in arguments]
    out = function(*leaves, level)
    wanted = [x for x in leaves if x is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def assert_as_exact_as_the_reference(arguments, grad, level, what=""):
    """Errors against float64 are at most a few times those of the reference in this dtype."""
    wide = [x if x is None else x.double() for x in arguments]
    exact = result_and_gradients(reference.wavelet_attention, wide, grad.double(), level)
    plain = result_and_gradients(reference.wavelet_attention, arguments, grad, level)
    with use_backend("cpu"):
        ours = result_and_gradients(ops.wavelet_attention, arguments, grad, level)
    dtype = arguments[0].dtype
    wider = torch.promote_types(dtype, torch.float32)
    for i, (a, b, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        # Where sums cancel, as with one token, the reference can be exact by luck; what cancels
        # are the products of the gradient with the output, which is rounded to its dtype.
        floor = 2 * torch.finfo(dtype).eps + 32 * torch.finfo(wider).eps
        floor *= max(1.0, e.abs().max().item(), (grad * exact[0]).abs().sum(-1).max().item())
        error, allowed = ((x.double() - e).abs().max().item() for x in (a, b))
        assert error <= 3 * allowed + floor, (what, "out q k v w g".split()[i], error, allowed)


@pytest.mark.native
@pytest.mark.parametrize("shape, level", SHAPES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_values_and_gradients(cpu_isa, dtype, shape, level):
    arguments = [*projection(shape, dtype), *gains(shape, level)]
    assert_as_exact_as_the_reference(arguments, random(shape, 5, dtype), level)


@pytest.mark.native
@pytest.mark.parametrize("shape, level", [((2, 3, 6, 8, 5), 1), ((1, 2, 8, 8, 16), 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_strides(dtype, shape, level):
    grad = random(shape, 5, dtype)
    w, g = gains(shape, level)
    for name, (q, k, v) in layouts(shape, dtype):
        assert_as_exact_as_the_reference([q, k, v, w, g], grad, level, name)
    assert_as_exact_as_the_reference([q, k, v, None, g], grad, level)
    assert_as_exact_as_the_reference([q, k, v, w, None], grad.mT.contiguous().mT, level)


@pytest.mark.native
@settings(max_examples=15, deadline=None)
@given(
    st.tuples(*(st.integers(1, n) for n in (3, 3, 9, 9, 20))),
    st.sampled_from([1, 2]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(shape, level, dtype):
    n, heads, rows, cols, d = shape
    shape = (n, heads, rows * 2**level, cols * 2**level, d)
    arguments = [*projection(shape, dtype), *gains(shape, level)]
    assert_as_exact_as_the_reference(arguments, random(shape, 5, dtype), level)


@pytest.mark.native
def test_logits_that_grow_with_the_key_and_overflow_no_exponential(cpu_isa):
    # The running maximum rises in every tile, and most exponentials underflow.
    shape = (1, 1, 32, 32, 4)
    q, k, v = (random(shape, s, torch.float32) for s in range(3))
    k = k + torch.linspace(-40, 40, 32)[:, None, None]
    q = 20 * q.abs()
    assert_as_exact_as_the_reference([q, k, v, None, None], random(shape, 5, torch.float32), 1)
    for factor in (1.0, -1.0):
        out = torch.ops.diffad_fast.wavelet_attention(q, k, v, None, None, 1, factor)[0]
        exact = reference.wavelet_attention(q.double(), k.double(), v.double(), scale=factor)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-2)


@pytest.mark.native
def test_a_nan_stays_in_its_query_and_reaches_it(cpu_isa):
    q, k, v = (random((1, 1, 20, 20, 5), s, torch.float32) for s in range(3))
    q[0, 0, 7, 9, 3] = float("nan")
    with use_backend("cpu"):
        bad = ops.wavelet_attention(q, k, v).isnan()[0, 0].all(-1)
        expected = torch.zeros(20, 20, dtype=torch.bool)
        expected[6:8, 8:10] = True
        assert torch.equal(bad, expected)
        k[0, 0, 19, 19, 0] = float("nan")
        assert ops.wavelet_attention(q, k, v).isnan().all()


@pytest.mark.native
def test_output_keeps_the_layout():
    shape = (2, 3, 8, 4, 5)
    n, heads, height, width, d = shape
    q, k, v = (x.requires_grad_() for x in projection(shape, torch.float32).detach().unbind())
    with use_backend("cpu"):
        out = ops.wavelet_attention(q, k, v)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        plain = ops.wavelet_attention(*(x.contiguous() for x in (q, k, v)))
    assert plain.is_contiguous()
    for x in (out, *grads):
        image = x.permute(0, 1, 4, 2, 3).reshape(n, heads * d, height, width)
        assert image.data_ptr() == x.data_ptr()
        assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.native
@pytest.mark.parametrize("shape, level", [*SHAPES, ((16, 2, 4, 4, 3), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_written_whole(written, cpu_isa, dtype, shape, level):
    arguments = [*projection(shape, dtype), *gains(shape, level)]
    out, lse = torch.ops.diffad_fast.wavelet_attention(*arguments, level, 0.3)
    grads = torch.ops.diffad_fast.wavelet_attention_backward(
        random(shape, 5, dtype), *arguments, out, lse, level, 0.3
    )
    assert all(map(written, (out, lse, *grads)))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.native)])
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("shape", [(0, 2, 8, 8, 4), (2, 0, 8, 8, 4), (2, 2, 0, 8, 4)])
def test_empty(shape, level, backend):
    arguments = [*(random(shape, s) for s in range(3)), *(x.double() for x in gains(shape, level))]
    with use_backend(backend):
        out, *grads = result_and_gradients(
            ops.wavelet_attention, arguments, torch.ones(shape), level
        )
    assert out.shape == shape
    for x, grad in zip(arguments, grads, strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.native
def test_gradient_of_a_sum():
    # Its gradient is expanded from one number: stride 0 in every dimension.
    shape = (2, 2, 8, 12, 5)
    arguments = [*(random(shape, s) for s in range(3)), *(x.double() for x in gains(shape, 2))]
    leaves = [x.requires_grad_() for x in arguments]
    with use_backend("cpu"):
        ours = torch.autograd.grad(ops.wavelet_attention(*leaves, 2).sum(), leaves)
    exact = torch.autograd.grad(reference.wavelet_attention(*leaves, 2).sum(), leaves)
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.native
@pytest.mark.parametrize("shape", [(1, 1, 48, 32, 6), (5, 7, 4, 8, 9)])
def test_threads_and_repetition_do_not_change_a_bit(by_threads, shape):
    arguments = [*projection(shape, torch.float32), *gains(shape, 1)]
    grad = random(shape, 5, torch.float32)
    with use_backend("cpu"):
        by_threads(lambda: result_and_gradients(ops.wavelet_attention, arguments, grad, 1))


@pytest.mark.native
def test_gradient_with_some_inputs_fixed():
    shape = (1, 2, 4, 4, 3)
    q, k, v = (random(shape, s) for s in range(3))
    w, g = (x.double().requires_grad_() for x in gains(shape, 1))
    with use_backend("cpu"):
        ours = torch.autograd.grad(ops.wavelet_attention(q, k, v, w, g).square().sum(), (w, g))
    exact = torch.autograd.grad(reference.wavelet_attention(q, k, v, w, g).square().sum(), (w, g))
    torch.testing.assert_close(ours, exact)


@pytest.mark.native
def test_opcheck():
    operator = torch.ops.diffad_fast.wavelet_attention.default
    for shape, level, dtype in [
        ((2, 3, 4, 8, 5), 1, torch.float32),
        ((1, 2, 8, 4, 3), 2, torch.bfloat16),
        ((0, 2, 8, 4, 3), 1, torch.float64),
    ]:
        q, k, v = (x.detach().requires_grad_() for x in projection(shape, dtype))
        w, g = (
            x.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
            for x in gains(shape, level)
        )
        torch.library.opcheck(operator, (q, k, v, w, g, level, 0.3))
        torch.library.opcheck(operator, (q.contiguous(), k, v, None, g, level, 0.3))
        with torch.no_grad():
            out, lse = operator(q, k, v, None, g, level, 0.3)
            torch.library.opcheck(
                torch.ops.diffad_fast.wavelet_attention_backward.default,
                (random(shape, 5, dtype), q, k, v, None, g, out, lse, level, 0.3),
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.native
def test_compiles_as_one_graph():
    def step(q, k, v, w, g):
        return ops.wavelet_attention(q * 2, k, v, w, g).tanh().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with use_backend("cpu"):
        for shape in ((1, 2, 4, 4, 3), (1, 2, 8, 4, 3)):
            leaves = [*projection(shape, torch.float32), *gains(shape, 1)]
            leaves = [x.detach().requires_grad_() for x in leaves]
            expected = torch.autograd.grad(step(*leaves), leaves)
            torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


@pytest.mark.native
@pytest.mark.parametrize(
    "change",
    [
        {"k": torch.zeros(1, 1, 6, 4, 2)},
        {"v": torch.zeros(1, 1, 6, 6, 2).half()},
        {"q": torch.zeros(6, 6, 2)},
        {"logit_gain": torch.ones(1, 7)},
        {"value_gain": torch.ones(1, 4).half()},
        {"level": 2},
        {"level": 0},
    ],
)
def test_the_bare_operator_guards_its_memory(change):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 1, 6, 6, 2))
    arguments |= {"logit_gain": None, "value_gain": None, "level": 1, "scale": 1.0, **change}
    with pytest.raises(RuntimeError, match="wavelet_attention"):
        torch.ops.diffad_fast.wavelet_attention(*arguments.values())
