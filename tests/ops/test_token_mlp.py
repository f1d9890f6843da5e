"""token_mlp_loop against a module with nn.LayerNorm, and a DDIM loop written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffad_fast import native, ops, reference, use_backend
from diffad_fast.errors import BackendError
from diffad_fast.ops import dispatch, token_mlp

OPERATOR = dispatch.OPERATORS["token_mlp_loop"]
D, WIDTH, BLOCKS, STEPS = 6, 10, 3, 4


class TokenMLP(nn.Module):
    """The token MLP as one writes it for training, with a table as time embedding."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(D, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(BLOCKS))
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.last_norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.last = nn.Linear(WIDTH, D)
        self.time = nn.Parameter(torch.randn(STEPS, BLOCKS, WIDTH))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x, step):
        h = self.first(x)
        for i in range(BLOCKS):
            y = nn.functional.silu(self.up[i](self.norms[i](h)) + self.time[step, i])
            h = h + self.down[i](y)
        return self.last(nn.functional.silu(self.last_norm(h)))

    def packed(self, dtype=None):
        weights, extra = ops.PackedTokenMLP.pack(
            self.first.weight,
            self.first.bias,
            torch.stack([norm.weight for norm in self.norms]),
            torch.stack([norm.bias for norm in self.norms]),
            torch.stack([layer.weight for layer in self.up]),
            torch.stack([layer.bias for layer in self.up]),
            torch.stack([layer.weight for layer in self.down]),
            torch.stack([layer.bias for layer in self.down]),
            self.last.weight,
            self.last.bias,
            dtype,
        )
        return weights, self.time + extra


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TokenMLP().double()


def tokens(count=11):
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_against_the_module(model):
    """Any table: c_in, the update and the statistics are each where the equations put them."""
    table = torch.randn(STEPS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights, bias = model.packed()
    x_end, stats = ops.token_mlp_loop(tokens(), weights, bias, table)
    x, expected = tokens(), []
    for step in range(STEPS):
        c_in, a, b, p, q = table[step]
        m = model(c_in * x, step)
        expected.append((p * x + q * m).pow(2).mean(dim=1))
        x = a * x + b * m
    assert x_end.shape == (11, D) and stats.shape == (11, STEPS)
    torch.testing.assert_close(x_end, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats, torch.stack(expected, dim=1), rtol=1e-12, atol=1e-12)


def test_a_ddim_loop_is_a_table(model):
    """v-prediction: x0 = sa x - ss m, e = sa m + ss x, x <- tb x0 + ts e, written as A and Bm."""
    levels = [0.05, 0.3, 0.6, 0.9, 1.0]
    x, rows = tokens(), []
    for step, (a, b) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        sa, ss, tb, ts = a**0.5, (1 - a) ** 0.5, b**0.5, (1 - b) ** 0.5
        rows.append((1.0, tb * sa + ts * ss, ts * sa - tb * ss, sa, -ss))
        with torch.no_grad():
            x = ops.ddim_step(x, model(x, step), a, b, "v_prediction")
    weights, bias = model.packed()
    x_end, stats = ops.token_mlp_loop(
        tokens(), weights, bias, torch.tensor(rows, dtype=torch.float64)
    )
    torch.testing.assert_close(x_end, x, rtol=0, atol=1e-12)
    # p = sqrt(abar), q = -sqrt(1 - abar) made stats the mean square of x0; the last is x_end.
    torch.testing.assert_close(stats[:, -1], x.pow(2).mean(dim=1), rtol=0, atol=1e-12)


def test_a_table_that_leaves_x_evaluates_all_levels_on_the_same_x(model):
    table = torch.tensor([[0.5 + step, 1.0, 0.0, -1.0, 1.0] for step in range(STEPS)])
    weights, bias = model.packed()
    x_end, stats = ops.token_mlp_loop(tokens(), weights, bias, table)
    assert torch.equal(x_end, tokens())
    for step in range(STEPS):
        residual = model((0.5 + step) * tokens(), step) - tokens()
        torch.testing.assert_close(stats[:, step], residual.pow(2).mean(dim=1), rtol=0, atol=1e-12)


def test_packing_folds_in_the_wide_type(model):
    weights, bias = model.packed(torch.float32)
    assert {w.dtype for w in weights} == {torch.float32} and bias.dtype == torch.float64
    wide = model.packed()[0]
    for narrow, w in zip(weights, wide, strict=True):
        assert torch.equal(narrow, w.float())


@pytest.mark.parametrize(
    "state, dtype, atol",
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 5e-2),
        (torch.bfloat16, torch.bfloat16, 8e-2),
    ],
)
def test_dtypes(model, state, dtype, atol):
    table = torch.tensor([[1.0, 0.9, 0.2, 0.8, -0.3]] * STEPS)
    weights, bias = model.packed()
    wide = ops.token_mlp_loop(tokens(), weights, bias, table)
    weights, bias = model.packed(dtype)
    x_end, stats = ops.token_mlp_loop(tokens().to(state), weights, bias.float(), table)
    assert x_end.dtype == state and stats.dtype == torch.float32
    torch.testing.assert_close(x_end.double(), wide[0], rtol=0, atol=atol)
    torch.testing.assert_close(stats.double(), wide[1], rtol=0, atol=atol)


