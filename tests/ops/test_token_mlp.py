"""token_mlp_loop against a module with nn.LayerNorm, and a DDIM loop written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffad_fast import ops

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


def test_no_steps_and_no_tokens(model):
    weights, bias = model.packed()
    x_end, stats = ops.token_mlp_loop(tokens(), weights, bias[:0], torch.zeros(0, 5))
    assert torch.equal(x_end, tokens()) and stats.shape == (11, 0)
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
def test_bad_arguments(model, change, error, message):
    weights, bias = model.packed()
    arguments = {"x": tokens(), "weights": weights, "step_bias": bias, "table": torch.zeros(4, 5)}
    change(arguments)
    with pytest.raises(error, match=message):
        ops.token_mlp_loop(**arguments)
