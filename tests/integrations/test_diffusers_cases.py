"""What diffusers' own ``DDIMSchedulerTest`` asks of a scheduler, asked of ours and of theirs.

Its package on PyPI holds no tests, so these are written anew from what each case demands; the sums
of the full loops and the variances are the figures that stand in its tests/schedulers (0.42).

    their case                                      here
    ----------------------------------------------  ------------------------------------------------
    timesteps, steps_offset, betas, schedules,      test_over_configurations, a configuration each;
    prediction_type, clip_sample, timestep_spacing, besides, a reloaded one takes the same step and
    rescale_betas_zero_snr, thresholding            ours the stock class's
    steps_offset: the timesteps themselves          test_timesteps_with_an_offset
    time_indices, inference_steps, eta              test_over_calls
    variance                                        test_variance
    full_loop_no_noise, _with_v_prediction,         test_full_loop
    _with_set_alpha_to_one, _with_no_set_alpha_to_one
    full_loop_with_noise                            test_full_loop_from_a_noised_sample
    from_save_pretrained                            test_over_calls, (1, 50, 0)
    from_pretrained, trained_betas                  test_what_is_saved_comes_back
    compatibles                                     test_compatible_schedulers
    step_shape, scheduler_outputs_equivalence       test_results_of_a_step
    scheduler_public_api, add_noise_device,         test_public_interface
    deprecated_kwargs, getattr_is_correct

``num_inference_steps_zero_raises`` belongs to versions after 0.42, whose stock class does not pass
it: ``set_timesteps`` is inherited here and will follow.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffad_fast.integrations.diffusers import FusedDDIMScheduler  # noqa: E402

STOCK = diffusers.DDIMScheduler
BASE = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02,
        "beta_schedule": "linear", "clip_sample": True}  # fmt: skip

CONFIGURATIONS = [
    *({"num_train_timesteps": n} for n in (100, 500, 1000)),
    *({"steps_offset": n} for n in (0, 1)),
    *({"beta_start": 0.0001 * 10**k, "beta_end": 0.002 * 10**k} for k in range(4)),
    *({"beta_schedule": name} for name in ("linear", "squaredcos_cap_v2")),
    *({"prediction_type": name} for name in ("epsilon", "v_prediction")),
    *({"clip_sample": flag} for flag in (True, False)),
    *({"timestep_spacing": name} for name in ("trailing", "leading")),
    *({"rescale_betas_zero_snr": flag} for flag in (True, False)),
    {"thresholding": False},
    *({"thresholding": True, "prediction_type": name, "sample_max_value": limit}
      for limit in (0.5, 1.0, 2.0) for name in ("epsilon", "v_prediction")),
]  # fmt: skip

# What changes the timesteps, not a step between given ones.
TIMES = ("num_train_timesteps", "steps_offset", "timestep_spacing")

both = pytest.mark.parametrize("kind", [STOCK, FusedDDIMScheduler])


def sample(scale=1.0):
    return scale * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ramp(*, falling=False):
    """Their deterministic sample: 0, 1/768, ... with the batch as the fastest axis."""
    values = torch.arange(4 * 3 * 8 * 8)
    values = values.flip(0) if falling else values
    return (values / len(values)).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def predicted(x, t):
    """Their model."""
    return x * t / (t + 1)


def loop(scheduler, x, timesteps):
    for t in timesteps:
        x = scheduler.step(predicted(x, t), t, x, 0.0).prev_sample
    return x


def check(config, folder, t=0, steps=50, eta=0.0, x=None, m=None):
    """One step of ours, of ours saved and loaded, and of the stock class, whose x_s this gives."""
    ours = FusedDDIMScheduler(**BASE | config)
    ours.save_config(folder)
    x = sample() if x is None else x
    m = 0.1 * x if m is None else m
    found = []
    for scheduler in (ours, FusedDDIMScheduler.from_pretrained(folder), STOCK(**BASE | config)):
        scheduler.set_timesteps(steps)
        assert scheduler.scale_model_input(x, 0) is x
        generator = torch.Generator().manual_seed(0)
        found.append(scheduler.step(m, t, x, eta=eta, generator=generator).prev_sample)
    assert float((found[0] - found[1]).abs().sum()) < 1e-5
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)
    return found[2]


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=str)
def test_over_configurations(config, tmp_path):
    """At t = 0, as theirs, where noise is a hundredth and hardly an option matters, and where all
    of them do: a fifth up the schedule, a sample that limits bite, a prediction unlike it."""
    check(config, tmp_path)
    t, x = config.get("num_train_timesteps", 1000) // 5, sample(3.0)
    found = check(config, tmp_path, t, 10, 0.5, x, 1.0 - sample().flip(0))
    usual = check({"num_train_timesteps": 5 * t}, tmp_path, t, 10, 0.5, x, 1.0 - sample().flip(0))
    if config.get("sample_max_value") == 1.0:  # the threshold then is the usual clip
        config = {"prediction_type": config["prediction_type"]}
    differs = any(STOCK(**BASE).config[k] != v for k, v in config.items() if k not in TIMES)
    assert torch.allclose(found, usual, rtol=1e-3, atol=1e-3) != differs


@pytest.mark.parametrize("t, steps, eta", [
    (1, 50, 0.0), (10, 50, 0.0), (49, 50, 0.0),
    (1, 10, 0.0), (50, 500, 0.0),
    (10, 50, 0.5), (49, 50, 1.0),
])  # fmt: skip
def test_over_calls(t, steps, eta, tmp_path):
    check({}, tmp_path, t, steps, eta)


@both
def test_timesteps_with_an_offset(kind):
    scheduler = kind(**BASE, steps_offset=1)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]


@both
def test_variance(kind):
    known = {(0, 0): 0.0, (420, 400): 0.14771, (980, 960): 0.32460, (487, 486): 0.00979,
             (999, 998): 0.02}  # fmt: skip
    scheduler = kind(**BASE)
    for pair, value in known.items():
        assert float(scheduler._get_variance(*pair)) == pytest.approx(value, abs=1e-5)


@both
@pytest.mark.parametrize("config, total, mean", [
    ({}, 172.0067, 0.223967),
    ({"prediction_type": "v_prediction"}, 52.5302, 0.0684),
    ({"set_alpha_to_one": True, "beta_start": 0.01}, 149.8295, 0.1951),
    ({"set_alpha_to_one": False, "beta_start": 0.01}, 149.0784, 0.1941),
])  # fmt: skip
def test_full_loop(kind, config, total, mean):
    scheduler = kind(**BASE | config)
    scheduler.set_timesteps(10)
    x = loop(scheduler, ramp(), scheduler.timesteps)
    assert float(x.abs().sum()) == pytest.approx(total, abs=1e-2)
    assert float(x.abs().mean()) == pytest.approx(mean, abs=1e-3)


@both
def test_full_loop_from_a_noised_sample(kind):
    scheduler = kind(**BASE)
    scheduler.set_timesteps(10)
    rest = scheduler.timesteps[8 * scheduler.order :]
    x = loop(scheduler, scheduler.add_noise(ramp(), ramp(falling=True), rest[:1]), rest)
    assert float(x.abs().sum()) == pytest.approx(354.5418, abs=1e-2)
    assert float(x.abs().mean()) == pytest.approx(0.4616, abs=1e-3)


@both
def test_what_is_saved_comes_back(kind, tmp_path):
    scheduler = kind(**BASE, trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert again.betas.tolist() == scheduler.betas.tolist()
    scheduler = kind(**BASE)
    scheduler.save_pretrained(tmp_path)
    config = dict(scheduler.config)
    del config["_use_default_values"]
    assert config == kind.from_pretrained(tmp_path).config


@both
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of other schedulers with NumPy
def test_compatible_schedulers(kind):
    scheduler = kind(**BASE)
    assert None not in scheduler.compatibles
    # Those that miss a package here are stand-ins.
    others = [other for other in scheduler.compatibles if not hasattr(other, "_backends")]
    assert len(others) >= 10
    for other in others:
        back = kind.from_config(other.from_config(scheduler.config).config).config
        assert {name: back[name] for name in scheduler.config} == dict(scheduler.config)
        more = {name for name in back if name not in scheduler.config}
        assert more.isdisjoint(inspect.signature(kind.__init__).parameters), other


@both
def test_results_of_a_step(kind):
    scheduler, x = kind(**BASE), sample()
    scheduler.set_timesteps(50)
    results = []
    for t in (0, 1):
        named = scheduler.step(0.1 * x, t, x)
        plain = scheduler.step(0.1 * x, t, x, return_dict=False)
        assert list(named.keys()) == ["prev_sample", "pred_original_sample"]
        for a, b in zip(plain, named.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        results.append(named.prev_sample)
    assert results[0].shape == results[1].shape == x.shape


@both
def test_public_interface(kind, recwarn):
    scheduler, x = kind(**BASE), sample()
    assert hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "step")
    assert scheduler.scale_model_input(x, 0.0).shape == x.shape
    scheduler.set_timesteps(100)
    t = scheduler.timesteps[5][None]
    assert scheduler.add_noise(x, torch.randn_like(x), t).shape == x.shape
    assert "kwargs" not in inspect.signature(kind.__init__).parameters
    assert not kind._deprecated_kwargs
    scheduler.dummy_attribute = 5
    scheduler.register_to_config(test_attribute=6)
    assert scheduler.dummy_attribute == 5 and scheduler.config.test_attribute == 6
    assert scheduler.save_pretrained == getattr(scheduler, "save_pretrained")  # noqa: B009
    assert not recwarn.list
    with pytest.warns(FutureWarning, match="test_attribute"):
        assert scheduler.test_attribute == 6
    with pytest.raises(AttributeError, match=f"'{kind.__name__}' object has no attribute"):
        _ = scheduler.nothing