def test_gradients(model):
    weights, bias = model.packed()
    table = torch.randn(STEPS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaves = [t.detach()[:2] if t is bias else t.detach() for t in (tokens(2), *weights, bias)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def loop(x, *rest):
        return ops.token_mlp_loop(x, ops.PackedTokenMLP(*rest[:-1]), rest[-1], table[:2])

    assert torch.autograd.gradcheck(loop, leaves)


def test_weights_of_a_subclass(model):
    class Named(ops.PackedTokenMLP):
        pass

    weights, bias = model.packed()
    table = torch.ones(STEPS, 5)
    expected = ops.token_mlp_loop(tokens(), weights, bias, table)
    found = ops.token_mlp_loop(tokens(), Named(*weights), bias, table)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_steps_and_no_tokens(model):
    weights, bias = model.packed()
    x_end, stats = ops.token_mlp_loop(tokens(), weights, bias[:0], torch.zeros(0, 5))
    assert torch.equal(x_end, tokens()) and stats.shape == (11, 0)
    x = tokens().requires_grad_()
    ops.token_mlp_loop(x, weights, bias[:0], torch.zeros(0, 5))[0].sum().backward()
    assert (x.grad == 1).all()
    x_end, stats = ops.token_mlp_loop(tokens()[:0], weights, bias, torch.zeros(STEPS, 5))
    assert x_end.shape == (0, D) and stats.shape == (0, STEPS)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda a: a.update(x=a["x"][0]), ValueError, "x must have 2 dimensions"),
        (lambda a: a.update(x=a["x"][:, :3]), ValueError, r"W_in must have shape \(10, 3\)"),
        (lambda a: a.update(weights=tuple(a["weights"])), TypeError, "must be a PackedTokenMLP"),
        (
            lambda a: a.update(weights=a["weights"]._replace(b2=a["weights"].b2[:1])),
            ValueError,
            r"b2 must have shape \(3, 10\), got \(1, 10\)",
        ),
        (
            lambda a: a.update(weights=a["weights"]._replace(W2=a["weights"].W2.float())),
            TypeError,
            "W2 is torch.float32 and W_in torch.float64",
        ),
        (lambda a: a.update(table=a["table"][:, :4]), ValueError, r"table must.*\(4, 5\)"),
        (lambda a: a.update(table=a["table"][:2]), ValueError, r"step_bias.*\(2, 3, 10\)"),
    ],
)
@pytest.mark.parametrize("library", [True, False])
def test_bad_arguments(model, change, error, message, library, monkeypatch):
    if not library:
        monkeypatch.delitem(OPERATOR.implementations, "cpu", raising=False)
    weights, bias = model.packed()
    arguments = {"x": tokens(), "weights": weights, "step_bias": bias, "table": torch.zeros(4, 5)}
    change(arguments)
    with pytest.raises(error, match=message):
        ops.token_mlp_loop(**arguments)


# ------------------------------------------------------------------ the native operator

# Of the largest value; the reference itself is within a third of each.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}


