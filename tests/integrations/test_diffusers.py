"""FusedDDIMScheduler and fast_sampler against diffusers' own scheduler and pipelines."""

from __future__ import annotations

import copy
import inspect
import json
import threading

import numpy as np
import pytest
import torch

import diffad_fast as daf
from diffad_fast import native, ops, reference
from diffad_fast.denoisers.diffusers_unet import DiffusersUNet
from diffad_fast.errors import InputError

diffusers = pytest.importorskip("diffusers")

from diffad_fast.integrations.diffusers import FusedDDIMScheduler, fast_sampler  # noqa: E402

PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SPACINGS = ["leading", "trailing", "linspace"]

CONFIGS = {
    "defaults": {},
    "no clip": {"clip_sample": False},
    "clip range": {"clip_sample_range": 0.6},
    "scaled linear": {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    "short": {"num_train_timesteps": 100, "beta_end": 0.1},
    "trained betas": {"trained_betas": np.linspace(1e-3, 0.05, 40).tolist(),
                      "num_train_timesteps": 40},
    "last alpha": {"set_alpha_to_one": False, "steps_offset": 1},
    "thresholding": {"thresholding": True, "dynamic_thresholding_ratio": 0.9,
                     "sample_max_value": 1.5},
    "threshold below 1": {"thresholding": True, "sample_max_value": 0.5},
    "zero SNR": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}  # fmt: skip


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(**config):
    return diffusers.DDIMScheduler(**config), FusedDDIMScheduler(**config)


def in_float64(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_is_that_of_the_stock_class(name, prediction):
    """To rounding, of the stock class with a table in float64; its own, in float32, is farther."""
    config = {"prediction_type": prediction, **CONFIGS[name]}
    stock, ours = pair(**config)
    exact = in_float64(diffusers.DDIMScheduler(**config))
    by_zero = name == "zero SNR" and prediction == "epsilon"
    for eta, recompute in ((0.0, False), (0.0, True), (0.7, False), (1.0, True)):
        # At eta = 1 stock takes the root of 1 - 1 + rounding.
        if name == "zero SNR" and eta == 1:
            continue
        for scheduler in (stock, exact, ours):
            scheduler.set_timesteps(7)
        assert torch.equal(stock.timesteps, ours.timesteps)
        for i, t in enumerate(stock.timesteps):
            x, m, z = (random((2, 3, 6, 5), 3 * i + s) for s in range(3))
            options = {"eta": eta, "use_clipped_model_output": recompute}
            theirs = stock.step(m, t, x, variance_noise=z, **options).to_tuple()
            truth = exact.step(
                m.double(), t, x.double(), variance_noise=z.double(), **options
            ).to_tuple()
            got = ours.step(m, t, x, variance_noise=z, **options).to_tuple()
            again = ours.step(m, int(t), x, variance_noise=z, return_dict=False, **options)
            for a, b, c, d in zip(theirs, truth, got, again, strict=True):
                if by_zero:
                    torch.testing.assert_close(c, a, rtol=0, atol=0, equal_nan=True)
                    continue
                # The size of x0 before it is limited: 1/sqrt(abar) reaches 160.
                size = max(1.0, float(a.abs().max()))
                torch.testing.assert_close(c.double(), b, rtol=0, atol=5e-6 * size)
                torch.testing.assert_close(c, a, rtol=0, atol=1e-4 * size)
                assert torch.equal(c, d)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_whole_trajectory(spacing, prediction):
    """Ten steps with a model that depends on sample and timestep."""
    results = []
    for scheduler in pair(prediction_type=prediction, timestep_spacing=spacing):
        scheduler.set_timesteps(10)
        x = random((4, 3, 8, 8), 0)
        for t in scheduler.timesteps:
            x = scheduler.step(x * (t / (t + 1)), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_the_same_class_from_outside():
    stock = diffusers.DDIMScheduler
    for name, member in inspect.getmembers(stock, inspect.isfunction):
        mine = inspect.signature(getattr(FusedDDIMScheduler, name))
        assert list(mine.parameters) == list(inspect.signature(member).parameters), name
        for p, q in zip(mine.parameters.values(), inspect.signature(member).parameters.values(),
                        strict=True):  # fmt: skip
            assert p.default == q.default, (name, p.name)
    theirs, mine = pair(beta_schedule="scaled_linear")
    known = {"_internal_dict"}
    assert set(vars(theirs)) - known == set(vars(mine)) - known
    assert mine.init_noise_sigma == 1.0 and mine.order == 1 and len(mine) == 1000
    assert stock in mine.compatibles
    x = random((2, 3, 4, 4), 0)
    assert mine.scale_model_input(x, 3) is x
    t = torch.tensor([3, 700])
    assert torch.equal(mine.get_velocity(x, x, t), theirs.get_velocity(x, x, t))


@pytest.mark.parametrize("t", [torch.tensor([3, 700]), torch.tensor([9], dtype=torch.int32),
                               torch.tensor(999)])  # fmt: skip
def test_add_noise(t):
    stock, ours = pair(beta_schedule="squaredcos_cap_v2")
    x, z = random((2, 3, 4, 4), 0), random((2, 3, 4, 4), 1)
    torch.testing.assert_close(
        ours.add_noise(x, z, t), stock.add_noise(x, z, t), rtol=1e-6, atol=1e-6
    )


def test_add_noise_to_what_is_broadcast_or_of_another_dtype():
    stock, ours = pair()
    x, z = random((1, 3, 4, 4), 0), random((4, 3, 4, 4), 1)
    t = torch.tensor([3, 700, 20, 999])
    for image, noise, times in ((x, z, t), (x.half(), z, t), (z.half(), z, t), (x, z, t[:1])):
        found, expected = (s.add_noise(image, noise, times) for s in (ours, stock))
        assert found.dtype == expected.dtype and found.shape == expected.shape
        torch.testing.assert_close(found, expected)


def test_noise_is_drawn_as_the_stock_class_draws_it():
    x, m = random((2, 3, 4, 4), 0), random((2, 3, 4, 4), 1)
    results = []
    for scheduler in pair():
        scheduler.set_timesteps(5)
        one = torch.Generator().manual_seed(7)
        several = [torch.Generator().manual_seed(s) for s in (1, 2)]
        steps = [scheduler.step(m, 600, x, eta=1.0, generator=g) for g in (one, several)]
        torch.manual_seed(3)
        steps.append(scheduler.step(m, 600, x, eta=1.0))
        results.append([s.prev_sample for s in steps])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_half_precision_is_closer_to_the_exact_step():
    x, m = random((2, 3, 8, 8), 0), random((2, 3, 8, 8), 1)
    stock, ours = pair(prediction_type="v_prediction")
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    for dtype in (torch.float16, torch.bfloat16):
        half = [v.to(dtype) for v in (m, x)]
        exact = stock.step(half[0].double(), 600, half[1].double()).prev_sample
        error = [
            (s.step(half[0], 600, half[1]).prev_sample.double() - exact).abs().max()
            for s in (stock, ours)
        ]
        got = ours.step(half[0], 600, half[1])
        assert got.prev_sample.dtype == got.pred_original_sample.dtype == dtype
        assert error[1] <= error[0] and error[1] < torch.finfo(dtype).eps * 4
        # As torch promotes.
        assert ours.step(half[0], 600, x).prev_sample.dtype == torch.float32
        assert ours.step(m, 600, half[1]).prev_sample.dtype == torch.float32


def test_gradients_flow_to_sample_and_prediction():
    results = []
    for scheduler in pair():
        scheduler.set_timesteps(5)
        x, m = (random((2, 3, 4, 4), s).requires_grad_() for s in (0, 1))
        out = scheduler.step(m, 600, x)
        (out.prev_sample.square().sum() + out.pred_original_sample.sin().sum()).backward()
        results += [x.grad, m.grad]
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[3], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to_one", [True, False])
def test_levels_of_a_timestep_on_a_device(to_one):
    """The path without a synchronisation gives the floats of the other."""
    scheduler = FusedDDIMScheduler(set_alpha_to_one=to_one)
    scheduler.set_timesteps(7)
    for t in scheduler.timesteps:
        device = [float(a) for a in scheduler._levels_on_device(t)]
        assert device == list(scheduler._levels(t))


def test_a_changed_table_is_read_again():
    scheduler = FusedDDIMScheduler()
    scheduler.set_timesteps(5)
    before = scheduler._levels(600)
    scheduler.alphas_cumprod[600] = 0.5
    assert scheduler._levels(600)[0] == 0.5 != before[0]
    scheduler.alphas_cumprod = torch.full((1000,), 0.25)
    assert scheduler._levels(600) == (0.25, 0.25)


def test_in_inference_mode():
    """Tensors that are made there have no version, and may be changed as well."""
    unet, noise = small_unet(), random((2, 3, 8, 8), 0)
    expected = fast_sampler(unet, FusedDDIMScheduler(clip_sample=False), 4).run(noise)
    with torch.inference_mode():
        scheduler = FusedDDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(4)
        got = fast_sampler(unet, scheduler, 4).run(noise)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        assert torch.equal(got, expected) and torch.equal(x, expected)
        scheduler.alphas_cumprod[600] = 0.5
        assert scheduler._levels(600)[0] == 0.5


def test_errors():
    x = random((1, 3, 4, 4), 0)
    scheduler = FusedDDIMScheduler()
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 600, x)
    with pytest.raises(ValueError, match="num_train_timesteps|train_timesteps"):
        scheduler.set_timesteps(1001)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="not both"):
        scheduler.step(x, 600, x, eta=1.0, generator=torch.Generator(), variance_noise=x)
    with pytest.raises(ValueError, match="eta must be in"):
        scheduler.step(x, 600, x, eta=1.5)
    with pytest.raises(ValueError, match="unknown prediction_type 'flow'"):
        wrong = FusedDDIMScheduler(prediction_type="flow")
        wrong.set_timesteps(5)
        wrong.step(x, 600, x)


def test_configurations_go_both_ways(tmp_path):
    options = {"num_train_timesteps": 50, "clip_sample": False, "timestep_spacing": "trailing"}
    for first, second in ((FusedDDIMScheduler, diffusers.DDIMScheduler),
                          (diffusers.DDIMScheduler, FusedDDIMScheduler),
                          (diffusers.DDPMScheduler, FusedDDIMScheduler),
                          (FusedDDIMScheduler, FusedDDIMScheduler)):  # fmt: skip
        first(**options).save_pretrained(tmp_path)
        loaded = second.from_pretrained(tmp_path)
        assert type(loaded) is second
        assert {name: loaded.config[name] for name in options} == options
        converted = second.from_config(first(**options).config)
        assert {name: converted.config[name] for name in options} == options


def small_unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8),
        "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"), **options,
    }).eval()  # fmt: skip


