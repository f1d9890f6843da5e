"""Operators under what PyTorch does with functions: forward-mode differentiation, torch.func,
second derivatives, and traces with tensors that hold nothing."""

from __future__ import annotations

import pytest
import pywt
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import diffad_fast as daf
from diffad_fast import ops, reference
from diffad_fast.errors import BackendError
from diffad_fast.representations import LogMel

LAST = torch.channels_last


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ALPHAS = torch.linspace(0.99, 0.05, 10).double()
STEPS = torch.tensor([2, 7])
FUNCTIONS = {
    "dwt2d": lambda x: ops.dwt2d(x, "db2")[1],
    "haar_pack": lambda x: ops.haar_pack(x, 2),
    "group_norm_silu": lambda x: ops.group_norm_silu(x, 4),
    "conv3x3": lambda x: ops.conv3x3(x, random(16, 16, 3, 3, seed=1)),
    "q_sample": lambda x: ops.q_sample(x, STEPS, random(2, 16, 8, 8, seed=2), ALPHAS),
    "ddim_step": lambda x: ops.ddim_step(x, 0.3 * x.sin(), 0.3, 0.6),
    "anomaly_map": lambda x: ops.anomaly_map(x, x.sin())[0],
    "wavelet_attention": lambda x: ops.wavelet_attention(*[x.view(2, 1, 16, 8, 8)] * 3),
    "weighted_mse": lambda x: ops.weighted_mse(x, x.sin(), torch.tensor([1.0, 2.0])),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_finite_differences(name):
    f = FUNCTIONS[name]
    x, direction = random(2, 16, 8, 8), random(2, 16, 8, 8, seed=3)
    if name in ("conv3x3", "group_norm_silu"):
        x, direction = (t.to(memory_format=LAST) for t in (x, direction))
    _, tangent = torch.func.jvp(f, (x,), (direction,))
    step = 1e-2
    expected = (f(x + step * direction) - f(x - step * direction)) / (2 * step)
    assert (tangent - expected).abs().max() < 5e-3 * expected.abs().max()
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(x, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


@pytest.mark.native
def test_an_ensemble_of_weights_and_a_backend_by_name():
    x, weights = random(1, 16, 8, 8).to(memory_format=LAST), random(3, 16, 16, 3, 3)
    found = torch.func.vmap(lambda w: ops.conv3x3(x, w))(weights)
    expected = torch.stack([F.conv2d(x.double(), w.double(), padding=1) for w in weights])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    gradient = torch.func.grad(lambda w: ops.conv3x3(x, w).square().sum())(weights[0])
    w = weights[0].double().requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(x.double(), w, padding=1).square().sum(), w)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-3)
    with daf.use_backend("cpu"), pytest.raises(BackendError, match="torch.func"):
        torch.func.vmap(lambda w: ops.conv3x3(x, w))(weights)


@pytest.mark.parametrize("options", [{}, {"clip": 0.5}, {"eta": 0.5}])
def test_second_derivatives_of_a_step(backend, options):
    def penalised(step):
        x, y = (random(2, 3, 4, 4, seed=s).double().requires_grad_() for s in (0, 1))
        noise = random(2, 3, 4, 4, seed=2).double()
        value = step(x, y.tanh(), 0.3, 0.6, noise=noise, **options).sin().sum()
        grads = torch.autograd.grad(value, (x, y), create_graph=True)
        return torch.autograd.grad(value + sum(g.square().sum() for g in grads), (x, y))

    for ours, theirs in zip(penalised(ops.ddim_step), penalised(reference.ddim_step), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_gradient_that_can_be_differentiated_is_the_same_gradient(backend, prediction):
    """Of a sampler, where the network's output is computed from the state."""
    x, w = random(2, 3, 4, 4).double().requires_grad_(), torch.tensor(0.5).double()
    w.requires_grad_()

    def sampled(step):
        state = x
        for alpha in (0.2, 0.4, 0.6):
            state = step(state, (w * state).tanh(), alpha, alpha + 0.2, prediction)
        return state.square().sum()

    def penalty(step):
        grads = torch.autograd.grad(sampled(step), (x, w), create_graph=True)
        return *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w))

    torch.testing.assert_close(penalty(ops.ddim_step), penalty(reference.ddim_step))
    plain = torch.autograd.grad(sampled(ops.ddim_step), (x, w))
    torch.testing.assert_close(penalty(ops.ddim_step)[:2], plain)