def problem(m, d, width, blocks, steps, dtype=torch.float64, weights=None, seed=0):
    """Arguments of token_mlp_loop with random numbers everywhere, exact in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0, to=dtype):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return x.to(to)

    weights = weights or dtype
    packed = ops.PackedTokenMLP(
        W_in=random(width, d, scale=d**-0.5, to=weights),
        b_in=random(width, to=weights),
        W1=random(blocks, width, width, scale=width**-0.5, to=weights),
        W2=random(blocks, width, width, scale=width**-0.5, to=weights),
        b2=random(blocks, width, to=weights),
        W_out=random(d, width, scale=width**-0.5, to=weights),
        b_out=random(d, to=weights),
    )
    state = torch.promote_types(dtype, torch.float32)
    table = random(steps, 5, to=state)
    table[:, 1:3] *= 0.5
    return random(m, d), packed, random(steps, blocks, width, to=state), table


def double(arguments):
    x, weights, bias, table = arguments
    weights = ops.PackedTokenMLP(*(w.double() for w in weights))
    return x.double(), weights, bias.double(), table.double()


def assert_close(results, expected, tolerance):
    for found, wanted in zip(results, expected, strict=True):
        assert found.shape == wanted.shape
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * (scale or 1))


def on_cpu(arguments):
    with use_backend("cpu"):
        return ops.token_mlp_loop(*arguments)


SIZES = [  # tokens, token size, width, blocks, steps
    (1, 1, 1, 1, 1),
    (1, 64, 128, 2, 3),
    (1, 300, 256, 1, 1),
    (2, 3, 7, 2, 2),
    (3, 5, 6, 1, 2),
    (9, 17, 13, 3, 2),
    (16, 8, 16, 1, 1),
    (31, 33, 40, 2, 2),
    (70, 20, 35, 2, 3),
    (5, 1536, 24, 1, 2),
    (4, 6, 9, 0, 2),
    (0, 6, 9, 2, 2),
    (7, 6, 9, 2, 0),
]


@pytest.mark.native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_native_agrees_with_the_reference_in_float64(cpu_isa_bf16, size, dtype):
    arguments = problem(*size, dtype)
    x_end, stats = on_cpu(arguments)
    assert x_end.dtype == dtype and stats.dtype == torch.promote_types(dtype, torch.float32)
    assert_close((x_end, stats), reference.token_mlp_loop(*double(arguments)), TOLERANCE[dtype])


@pytest.mark.native
@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_native_mixes_dtypes_as_the_reference_does(cpu_isa_bf16, dtype, weights):
    """Inputs of products are rounded to the dtype of the weights, and nothing else is."""
    arguments = problem(11, 10, 12, 2, 1, dtype, weights)
    expected = reference.token_mlp_loop(*arguments)
    found = on_cpu(arguments)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    # The reference rounds what comes out of a product too: that is one more rounding, not more.
    tolerance = max(TOLERANCE[dtype], TOLERANCE[weights])
    assert_close(found, [t.double() for t in expected], tolerance)


@pytest.mark.native
@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16])
def test_native_levels_side_by_side_are_those_one_by_one(cpu_isa_bf16, weights):
    """Evaluations that leave x run side by side where rows are few. Bit for bit the same, one at a
    time, in a batch of many, and in a loop of several levels that does change x in the end."""
    dtype = torch.promote_types(weights, torch.float32)
    x, packed, bias, table = problem(60, 13, 22, 2, 5, dtype, weights)
    table[:, 1], table[:, 2] = 1, 0
    x_end, stats = on_cpu((x, packed, bias, table))
    assert torch.equal(x_end, x)
    for count in (1, 2, 3, 4, 7, 13, 15, 16, 33):
        for begin in (0, 60 - count):
            rows = slice(begin, begin + count)
            some = on_cpu((x[rows], packed, bias, table))
            assert torch.equal(some[0], x[rows]) and torch.equal(some[1], stats[rows])
    wide = torch.stack([x, -x], dim=2).flatten(1)  # strides of 2, and of 26
    for strided in (wide[:3, ::2], torch.cat([x, x], dim=1)[:3, :13]):
        assert torch.equal(on_cpu((strided, packed, bias, table))[1], stats[:3])
    same = on_cpu((x[:1].expand(7, -1), packed, bias, table))
    assert torch.equal(same[1], stats[:1].expand(7, -1))
    if dtype == torch.float32:
        for narrow in (torch.bfloat16, torch.float16):
            many = on_cpu((x.to(narrow), packed, bias, table))
            few = on_cpu((x[:3].to(narrow), packed, bias, table))
            assert few[0].dtype == narrow and torch.equal(few[0], x[:3].to(narrow))
            assert torch.equal(few[1], many[1][:3])
    for level in range(5):
        one = on_cpu((x[:3], packed, bias[level : level + 1], table[level : level + 1]))
        assert torch.equal(one[1][:, 0], stats[:3, level])
    table[4, 1] = 0.5
    changed = on_cpu((x[:3], packed, bias, table))
    assert torch.equal(changed[0], x[:3] * 0.5) and torch.equal(changed[1], stats[:3])


@pytest.mark.native
@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16])
def test_native_levels_after_one_that_is_not_finite(cpu_isa_bf16, weights):
    """0 times infinity is NaN, which a loop hands on to the levels after it: however few rows."""
    dtype = torch.promote_types(weights, torch.float32)
    x, packed, bias, table = problem(40, 6, 10, 2, 4, dtype, weights)
    table[:, 1], table[:, 2] = 1, 0
    bias[1, :, 3] = float("inf")
    x_end, stats = on_cpu((x, packed, bias, table))
    assert x_end.isnan().all() and stats[:, 0].isfinite().all() and stats[:, 1:].isnan().all()
    for count in (1, 3, 15):
        some = on_cpu((x[:count], packed, bias, table))
        assert some[0].isnan().all()
        assert torch.equal(some[1].nan_to_num(), stats[:count].nan_to_num())


@pytest.mark.native
def test_inputs_of_products_are_rounded_to_the_weights(cpu_isa_bf16):
    """With weights that are powers of two on a diagonal, rounding shows: W_out = I, no blocks."""
    width = 16
    eye = torch.eye(width, dtype=torch.bfloat16)
    zero = torch.zeros(width, dtype=torch.bfloat16)
    none = torch.zeros(0, width, width, dtype=torch.bfloat16)
    weights = ops.PackedTokenMLP(eye, zero, none, none, none[:, 0], eye, zero)
    x = torch.randn(5, width)
    table = torch.tensor([[0.7, 0.0, 1.0, 0.0, 1.0]])
    found, _ = on_cpu((x, weights, torch.zeros(1, 0, width), table))
    h = (torch.tensor(0.7) * x).bfloat16().float()
    expected = torch.nn.functional.silu(torch.nn.functional.layer_norm(h, (width,))).bfloat16()
    torch.testing.assert_close(found, expected.float(), rtol=4e-3, atol=0)
    assert torch.equal(found, found.bfloat16().float())


@pytest.mark.native
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 80),
    d=st.integers(1, 40),
    width=st.integers(1, 40),
    blocks=st.integers(0, 3),
    steps=st.integers(0, 3),
)
def test_native_agrees_for_any_size(m, d, width, blocks, steps):
    arguments = problem(m, d, width, blocks, steps)
    # LayerNorm over one or two features is a step function: it magnifies any rounding.
    tolerance = 1e-10 if width > 2 else 1e-6
    assert_close(on_cpu(arguments), reference.token_mlp_loop(*arguments), tolerance)


@pytest.mark.native
@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16])
def test_native_result_of_a_token_is_its_own(cpu_isa_bf16, weights):
    """Bit for bit, however many others there are: one, a few, a panel, a tile."""
    dtype = torch.promote_types(weights, torch.float32)
    x, *rest = problem(71, 13, 22, 2, 2, dtype, weights)
    x_end, stats = on_cpu((x, *rest))
    for count in range(1, 41):
        for begin in (0, 71 - count):
            some = on_cpu((x[begin : begin + count], *rest))
            assert torch.equal(some[0], x_end[begin : begin + count])
            assert torch.equal(some[1], stats[begin : begin + count])


@pytest.mark.native
@pytest.mark.parametrize("count", [7, 20, 41, 80, 300])
def test_native_bits_do_not_depend_on_threads(count, by_threads):
    arguments = problem(count, 13, 256, 2, 2, torch.float32)  # enough work for several threads
    by_threads(lambda: on_cpu(arguments))


@pytest.mark.native
@pytest.mark.parametrize("of_weights", [torch.float64, torch.bfloat16])
def test_native_takes_any_strides(cpu_isa_bf16, of_weights):
    dtype = torch.promote_types(of_weights, torch.float32)
    x, weights, bias, table = problem(12, 10, 9, 2, 3, dtype, of_weights)
    expected = on_cpu((x, weights, bias, table))

    def strided(t):
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]

    weights = ops.PackedTokenMLP(*(strided(w) for w in weights))
    for tokens in (strided(x), x.t().contiguous().t(), torch.cat([x, x], 1)[:, :10]):
        found = on_cpu((tokens, weights, strided(bias), strided(table)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    expanded = x[:1].expand(12, 10), bias[:, :1].expand_as(bias), table[:1].expand_as(table)
    found = on_cpu((expanded[0], weights, *expanded[1:]))
    row, bias, table = (t.contiguous() for t in expanded)
    expected = on_cpu((row, weights, bias, table))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_laid_out_weights_are_the_same_weights(dtype):
    x, weights, bias, table = problem(75, 13, 22, 2, 2, torch.float32, dtype)
    laid_out = token_mlp.laid_out(weights)
    assert all(torch.equal(a, b) for a, b in zip(laid_out, weights, strict=True))
    by_rows = dtype == torch.bfloat16 and native.cpu_isa() == "amx"
    for w in (laid_out.W_in, laid_out.W1, laid_out.W2, laid_out.W_out):
        assert (w if by_rows else w.mT).is_contiguous()
    found = ops.token_mlp_loop(x, laid_out, bias, table)
    expected = ops.token_mlp_loop(x, weights, bias, table)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.native
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_native_writes_all_of_its_outputs(cpu_isa_bf16, weights, written):
    for size in SIZES:
        arguments = problem(*size, torch.float32, weights)
        x_end, stats = on_cpu(arguments)
        assert written(x_end) and written(stats)
        assert x_end.data_ptr() != arguments[0].data_ptr() or x_end.numel() == 0


@pytest.mark.native
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 5])
def test_native_hands_nan_on_and_keeps_it_to_its_token(cpu_isa_bf16, m, weights):
    x, *rest = problem(m, 10, 9, 2, 2, torch.float32, weights)
    x[0, 3] = torch.nan
    x_end, stats = on_cpu((x, *rest))
    assert x_end[0].isnan().all() and stats[0].isnan().all()
    assert torch.isfinite(x_end[1:]).all() and torch.isfinite(stats[1:]).all()


@pytest.mark.native
@pytest.mark.parametrize("size", SIZES)
def test_native_dot_products_are_those_of_widened_weights(cpu_isa_bf16, size):
    """Closer than to a reference, whose roundings to bfloat16 fall elsewhere."""
    x, weights, bias, table = problem(*size, torch.float32, torch.bfloat16)
    found = on_cpu((x, weights, bias, table))
    before = native.cpu_isa()
    native.select_cpu_isa("default")
    try:  # the library's own, whatever serves the processor in this test
        expected = torch.ops.diffad_fast.token_mlp_loop.default(x, *weights, bias, table)
    finally:
        native.select_cpu_isa(before)
    assert_close(found, [t.double() for t in expected], 1e-3)


@pytest.mark.native
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_native_reads_nothing_around_the_weights(cpu_isa_bf16, weights, end, fenced):
    """Sanitizers do not see loads with masks."""
    for size in [(1, 5, 33, 1, 2), (3, 17, 48, 2, 1), (13, 31, 15, 1, 2), (40, 64, 65, 1, 1)]:
        x, packed, bias, table = problem(*size, torch.float32, weights)
        packed = token_mlp.laid_out(packed)
        expected = on_cpu((x, packed, bias, table))
        packed = ops.PackedTokenMLP(*(fenced(w, end) for w in packed))
        found = on_cpu((fenced(x, end), packed, fenced(bias, end), fenced(table, end)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.native
def test_native_gradients():
    x, weights, bias, table = problem(3, 4, 5, 2, 2)
    leaves = [t.requires_grad_() for t in (x, *weights, bias, table)]
    operator = torch.ops.diffad_fast.token_mlp_loop
    assert torch.autograd.gradcheck(operator, leaves)
    # One gradient, without strides.
    x_end, _ = operator(*leaves)
    found = torch.autograd.grad(x_end.sum(), leaves)
    expected, _ = reference.token_mlp_loop(x, weights, bias, table)
    expected = torch.autograd.grad(expected.sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, weights, bias, table = problem(3, 4, 5, 2, 2, dtype)
    leaves = [t.requires_grad_() for t in (x, *weights, bias, table)]
    torch.library.opcheck(torch.ops.diffad_fast.token_mlp_loop.default, leaves)


@pytest.mark.native
@pytest.mark.parametrize("grad", [False, True])
def test_compiles(grad):
    x, weights, bias, table = problem(6, 4, 5, 2, 2)
    if grad:
        x.requires_grad_()
        weights.W1.requires_grad_()
    compiled = torch.compile(ops.token_mlp_loop, fullgraph=True, backend="aot_eager")
    found = compiled(x, weights, bias, table)
    expected = ops.token_mlp_loop(x, weights, bias, table)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if grad:
        gradients = [
            torch.autograd.grad(sum(t.square().sum() for t in result), (x, weights.W1))
            for result in (found, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


@pytest.mark.native
@pytest.mark.parametrize("argument", range(10))
def test_native_refuses_what_does_not_fit(argument):
    """A direct call, without Python's checks: no shape reads memory that is not its own."""
    x, weights, bias, table = problem(3, 4, 5, 2, 2)
    arguments = [x, *weights, bias, table]
    arguments[argument] = arguments[argument].flatten()[:3]
    with pytest.raises(RuntimeError, match="token_mlp_loop"):
        torch.ops.diffad_fast.token_mlp_loop(*arguments)
    arguments[argument] = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="token_mlp_loop"):
        torch.ops.diffad_fast.token_mlp_loop(*arguments)