def test_a_pipeline_saved_with_it_loads_again(tmp_path):
    pipeline = diffusers.DDPMPipeline(small_unet(), FusedDDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffad_fast.integrations.diffusers", "FusedDDIMScheduler"]
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is FusedDDIMScheduler
    images = []
    for pipe in (pipeline, loaded):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=3,
                           output_type="np").images)  # fmt: skip
    np.testing.assert_allclose(*images, rtol=0, atol=1e-5)


def test_in_the_ddim_pipeline():
    """DDIMPipeline converts what it is given; a scheduler set afterwards stays."""
    unet, images = small_unet(), []
    for scheduler in pair(clip_sample=False):
        pipe = diffusers.DDIMPipeline(unet, scheduler)
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=4,
                           eta=0.5, output_type="np").images)  # fmt: skip
    np.testing.assert_allclose(images[1], images[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("options", [
    {}, {"clip_sample": False, "timestep_spacing": "linspace"}, {"clip_sample_range": 0.5},
    {"set_alpha_to_one": False, "steps_offset": 1}, {"beta_schedule": "squaredcos_cap_v2"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False},
])  # fmt: skip
def test_fast_sampler_is_their_loop(prediction, options):
    if options.get("rescale_betas_zero_snr") and prediction == "epsilon":
        return  # refused, see below
    unet = small_unet()
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, **options)
    scheduler.set_timesteps(6)
    noise = random((2, 3, 8, 8), 0)
    asked = []
    hook = unet.register_forward_pre_hook(lambda module, args: asked.append(args[1].tolist()))
    got = fast_sampler(unet, scheduler).run(noise)
    hook.remove()
    assert asked == [[t, t] for t in scheduler.timesteps.tolist()]
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))


