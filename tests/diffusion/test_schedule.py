import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import diffad_fast as daf
from diffad_fast import ops
from diffad_fast.diffusion import NoiseSchedule
from diffad_fast.errors import InputError

DIFFUSERS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_equals_diffusers(name):
    start, end = BETAS[name]
    theirs = DDIMScheduler(1000, beta_start=start, beta_end=end, beta_schedule=DIFFUSERS[name])
    ours = NoiseSchedule(name, 1000).alphas_cumprod
    # Theirs is a float32 product of 1000 factors.
    np.testing.assert_allclose(ours, theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-9)


def test_sigma_and_timestep():
    schedule = NoiseSchedule("cosine", 1000)
    assert (schedule.log_sigma.diff() > 0).all()
    t = schedule.timestep(1.0)
    # At sigma = 1 signal and noise have equal power.
    assert schedule.alphas_cumprod[t] == pytest.approx(0.5, abs=2e-3)
    for t in (0, 123, 999):
        assert schedule.timestep(math.exp(schedule.log_sigma[t])) == t


def test_levels_that_a_schedule_does_not_have():
    """A short linear schedule ends at sigma = 1.3, where the default asks for 3."""
    schedule = NoiseSchedule("linear", 100)
    low, high = schedule.range
    alpha = schedule.alphas_cumprod[[0, -1]]
    assert [low, high] == pytest.approx(((1 - alpha) / alpha).sqrt().tolist())
    assert schedule.timestep(high * 1.09) == 99
    for sigma in (high * 1.11, low / 1.11):
        with pytest.raises(InputError, match="noise levels from 0.01 to 1.3.*start_sigma"):
            schedule.timestep(sigma)
    with pytest.raises(InputError, match="not 3: choose start_sigma"):
        daf.Detector(image_size=32, denoiser="unet-tiny", schedule="linear", diffusion_steps=100)
    detector = daf.Detector(
        image_size=32, denoiser="unet-tiny", schedule="linear", diffusion_steps=100,
        start_sigma=1.0, sigmas=(0.6, 4.0), inversion_sigmas=(0.1, 1.2), train_steps=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="sigmas asks the denoiser at the noise levels 4, and"):
        detector.fit(torch.rand(12, 1, 32, 32))


@pytest.mark.parametrize("start, steps", [(0, 1), (499, 1), (499, 7), (499, 500), (999, 50)])
def test_reverse_steps_chain_to_the_clean_end(start, steps):
    schedule = NoiseSchedule("linear", 1000)
    table = schedule.reverse_steps(start, steps)
    assert len(table) == steps
    assert table[0].alpha_t == float(schedule.alphas_cumprod[start])
    assert table[-1].alpha_s == 1.0
    for step, following in zip(table[:-1], table[1:], strict=True):
        assert step.alpha_s == following.alpha_t > step.alpha_t
    for step in table:
        assert math.exp(2 * step.log_sigma) == pytest.approx((1 - step.alpha_t) / step.alpha_t)


def test_inversion_steps_are_uniform_in_log_sigma():
    table = NoiseSchedule.inversion_steps(0.02, 20.0, 3)
    sigmas = [math.sqrt((1 - a) / a) for a in (table[0].alpha_t, *(s.alpha_s for s in table))]
    np.testing.assert_allclose(sigmas, [0.02, 0.2, 2.0, 20.0], rtol=1e-12)
    np.testing.assert_allclose([math.exp(s.log_sigma) for s in table], sigmas[:3], rtol=1e-12)
    for step, following in zip(table[:-1], table[1:], strict=True):
        assert following.alpha_t == step.alpha_s < step.alpha_t
    for bad in ((0.0, 1.0, 3), (2.0, 1.0, 3), (0.1, 1.0, 0), (0.1, math.inf, 1)):
        with pytest.raises(InputError, match="sigma_min < sigma_max"):
            NoiseSchedule.inversion_steps(*bad)


def test_more_steps_than_levels():
    with pytest.raises(InputError, match="from 1 to 10"):
        NoiseSchedule("linear").reverse_steps(9, 11)


def test_unknown_schedule():
    with pytest.raises(InputError, match="'sigmoid'"):
        NoiseSchedule("sigmoid")


def test_training_weights_agree_between_predictions():
    """The weighted loss of x0 is the same number, whichever quantity the network predicts."""
    alphas = NoiseSchedule("cosine").alphas_cumprod
    torch.manual_seed(0)
    t = torch.tensor([5, 300, 600, 900])
    x0, noise, wrong = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    a = alphas[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    estimates = {  # what each network says when its estimate of x0 is `wrong`
        "sample": wrong,
        "epsilon": (x_t - a.sqrt() * wrong) / (1 - a).sqrt(),
        "v_prediction": (a.sqrt() * x_t - wrong) / (1 - a).sqrt(),
    }
    losses = []
    for kind, output in estimates.items():
        got, target, weight = ops.noised_target(x0, t, noise, alphas, kind)
        torch.testing.assert_close(got, x_t, rtol=0, atol=1e-14)
        error = (output - target).square().mean(dim=(1, 2, 3))
        losses.append(error * weight.double())
    expected = (wrong - x0).square().mean(dim=(1, 2, 3)) * (a.view(-1) / (1 - a.view(-1))).clamp(
        max=5
    )
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