STANDARDS = 0.5 + random(2, 256).abs()
MAPPED = {
    "group_norm_silu": lambda x: ops.group_norm_silu(x, 4),
    "standardised_packet": lambda x: ops.standardised_packet(x, STANDARDS[0], STANDARDS[1], 2),
    **{name: FUNCTIONS[name] for name in ("dwt2d", "haar_pack", "wavelet_attention")},
}


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_in_every_memory_format(name):
    f, x = MAPPED[name], random(3, 2, 16, 8, 8)
    expected = torch.stack([f(y) for y in x])
    torch.testing.assert_close(torch.func.vmap(f)(x), expected)
    last = x.movedim(2, -1).contiguous().movedim(-1, 2)  # of each, channels_last
    torch.testing.assert_close(torch.func.vmap(f)(last), expected)
    gradient = torch.func.vmap(torch.func.grad(lambda y: f(y).sin().sum()))(last)
    y = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(sum(f(sample).sin().sum() for sample in y), y)
    torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-5)


MLP = ops.PackedTokenMLP(
    *(random(*shape, seed=4) / 8 for shape in ((16, 8), (16,), (1, 16, 16), (1, 16, 16), (1, 16),
                                               (8, 16), (8,)))
)  # fmt: skip
STEP, BIAS = torch.tensor([[0.5, 1.0, 0.3, -0.5, -0.4]]), random(1, 1, 16)
MIXED = {
    "token_mlp_loop": lambda x: ops.token_mlp_loop(x.reshape(-1, 8), MLP, BIAS, STEP)[0],
    **{name: f for name, f in FUNCTIONS.items() if name != "conv3x3"},
    "idwt2d": lambda x: ops.idwt2d((x, x, None, x), "db2"),
    "band_energies": lambda x: ops.band_energies(x, 2, 1),
    "nearest_distances": lambda x: ops.nearest_distances(x[0, 0], x[1, 0], 2),
    "log_mel": lambda x: LogMel(64, 32, 8, 4)(x.flatten(1)),
}


@pytest.mark.parametrize("name", MIXED)
def test_autocast_changes_nothing_but_convolutions(backend, name):
    differentiable = name not in ("nearest_distances", "log_mel")  # in C++
    f, x = MIXED[name], random(2, 16, 8, 8).requires_grad_(differentiable)
    expected = f(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = f(x), f(x.detach())
    for y in found:
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0, atol=5e-7)  # bfloat16: 1e-3 and more


@pytest.mark.native
def test_what_has_no_second_derivative_says_so():
    x = random(2, 1, 4, 4, 8).requires_grad_()
    for value, name in (
        (ops.wavelet_attention(x, x, x).sum(), "wavelet_attention"),
        (ops.weighted_mse(x, x.detach() + 1, torch.ones(2)), "weighted_mse"),
    ):
        with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
            torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.parametrize("module", [ops, reference])
def test_filters_of_a_trace_serve_nobody_else(module):
    x = random(1, 1, 16, 16)
    with FakeTensorMode():
        module.dwt2d(torch.empty(1, 1, 16, 16), "coif2", "symmetric")
    assert module.dwt2d(x, "coif2", "symmetric")[0].isfinite().all()

    class Bands(torch.nn.Module):
        def forward(self, x):
            return module.dwt2d(x, "coif3", "symmetric")

    program = torch.export.export(Bands(), (x,), strict=False).module()
    for found, expected in zip(program(x), module.dwt2d(x, "coif3", "symmetric"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("level", [None, 2])
def test_first_use_of_a_wavelet_in_a_compiled_function(backend, level):
    wavelet = {("cpu", None): "sym7", ("cpu", 2): "sym6"}.get((backend, level), "sym5")

    def there_and_back(x):
        coefficients = ops.wavedec2(x, wavelet, level)
        return coefficients, ops.waverec2(coefficients, wavelet)

    x = random(1, 2, 96, 64)
    found, again = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x)
    expected = pywt.wavedec2(x.double().numpy(), wavelet, "periodization", level)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        bands = [y if isinstance(y, tuple) else (y,) for y in (ours, theirs)]
        for a, b in zip(*bands, strict=True):
            torch.testing.assert_close(a.double(), torch.from_numpy(b), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, x, rtol=1e-5, atol=1e-5)
