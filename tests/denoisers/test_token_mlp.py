import pytest
import torch

from diffad_fast import ops, reference
from diffad_fast.denoisers.token_mlp import TokenMLP, ddim_row, residual_row
from diffad_fast.diffusion import NoiseSchedule


def filled(dim=7, width=32, blocks=2, dtype=torch.float64):
    """No parameter at its initial zero or one, behind which an error could hide."""
    mlp = TokenMLP(dim, width, blocks).to(dtype)
    with torch.no_grad():
        for p in mlp.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return mlp


@torch.no_grad()
def test_packed_weights_are_the_module():
    mlp, x, sigma = filled(), torch.randn(5, 7, dtype=torch.float64), torch.tensor([0.3, 2.0])
    # Rows (c_in 1, A 0, Bm 1): the end of one step is the prediction itself.
    for level in sigma.double().log():
        bias = mlp.step_bias(level[None])
        end, _ = reference.token_mlp_loop(
            x, mlp.pack(), bias, torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
        )
        assert torch.allclose(end, mlp(x, level.expand(5)), rtol=0, atol=1e-12)


def test_features_are_in_front_of_the_last_layer():
    mlp, x, level = filled(), torch.randn(4, 7, dtype=torch.float64), torch.zeros(4).double()
    features = mlp.features(x, level)
    assert torch.allclose(features.mean(dim=1), torch.zeros(4).double(), atol=1e-12)
    expected = mlp.linear_out(torch.nn.functional.silu(features))
    assert torch.allclose(mlp(x, level), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_residual_row(sigma):
    """stats = mean (D(x, sigma) - x)^2 with D the clean estimate of ops.ddim_step."""
    mlp, x = filled(), torch.randn(6, 7, dtype=torch.float64)
    level = torch.tensor([sigma], dtype=torch.float64).log()
    table = torch.tensor([residual_row(sigma)], dtype=torch.float64)
    end, stats = reference.token_mlp_loop(x, mlp.pack(), mlp.step_bias(level), table)
    assert torch.equal(end, x)
    alpha = 1 / (1 + sigma**2)
    x_in = x * alpha**0.5
    clean = reference.ddim_step(x_in, mlp(x_in, level.expand(6)), alpha, 1.0, "v_prediction")
    assert torch.allclose(stats[:, 0], (clean - x).square().mean(dim=1), rtol=1e-9, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("inverts", [False, True])
def test_ddim_rows_are_ddim_steps(inverts):
    schedule = NoiseSchedule()
    steps = schedule.inversion_steps(0.1, 10.0, 3) if inverts else schedule.reverse_steps(700, 4)
    mlp, x = filled(), torch.randn(6, 7, dtype=torch.float64)
    table = torch.tensor([ddim_row(step) for step in steps], dtype=torch.float64)
    levels = torch.tensor([step.log_sigma for step in steps], dtype=torch.float64)
    end, stats = ops.token_mlp_loop(x, mlp.pack(), mlp.step_bias(levels), table)
    for i, step in enumerate(steps):
        level = torch.full((6,), step.log_sigma, dtype=torch.float64)
        x_s = reference.ddim_step(x, mlp(x, level), step.alpha_t, step.alpha_s, "v_prediction")
        way = x_s / step.alpha_s**0.5 - x / step.alpha_t**0.5
        assert torch.allclose(stats[:, i], way.square().mean(dim=1), rtol=1e-9, atol=1e-12)
        x = x_s
    assert torch.allclose(end, x, rtol=1e-9, atol=1e-9)
