"""Analytic check of the whole forward and reverse process: for Gaussian data the best denoiser is
known in closed form, and deterministic DDIM is linear in its input."""

import math

import pytest
import torch

from diffad_fast.diffusion import NoiseSchedule, reconstruct

VARIANCE = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)[None, :, None, None]


def exact_denoiser(kind):
    """E[target | x_t] for data N(0, VARIANCE): x0 = c x_t with c = sqrt(a) v / (a v + 1 - a)."""

    def denoise(x_t, log_sigma):
        a = 1 / (1 + torch.exp(2 * log_sigma.double())).view(-1, 1, 1, 1)
        x0 = a.sqrt() * VARIANCE / (a * VARIANCE + 1 - a) * x_t
        noise = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
        return {
            "sample": x0,
            "epsilon": noise,
            "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0,
        }[kind]

    return denoise


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_gaussian_data_comes_back_gaussian(kind):
    """The probability flow of exact DDIM maps the marginal at sigma to that of the data: a standard
    deviation sqrt(a v + 1 - a) at the start becomes sqrt(v), per coordinate and linearly."""
    schedule = NoiseSchedule("cosine")
    torch.manual_seed(0)
    x0 = torch.randn(3, 3, 4, 4, dtype=torch.float64) * VARIANCE.sqrt()
    start = schedule.timestep(1.0)
    table = schedule.reverse_steps(start, start + 1)
    seen = []

    def denoiser(x_t, log_sigma):
        seen.append(x_t)
        return exact_denoiser(kind)(x_t, log_sigma)

    x_hat = reconstruct(denoiser, x0, table, seed=1, prediction_type=kind)
    a = table[0].alpha_t
    expected = seen[0] * (VARIANCE / (a * VARIANCE + 1 - a)).sqrt()
    # Some 500 steps of a first-order solver.
    torch.testing.assert_close(x_hat, expected, rtol=5e-3, atol=0)


def test_forward_part_and_the_same_noise_for_every_sample():
    table = NoiseSchedule("linear").reverse_steps(400, 1)
    x0 = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    seen = {}

    def denoiser(x_t, log_sigma):
        seen.update(x_t=x_t, log_sigma=log_sigma)
        return torch.zeros_like(x_t)

    reconstruct(denoiser, x0, table, seed=3)
    a = table[0].alpha_t
    noise = (seen["x_t"] - math.sqrt(a) * x0) / math.sqrt(1 - a)
    torch.testing.assert_close(noise[0], noise[1])
    assert abs(float(noise[0].mean())) < 0.5 and 0.6 < float(noise[0].std()) < 1.4
    assert seen["log_sigma"].shape == (2,)


def test_guidance_pulls_towards_the_input():
    table = NoiseSchedule("linear").reverse_steps(400, 4)
    x0 = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    distance = [
        (reconstruct(exact_denoiser("epsilon"), x0, table, seed=0, prediction_type="epsilon",
                     guidance=w) - x0).abs().mean()
        for w in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    assert distance[0] > distance[1] > distance[2]


def test_eta_adds_noise_that_repeats():
    table = NoiseSchedule("linear").reverse_steps(400, 4)
    x0 = torch.randn(1, 3, 4, 4, dtype=torch.float64)

    def run(eta, seed=0):
        denoiser = exact_denoiser("v_prediction")
        return reconstruct(denoiser, x0, table, seed=seed, eta=eta)

    assert torch.equal(run(1.0), run(1.0))
    assert not torch.allclose(run(1.0), run(0.0))
    assert not torch.allclose(run(1.0), run(1.0, seed=1))