def test_fast_sampler_with_noise_of_its_own_and_from_another_scheduler():
    unet, seed = small_unet(), 5
    noise = random((2, 3, 8, 8), 0)
    got = fast_sampler(unet, diffusers.DDPMScheduler(), 4, eta=1.0, seed=seed).run(noise)
    stock = diffusers.DDIMScheduler.from_config(diffusers.DDPMScheduler().config)
    stock.set_timesteps(4)
    x = noise
    with torch.no_grad():
        for i, t in enumerate(stock.timesteps):
            z = ops.philox_normal((1, 3, 8, 8), seed, step=i + 1)
            x = stock.step(unet(x, t).sample, t, x, eta=1.0,
                           variance_noise=z.expand(x.shape)).prev_sample  # fmt: skip
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta, recompute", [(0.0, True), (1.0, False)])
@pytest.mark.parametrize("first, options", [
    (0, {"clip_sample_range": 0.5}),
    (1, {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}),
    (2, {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 3.0}),
], ids=["clip", "threshold", "other threshold"])  # fmt: skip
def test_fast_sampler_limits_as_they_do(compiled, first, options, recompute, eta, monkeypatch):
    """Their loop in float64, each kind of prediction with another spacing; in CUDA every step is a
    fused one."""
    step, fused = torch.ops.diffad_fast.ddim_loop_step_, []
    monkeypatch.setattr(
        torch.ops.diffad_fast, "ddim_loop_step_", lambda *args: fused.append(args) or step(*args)
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    unet, noise = small_unet(), random((2, 3, 8, 8), 0)
    unet.conv_out.weight.data *= 8  # so that the limits are met
    exact = copy.deepcopy(unet).double()
    unet.to(compiled)
    given = {"eta": eta, "use_clipped_model_output": recompute}
    for i, prediction in enumerate(PREDICTIONS):
        stock = in_float64(diffusers.DDIMScheduler(
            prediction_type=prediction, timestep_spacing=SPACINGS[(first + i) % 3], **options
        ))  # fmt: skip
        with torch.inference_mode():
            got = fast_sampler(unet, stock, 4, seed=5, **given).run(noise.to(compiled))
            stock.set_timesteps(4)
            x, met = noise.double(), 0
            for k, t in enumerate(stock.timesteps):
                z = reference.philox_normal((1, 3, 8, 8), 5, step=k + 1).double().expand(x.shape)
                output = exact(x, t).sample
                unlimited = ops.ddim_step(
                    x, output, float(stock.alphas_cumprod[t]), 1.0, prediction_type=prediction
                )
                x, x0 = stock.step(output, t, x, variance_noise=z, return_dict=False, **given)
                met += float((x0 - unlimited).abs().max()) > 0.1
        assert met >= 2
        torch.testing.assert_close(got.cpu().double(), x, rtol=0, atol=1e-4 * float(x.abs().max()))
    assert len(fused) == (0 if ops.dispatch.selected() == "cpu" else 12)


@pytest.mark.parametrize("name", ["PNDM", "EulerDiscrete", "HeunDiscrete", "UniPCMultistep"])
def test_fast_sampler_takes_over_other_schedulers(name):
    scheduler = getattr(diffusers, f"{name}Scheduler")(beta_end=0.03, prediction_type="epsilon")
    unet, noise = small_unet(), random((2, 3, 8, 8), 0)
    stock, x = diffusers.DDIMScheduler.from_config(scheduler.config), noise
    stock.set_timesteps(3)
    with torch.no_grad():
        for t in stock.timesteps:
            x = stock.step(unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(fast_sampler(unet, scheduler, 3).run(noise), x, rtol=0, atol=5e-6)


def test_features_of_two_threads():
    """Hooks are the module's, and each thread gets what its own call has given."""
    x = random((2, 3, 8, 8), 0)
    unet = DiffusersUNet(small_unet(), diffusers.DDIMScheduler().alphas_cumprod)
    level, inside, found = torch.zeros(2), threading.Barrier(2), {}
    alone = unet.features(x, level)
    unet.unet.conv_in.register_forward_hook(lambda *_: None if inside.wait(60) else None)

    def call(scale):
        found[scale] = unet.features(scale * x, level)

    threads = [threading.Thread(target=call, args=(scale,)) for scale in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found[1]) == len(found[2]) == len(alone)
    for got, want in zip(found[1], alone, strict=True):
        torch.testing.assert_close(got, want)


def test_fast_sampler_refuses_what_it_would_get_wrong():
    with pytest.raises(InputError, match="give num_inference_steps"):
        fast_sampler(small_unet(), diffusers.DDIMScheduler())
    for steps in (-1, 0, 2.5):
        with pytest.raises(InputError, match=f"num_inference_steps is .* at least 1, not {steps}"):
            fast_sampler(small_unet(), diffusers.DDIMScheduler(), steps)
    with pytest.raises(InputError, match="sample_max_value=0.5 with thresholding=True is below 1"):
        below = diffusers.DDIMScheduler(thresholding=True, sample_max_value=0.5)
        fast_sampler(small_unet(), below, 3)
    with pytest.raises(InputError, match="no signal"):
        fast_sampler(
            small_unet(),
            diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 3,
        )  # fmt: skip
    with pytest.raises(InputError, match="3 input and 6 output channels"):
        fast_sampler(small_unet(out_channels=6), diffusers.DDIMScheduler(), 3)
    with pytest.raises(InputError, match="conditioned on classes"):
        fast_sampler(small_unet(num_class_embeds=4), diffusers.DDIMScheduler(), 3)


@pytest.mark.skipif(not native.loaded(), reason="the native library is missing")
def test_steps_are_those_of_the_fused_operator(monkeypatch):
    """Not the stock code that the class inherits."""
    calls = []
    real = ops.diffusion._ddim_step
    monkeypatch.setattr(ops.diffusion, "_ddim_step", lambda *a: calls.append(a) or real(*a))
    scheduler = FusedDDIMScheduler()
    scheduler.set_timesteps(5)
    scheduler.step(random((1, 3, 4, 4), 0), 600, random((1, 3, 4, 4), 1))
    assert len(calls) == 2


# ----------------------------------------------------------- from_diffusers


class ExactUNet(diffusers.UNet2DModel):
    """Of data that are one constant image: the noise that leads there, as the best one says."""

    CONSTANT = 0.2

    def forward(self, sample, timestep):
        table = diffusers.DDPMScheduler().alphas_cumprod.to(sample)
        alpha = table[torch.as_tensor(timestep)].reshape(-1, 1, 1, 1)
        out = (sample - alpha.sqrt() * self.CONSTANT) / (1 - alpha).sqrt()
        return type("Output", (), {"sample": out + 0 * super().forward(sample, timestep).sample})()


def grey(n, seed):
    """Images around the pixel value of ExactUNet.CONSTANT in [-1, 1]."""
    rng = np.random.default_rng(seed)
    return (0.6 + 0.02 * rng.normal(size=(n, 3, 16, 16))).astype(np.float32)


def exact_pipeline():
    options = {name: value for name, value in small_unet(sample_size=16).config.items()
               if not name.startswith("_")}  # fmt: skip
    torch.manual_seed(0)
    return diffusers.DDPMPipeline(ExactUNet(**options).eval(), diffusers.DDPMScheduler())


def test_a_pipeline_as_a_detector(tmp_path):
    pipeline = exact_pipeline()
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    detector = daf.Detector.from_diffusers(pipeline, device="cpu", preset="fast")
    config = detector.config
    assert config.image_size == (16, 16) and config.channels == 3 and config.schedule == "linear"
    assert config.prediction_type == "epsilon" and config.clip == 1.0
    detector.fit(grey(80, 0))
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, before[name]), name
    # What the model knows comes back; the difference to it is the map.
    x = torch.from_numpy(grey(2, 1))
    torch.testing.assert_close(detector.reconstruct(x), torch.full_like(x, 0.6), rtol=0, atol=2e-3)
    clean, broken = grey(20, 2), grey(20, 3)
    broken[:, :, 4:8, 6:10] += 0.3
    for mode in ("reconstruct", "invert", "one_step"):
        detector.mode = mode
        assert detector.score(clean).score.max() < detector.score(broken).score.min(), mode
    detector.save(tmp_path / "model.diffad")
    again = daf.load(
        tmp_path / "model.diffad", device="cpu",
        denoiser=daf.Detector.from_diffusers(exact_pipeline(), device="cpu").model.denoiser,
    )  # fmt: skip
    again.mode = detector.mode
    np.testing.assert_allclose(again.score(clean).score, detector.score(clean).score, rtol=1e-5)


def test_a_pipeline_with_dynamic_thresholds_as_a_detector():
    """A threshold between 1 and 1 is the usual clip, in reconstructions and in the fused end."""
    x, found = torch.from_numpy(grey(2, 0)) - 0.5, {}
    for most in (None, 1.0, 1.5):
        limit = {} if most is None else {"thresholding": True, "sample_max_value": most}
        scheduler = diffusers.DDIMScheduler(dynamic_thresholding_ratio=0.7, **limit)
        model = daf.Detector.from_diffusers(
            diffusers.DDIMPipeline(small_unet(sample_size=16), scheduler), device="cpu",
            map_weights=(1.0, 0.0, 0.0), eta=0.5,
        ).model  # fmt: skip
        assert model.config.clip == (1.0 if most is None else None)
        assert model.config.dynamic_threshold == (None if most is None else (0.7, most))
        with torch.inference_mode():
            found[most] = model.reconstruct(x), model.raw_maps(x)[0]
        torch.testing.assert_close(found[most][1], (x - found[most][0]).abs().mean(dim=1))
    torch.testing.assert_close(found[1.0], found[None])
    assert not torch.allclose(found[1.5][0], found[None][0], atol=0.05)


def test_a_saved_pipeline_as_a_detector(tmp_path):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )
    diffusers.DDIMPipeline(small_unet(), scheduler).save_pretrained(tmp_path)
    detector = daf.Detector.from_diffusers(tmp_path, device="cpu")
    assert detector.config.schedule == "cosine" and detector.config.clip is None
    x = random((2, 3, 8, 8), 0)
    level = torch.tensor([0.0, 1.0])
    maps = detector.model.denoiser.features(x, level)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 4, 4), (2, 8, 4, 4), (2, 8, 4, 4)]
    with pytest.raises(InputError, match="diffusers cannot load a pipeline from .*nowhere"):
        daf.Detector.from_diffusers(tmp_path / "nowhere")
    with pytest.raises(InputError, match="object is not an unconditional pipeline"):
        daf.Detector.from_diffusers(object())
    for options, words in (
        ({"thresholding": True, "sample_max_value": 0.9}, "sample_max_value=0.9 .* below 1"),
        ({"beta_schedule": "sigmoid"}, "take over this DDPMScheduler: sigmoid"),
    ):
        pipeline = diffusers.DDPMPipeline(small_unet(), diffusers.DDPMScheduler(**options))
        with pytest.raises(InputError, match=words):
            daf.Detector.from_diffusers(pipeline)
