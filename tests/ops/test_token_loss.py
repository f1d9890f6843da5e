"""The token MLP's loss and gradients against the reference in float64."""

import pytest
import torch

from diffad_fast import ops, reference, use_backend
from diffad_fast.errors import BackendError
from diffad_fast.ops import PackedTokenMLP


def problem(m, d, width, blocks, levels, seed=0):
    """Arguments in float64, of activations around 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    weights = PackedTokenMLP(
        normal(width, d, scale=d**-0.5),
        normal(width),
        normal(blocks, width, width, scale=width**-0.5),
        normal(blocks, width, width, scale=width**-0.5),
        normal(blocks, width),
        normal(d, width, scale=width**-0.5),
        normal(d),
    )
    return normal(m, d), normal(m, d), normal(m).abs(), weights, normal(levels, blocks, width)


def in_float32(arguments):
    x, target, weight, weights, bias = arguments
    single = PackedTokenMLP(*(w.float() for w in weights))
    return x.float(), target.float(), weight.float(), single, bias.float()


def loss_and_gradients(function, arguments):
    x, target, weight, weights, bias = arguments
    leaves = [t.detach().clone().requires_grad_() for t in (*weights, bias)]
    loss = function(x, target, weight, PackedTokenMLP(*leaves[:-1]), leaves[-1])
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("levels", [1, 3])
def test_the_reference_is_the_loop_level_by_level(levels):
    """token_mlp_loop with A = 1, Bm = 0, p = 0, q = 1 gives mean_j m_j^2 at a level."""
    x, _, weight, weights, bias = problem(6, 4, 5, 2, levels)
    loss = reference.token_mlp_loss(x, torch.zeros_like(x), weight, weights, bias)
    table = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]] * levels, dtype=torch.float64)
    _, squares = reference.token_mlp_loop(x, weights, bias, table)
    own = squares[torch.arange(6), torch.arange(6) // (6 // levels)]
    torch.testing.assert_close(loss, (own * weight).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "m, d, width, blocks, levels",
    [
        (1, 1, 16, 1, 1),
        (12, 5, 16, 2, 4),
        (40, 19, 48, 1, 40),
        (2300, 7, 32, 3, 10),  # levels of eight groups, the last chunk short
        (1200, 3, 16, 1, 1),  # a level that is larger than a chunk
        (603, 9, 16, 2, 201),  # groups of ten levels, the last one short
        (64, 33, 256, 3, 8),
        (20, 300, 16, 1, 2),  # more numbers in a token than units in a layer
    ],
)
@pytest.mark.native
def test_native_loss_and_gradients(cpu_isa, m, d, width, blocks, levels):
    arguments = problem(m, d, width, blocks, levels)
    loss, gradients = loss_and_gradients(reference.token_mlp_loss, arguments)
    with use_backend("cpu"):
        found, found_gradients = loss_and_gradients(ops.token_mlp_loss, in_float32(arguments))
    torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=0)
    for name, a, b in zip(
        (*PackedTokenMLP._fields, "step_bias"), found_gradients, gradients, strict=True
    ):
        # A sum of m products of rounded factors of about the largest gradient's size.
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < 3e-6, (name, float(error))


@pytest.mark.native
def test_the_loss_alone_and_scaled_gradients():
    arguments = in_float32(problem(12, 5, 16, 2, 4))
    loss, gradients = loss_and_gradients(ops.token_mlp_loss, arguments)
    assert torch.equal(ops.token_mlp_loss(*arguments), loss)
    leaf = arguments[3].W_in.clone().requires_grad_()
    with torch.no_grad():
        alone = ops.token_mlp_loss(*arguments[:3], arguments[3]._replace(W_in=leaf), arguments[4])
    assert torch.equal(alone, loss) and not alone.requires_grad
    _, scaled = loss_and_gradients(lambda *a: 3 * ops.token_mlp_loss(*a), arguments)
    torch.testing.assert_close(scaled, tuple(3 * g for g in gradients), rtol=1e-6, atol=0)
    empty = torch.ops.diffad_fast.token_mlp_loss(
        *arguments[:3], list(arguments[3]), arguments[4], False
    )
    assert empty[1] == []


@pytest.mark.native
@pytest.mark.parametrize(
    "m, d, width, blocks, levels",
    [(96, 9, 32, 2, 8), (512, 20, 128, 2, 32), (1300, 7, 64, 3, 10), (300, 70, 48, 1, 1)],
)
def test_bits_do_not_depend_on_threads(m, d, width, blocks, levels, by_threads):
    arguments = in_float32(problem(m, d, width, blocks, levels))
    by_threads(lambda: loss_and_gradients(ops.token_mlp_loss, arguments))


@pytest.mark.native
def test_nan_reaches_the_loss():
    arguments = in_float32(problem(12, 5, 16, 2, 4))
    arguments[0][3, 2] = torch.nan
    assert ops.token_mlp_loss(*arguments).isnan()


@pytest.mark.native
def test_what_the_cpu_backend_does_not_serve():
    """auto takes the reference instead; asked for by name, it says why."""
    double = problem(12, 5, 16, 2, 4)
    narrow = in_float32(problem(12, 5, 24, 2, 4))
    through_x = in_float32(problem(12, 5, 16, 2, 4))
    through_x[0].requires_grad_()
    for arguments, why in (
        (double, "float32"), (narrow, "multiples of 16"), (through_x, "no gradients for x"),
    ):  # fmt: skip
        expected = reference.token_mlp_loss(*arguments)
        assert torch.equal(ops.token_mlp_loss(*arguments), expected)
        with use_backend("cpu"), pytest.raises(BackendError, match=why):
            ops.token_mlp_loss(*arguments)


def test_wrong_arguments():
    x, target, weight, weights, bias = problem(12, 5, 16, 2, 4)
    with pytest.raises(ValueError, match="12 tokens and step_bias 5 levels"):
        ops.token_mlp_loss(x, target, weight, weights, torch.zeros(5, 2, 16).double())
    with pytest.raises(ValueError, match="target must have shape"):
        ops.token_mlp_loss(x, target[:3], weight, weights, bias)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.token_mlp_loss(x, target, weight[:3], weights, bias)
    with pytest.raises(ValueError, match="W2 must have shape"):
        ops.token_mlp_loss(x, target, weight, weights._replace(W2=weights.W1[:1]), bias)
    with pytest.raises(TypeError, match="PackedTokenMLP"):
        ops.token_mlp_loss(x, target, weight, tuple(weights), bias)


@pytest.mark.native
@pytest.mark.parametrize("argument", range(11))
def test_native_refuses_what_does_not_fit(argument):
    """A direct call, without Python's checks: no shape reads memory that is not its own."""
    x, target, weight, weights, bias = in_float32(problem(12, 5, 16, 2, 4))
    arguments = [x, target, weight, *weights, bias]
    arguments[argument] = arguments[argument].flatten()[:3]
    with pytest.raises(RuntimeError, match="token_mlp_loss"):
        torch.ops.diffad_fast.token_mlp_loss(*arguments[:3], arguments[3:10], arguments[10], True)