# ------------------------------------------------------------------------- CUDA


@pytest.mark.parametrize("name", ["b_in", "b2"])
def test_cuda_refuses_biases_at_odd_addresses(cuda, name):
    """It reads two at once; an access at another address would end the use of the device."""
    x, weights, bias, table = problem(20, 64, 128, 2, 3, torch.float32, torch.bfloat16)
    weights = weights._replace(**{k: v.to(cuda) for k, v in weights._asdict().items()})
    usual = getattr(weights, name)
    moved = usual.new_zeros(usual.numel() + 1)[1:].view_as(usual).copy_(usual)
    weights = weights._replace(**{name: moved})
    with pytest.raises(RuntimeError, match="biases of 4; clone them"):
        ops.token_mlp_loop(x.to(cuda), weights, bias.to(cuda), table.to(cuda))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize(
    "m, d, blocks, steps",
    [
        (150, 70, 1, 2),  # few tokens, the last tile short; rounds of the grid
        (1, 1, 2, 3),
        (300, 131, 0, 2),  # many for the emulated device; more than two stages of D
        pytest.param(1000, 64, 2, 3, marks=pytest.mark.gpu),
        pytest.param(70000, 33, 2, 3, marks=pytest.mark.gpu),
        pytest.param(50, 1536, 2, 3, marks=pytest.mark.gpu),
    ],
)
def test_cuda_is_the_reference(cuda, width, m, d, blocks, steps, dtype):
    """Fragments, stages, swizzles and tails of the kernel."""
    x, weights, bias, table = problem(m, d, width, blocks, steps, torch.float32, torch.bfloat16)
    arguments = (x.to(dtype), weights, bias, table)
    moved = ops.PackedTokenMLP(*(w.to(cuda) for w in weights))
    found = ops.token_mlp_loop(arguments[0].to(cuda), moved, bias.to(cuda), table.to(cuda))
    found = [t.cpu() for t in found]
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert_close(found, reference.token_mlp_loop(*double(arguments)), 3e-2)
    # Much nearer to what rounds in the same places.
    if cuda == "cpu" and native.loaded() and dtype == torch.float32:
        assert_close(found, [t.double() for t in on_cpu(arguments)], 4e-3)


@pytest.mark.parametrize(
    "width, dtype, x_dtype, why",
    [
        (128, torch.bfloat16, torch.float32, None),
        (256, torch.bfloat16, torch.float16, None),
        (64, torch.bfloat16, torch.float32, "of width 128 and 256, not torch.bfloat16 of width 64"),
        (128, torch.float32, torch.float32, "bfloat16 weights .*, not torch.float32 of width 128"),
        (128, torch.bfloat16, torch.float64, "in float32, not float64"),
    ],
)
def test_which_weights_the_cuda_kernel_serves(monkeypatch, width, dtype, x_dtype, why):
    arguments = problem(3, 4, width, 1, 1, x_dtype, dtype)
    monkeypatch.setitem(OPERATOR.implementations, "cuda", None)
    assert OPERATOR.backend("cuda", *arguments) == ("reference" if why else "cuda")  # auto
    monkeypatch.setattr(dispatch, "selected", lambda: "cuda")
    if why:
        with pytest.raises(BackendError, match=why):
            OPERATOR.backend("cuda", *arguments)
    else:
        assert OPERATOR.backend("cuda", *arguments) == "cuda"
