"""Analytic checks of the whole forward, reverse and inverse process: for Gaussian data the best
denoiser is known in closed form, and deterministic DDIM is linear in its input."""

import contextlib
import copy
import gc
import math
import pickle
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffad_fast import denoisers, native, ops, reference, use_backend
from diffad_fast.denoisers.diffusers_unet import DiffusersUNet
from diffad_fast.diffusion import NoiseSchedule, ReverseLoop, graphs
from diffad_fast.representations import WaveletRepresentation

VARIANCE = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)[None, :, None, None]
KINDS = ["sample", "epsilon", "v_prediction"]


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


def deviation(a):
    """Of the marginal at a level, a coordinate."""
    return (a * VARIANCE + 1 - a).sqrt()


def gaussian(n=3, side=4):
    return torch.randn(n, 3, side, side, dtype=torch.float64) * VARIANCE.sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_gaussian_data_comes_back_gaussian(kind):
    """The probability flow of exact DDIM maps the marginal at sigma to that of the data: a standard
    deviation sqrt(a v + 1 - a) at the start becomes sqrt(v), per coordinate and linearly."""
    schedule = NoiseSchedule("cosine")
    x0 = gaussian()
    start = schedule.timestep(1.0)
    table = schedule.reverse_steps(start, start + 1)
    seen = []

    def denoiser(x_t, log_sigma):
        seen.append(x_t)
        return exact_denoiser(kind)(x_t, log_sigma)

    x_hat = ReverseLoop(denoiser, table, seed=1, prediction_type=kind)(x0)
    expected = seen[0] * VARIANCE.sqrt() / deviation(table[0].alpha_t)
    # Some 500 steps of a first-order solver.
    torch.testing.assert_close(x_hat, expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_inversion_gives_the_latent_and_reconstruction_undoes_it(kind):
    """From the level of sigma_min to that of sigma_max the flow multiplies by the ratio of the
    marginals' deviations; the way back gives the input again. Both are solvers of first order: with
    twice the steps, the errors halve."""
    x0 = gaussian()
    errors = []
    for steps in (200, 400):
        up = NoiseSchedule.inversion_steps(0.02, 20.0, steps)
        a, b = up[0].alpha_t, up[-1].alpha_s
        latent = ReverseLoop(exact_denoiser(kind), up, prediction_type=kind)(x0)
        expected = math.sqrt(a) * x0 * deviation(b) / deviation(a)
        # The same levels downwards, and at last to the clean end.
        down = [type(s)(s.alpha_s, s.alpha_t, t) for s, t in zip(
            reversed(up), [0.5 * math.log((1 - s.alpha_s) / s.alpha_s) for s in reversed(up)],
            strict=True)]  # fmt: skip
        back = ReverseLoop(exact_denoiser(kind), down, prediction_type=kind).run(latent)
        errors.append([
            float(((latent - expected) / expected).abs().max()),
            float(((back - math.sqrt(a) * x0) / x0).abs().max()),
        ])  # fmt: skip
    (latent_200, back_200), (latent_400, back_400) = errors
    assert latent_400 < 0.02 and back_400 < 0.03
    assert latent_200 / latent_400 == pytest.approx(2, rel=0.1)
    assert back_200 / back_400 == pytest.approx(2, rel=0.1)


def test_latents_of_normal_data_are_standard_normal_and_others_are_not():
    """What scores by inversion rest on: ||z||^2 / d is 1 on the model's data, larger beside it."""
    normal, wide = gaussian(200, 8), 2 * gaussian(200, 8)
    invert = ReverseLoop(
        exact_denoiser("v_prediction"), NoiseSchedule.inversion_steps(0.01, 50.0, 300)
    )
    square = invert(normal).square().flatten(1).mean(dim=1)
    d = 3 * 8 * 8
    assert float(square.mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / d / 200) + 0.02)
    assert float(square.var()) == pytest.approx(2 / d, rel=0.5)
    assert float(invert(wide).square().mean()) == pytest.approx(4, rel=0.05)


def test_forward_part_and_the_same_noise_for_every_sample():
    table = NoiseSchedule("linear").reverse_steps(400, 1)
    x0 = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    seen = {}

    def denoiser(x_t, log_sigma):
        seen.update(x_t=x_t, log_sigma=log_sigma)
        return torch.zeros_like(x_t)

    ReverseLoop(denoiser, table, seed=3)(x0)
    a = table[0].alpha_t
    noise = (seen["x_t"] - math.sqrt(a) * x0) / math.sqrt(1 - a)
    torch.testing.assert_close(noise[0], noise[1])
    field = ops.philox_normal((1, 8, 8), 3).double()
    torch.testing.assert_close(noise[0], field, rtol=0, atol=1e-6)
    assert seen["log_sigma"].shape == (2,)
    assert float(seen["log_sigma"][1]) == pytest.approx(table[0].log_sigma)


def test_guidance_pulls_towards_the_input():
    table = NoiseSchedule("linear").reverse_steps(400, 4)
    x0 = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    distance = [
        (ReverseLoop(exact_denoiser("epsilon"), table, prediction_type="epsilon", guidance=w)(x0)
         - x0).abs().mean()
        for w in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    assert distance[0] > distance[1] > distance[2]


def test_eta_adds_noise_that_repeats():
    table = NoiseSchedule("linear").reverse_steps(400, 4)
    x0 = torch.randn(1, 3, 4, 4, dtype=torch.float64)

    def run(eta, seed=0):
        return ReverseLoop(exact_denoiser("v_prediction"), table, seed=seed, eta=eta)(x0)

    assert torch.equal(run(1.0), run(1.0))
    assert not torch.allclose(run(1.0), run(0.0))
    assert not torch.allclose(run(1.0), run(1.0, seed=1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sample_does_not_depend_on_its_neighbours(layout):
    table = NoiseSchedule("linear").reverse_steps(400, 3)
    x0 = gaussian(5, 6).to(memory_format=layout)
    run = ReverseLoop(exact_denoiser("v_prediction"), table, eta=0.5, clip=3.0, guidance=0.1)
    together = run(x0)
    for i in range(5):
        assert torch.equal(run(x0[i : i + 1])[0], together[i])


def test_prepare_and_conclude():
    table = NoiseSchedule("linear").reverse_steps(400, 2)
    x = gaussian(2)
    plain = ReverseLoop(exact_denoiser("v_prediction"), table)
    whole = ReverseLoop(
        exact_denoiser("v_prediction"),
        table,
        prepare=lambda x: x / 2,
        conclude=lambda x, x0, x_hat: {"input": x, "error": (x0 - x_hat, x_hat)},
    )
    result = whole(x)
    assert torch.equal(result["input"], x) and torch.equal(result["error"][1], plain(x / 2))
    assert torch.equal(result["error"][0], x / 2 - plain(x / 2))


@pytest.mark.parametrize("limit", [
    {"clip": 1.5}, {"dynamic_threshold": (0.8, 2.0), "use_clipped_model_output": True},
], ids=["clip", "threshold"])  # fmt: skip
def test_finish_takes_the_place_of_the_last_step(limit):
    torch.manual_seed(0)
    representation = WaveletRepresentation(1, 2)
    representation.fit([torch.rand(4, 1, 16, 16)])
    images, table = torch.rand(3, 1, 16, 16), NoiseSchedule("linear").reverse_steps(400, 3)
    options = {"guidance": 0.1, "eta": 0.5, "prepare": representation.encode, **limit}

    def shrink(x_t, log_sigma):
        return 0.3 * x_t

    plain = ReverseLoop(shrink, table, **options)
    whole = ReverseLoop(
        shrink, table, finish=representation.finish,
        conclude=lambda x, x0, end: (x0, end), **options,
    )  # fmt: skip
    x0, end = whole(images)
    assert torch.equal(x0, representation.encode(images))
    torch.testing.assert_close(end.x0, plain(images), rtol=0, atol=2e-6)
    x_hat = representation.decode(end.x0)
    torch.testing.assert_close(end.x_hat, x_hat, rtol=0, atol=2e-6)
    weights = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    for found, w in zip((end.pixel, end.sub_band), weights, strict=True):
        expected = ops.anomaly_map(images, x_hat, weights=w, levels=2, sigma=0.0)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(whole.run(x0), plain.run(x0), rtol=0, atol=0)
    with pytest.raises(ValueError, match="finish ends at abar = 1, the last step at"):
        up = NoiseSchedule("linear").inversion_steps(0.1, 2.0, 2)
        ReverseLoop(shrink, up, finish=representation.finish)


@pytest.mark.parametrize("options, words", [
    ({"eta": 1.5}, "eta must be in .*1.5"),
    ({"clip": 1.0, "dynamic_threshold": (0.9, 1.5)}, "choose one of clip = 1.0 and dynamic_thresh"),
    ({"dynamic_threshold": (0.9, 0.5)}, "the maximum of dynamic_threshold must be in .* got 0.5"),
    ({"eta": 1.0, "inverts": True}, "inversion is deterministic"),
    ({"prediction_type": "noise"}, "unknown prediction_type 'noise'"),
    ({"guidance": float("nan")}, "guidance must be in .* got nan"),
])  # fmt: skip
def test_options_are_checked_at_once(options, words):
    """The fused steps take what they are given."""
    schedule, inverts = NoiseSchedule(), options.pop("inverts", False)
    steps = schedule.inversion_steps(0.1, 1.0, 2) if inverts else schedule.reverse_steps(500, 3)
    with pytest.raises(ValueError, match=words):
        ReverseLoop(lambda x, level: x, steps, **options)


def test_no_steps():
    with pytest.raises(ValueError, match="at least one ReverseStep"):
        ReverseLoop(lambda x, level: x, [])


def test_run_leaves_its_state_alone():
    x = gaussian(2)
    before = x.clone()
    ReverseLoop(exact_denoiser("sample"), NoiseSchedule().inversion_steps(0.1, 1.0, 2),
                prediction_type="sample").run(x)  # fmt: skip
    assert torch.equal(x, before)


@pytest.mark.parametrize("inverts", [False, True])
def test_the_eager_loop_can_be_differentiated_after_a_call(inverts):
    """A linear network keeps the process linear: its gradient is that of any other point."""
    schedule = NoiseSchedule()
    steps = schedule.inversion_steps(0.1, 2.0, 3) if inverts else schedule.reverse_steps(500, 3)
    run = ReverseLoop(exact_denoiser("v_prediction"), steps)
    x, direction = gaussian(2), gaussian(2)
    run(x)
    found, moved = run.eager(x.requires_grad_()), run.eager(x.detach() + direction)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    change = float((moved - found).detach().sum())
    assert float((gradient * direction).sum()) == pytest.approx(change, rel=1e-9)


def test_levels_embedded_at_once_are_the_levels():
    """What conditions the U-Net is taken out of the loop; the result is the same."""
    torch.manual_seed(0)
    unet = denoisers.create("unet-tiny", 16).eval()
    nn.init.normal_(unet.conv_out.weight, std=0.02)  # starts at 0
    table = NoiseSchedule().reverse_steps(700, 3)
    x0 = torch.randn(2, 16, 16, 16)
    calls = []
    unet.embedding.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    got = ReverseLoop(unet, table)(x0)
    assert calls == [3]
    with torch.inference_mode():
        expected = ReverseLoop(lambda x, level: unet(x, level), table)(x0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class Narrow(nn.Module):
    """In bfloat16, but for what it answers in."""

    def __init__(self, answer=torch.bfloat16):
        super().__init__()
        self.weight, self.answer = nn.Parameter(torch.ones((), dtype=torch.bfloat16)), answer

    def forward(self, x, log_sigma):
        assert x.dtype == torch.bfloat16 and log_sigma.dtype == torch.float32
        return (x * self.weight).to(self.answer)


def test_a_narrow_network_gets_narrow_inputs_and_the_state_stays_wide():
    got = ReverseLoop(Narrow(), NoiseSchedule().reverse_steps(500, 3))(torch.randn(2, 3, 4, 4))
    assert got.dtype == torch.float32


@pytest.fixture
def fused(cuda, monkeypatch):
    """The next inputs that CUDA's steps of a loop were given, one a step; and the device."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    step, calls = torch.ops.diffad_fast.ddim_loop_step_, []

    def watched(*args):
        calls.append(args[5])
        step(*args)

    monkeypatch.setattr(torch.ops.diffad_fast, "ddim_loop_step_", watched)
    return calls, cuda


def in_plain_steps(run, x):
    with use_backend("reference"):
        return run.eager(x)


@pytest.mark.native
def test_fused_steps_are_not_taken_where_gradients_are_wanted(fused, monkeypatch):
    torch.manual_seed(0)
    calls, device = fused
    unet = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()).to(device)
    x = torch.randn(2, 3, 4, 4, device=device)
    plain, run = (
        ReverseLoop(lambda x, level: unet(x), NoiseSchedule().reverse_steps(500, 3))
        for _ in range(2)
    )

    def gradient(run):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(run.eager(leaf).square().sum(), leaf)[0]

    with use_backend("reference"):
        expected = gradient(plain)
        monkeypatch.setattr(ops.diffusion, "fused_steps", lambda device: True)
        assert torch.equal(gradient(run), expected) and not calls
        with torch.inference_mode():
            torch.testing.assert_close(run.eager(x), plain.eager(x), rtol=1e-6, atol=1e-6)
    assert len(calls) == 3


@pytest.mark.native
@pytest.mark.parametrize("answer", [torch.bfloat16, torch.float32])
def test_fused_steps_of_a_network_that_answers_in_another_dtype(fused, answer):
    calls, device = fused
    x = torch.randn(2, 3, 4, 4).to(device)  # whose bits round alike on every device
    run = ReverseLoop(Narrow(answer).to(device), NoiseSchedule().reverse_steps(500, 3))
    with torch.inference_mode():
        torch.testing.assert_close(run.eager(x), in_plain_steps(run, x), rtol=1e-6, atol=1e-6)
    assert [c is None for c in calls] == [answer == torch.float32] * 3


@pytest.mark.native
@pytest.mark.parametrize("limit", [
    {"clip": 1.0}, {"dynamic_threshold": (0.8, 2.0), "use_clipped_model_output": True},
], ids=["clip", "threshold"])  # fmt: skip
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_loop_of_fused_steps_is_the_plain_one(fused, layout, limit):
    """Noise, guidance and a limit; each call begins at the table's first step."""
    torch.manual_seed(0)
    calls, device = fused
    conv = nn.Conv2d(5, 5, 3, padding=1).to(device, memory_format=layout)
    run = ReverseLoop(
        lambda x, level: conv(x), NoiseSchedule().reverse_steps(700, 4), eta=0.6, guidance=0.3,
        **limit,
    )  # fmt: skip
    with torch.inference_mode():
        for n in (2, 3):
            x = torch.randn(n, 5, 6, 6, device=device).to(memory_format=layout)
            torch.testing.assert_close(run.eager(x), in_plain_steps(run, x), rtol=1e-6, atol=1e-6)
        assert len(calls) == 8
        # Without anything to pull towards: the guidance is in the kernels' table.
        with use_backend("reference"):
            expected = run.run(x)
        torch.testing.assert_close(run.run(x), expected, rtol=1e-6, atol=1e-6)
    assert len(calls) == 8


def test_a_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8),
        layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    schedule = NoiseSchedule("linear")
    denoiser = DiffusersUNet(unet, scheduler.alphas_cumprod)
    asked = []
    unet.register_forward_pre_hook(
        lambda module, args: asked.append(torch.as_tensor(args[1]).tolist())
    )
    table = schedule.reverse_steps(599, 3)
    x0 = torch.randn(2, 3, 8, 8)
    run = ReverseLoop(denoiser, table, prediction_type="epsilon", seed=5)
    got = run(x0)
    assert asked == [[599] * 2, [399] * 2, [199] * 2]
    # Their loop from the same noise.
    noise = ops.philox_normal((1, 3, 8, 8), 5)
    x = scheduler.add_noise(x0, noise.expand(x0.shape), torch.tensor([599, 599]))
    scheduler.set_timesteps(5)  # steps of 200
    with torch.no_grad():
        for t in (599, 399, 199):
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(not native.loaded(), reason="the native library is missing")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "clip, guidance, again",
    [(None, 0.0, False), (0.7, 0.0, False), (0.7, 0.3, False), (0.7, 0.3, True)],
)
def test_the_table_of_the_kernels_is_the_step(kind, clip, guidance, again):
    """x0 = c0 x + c1 m + c2 y, x_s = c3 x + c4 m + c5 y + c6 limited(x0) + c7 z, limit c8."""
    steps = NoiseSchedule("linear").reverse_steps(700, 4)
    table = ops.diffusion.step_table(steps, kind, 0.6, clip, guidance, again)
    assert table.shape == (4, 9) and table.dtype == torch.float32
    x, m, y, z = torch.randn(4, 2, 30, dtype=torch.float64)
    for c, step in zip(table.double(), steps, strict=True):
        x0 = (c[0] * x + c[1] * m + c[2] * y).clamp(-c[8], c[8])
        got = c[3] * x + c[4] * m + c[5] * y + c[6] * x0 + c[7] * z
        with use_backend("reference"):
            expected = ops.ddim_step(x, m, step.alpha_t, step.alpha_s, kind, 0.6, z, clip, None,
                                     again, (y, guidance))  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


class FakeCapture:
    """In place of CapturedCall: counts, and computes eagerly."""

    made: list = []

    def __init__(self, function, x):
        self.function = function
        FakeCapture.made.append(tuple(x.shape))

    def __call__(self, x):
        return self.function(x)


@pytest.fixture
def captures(monkeypatch):
    monkeypatch.setattr(graphs, "CapturedCall", FakeCapture)
    monkeypatch.setattr(graphs.Graphed, "_gains", lambda self, captured, x: True)
    FakeCapture.made = []
    return FakeCapture.made


def graph_of(run, x):
    with torch.inference_mode():
        return run.graphed._graph(x)


def test_what_is_captured(captures):
    """A shape that comes twice; again when a weight changes; one for which there is room."""
    unet = nn.Conv2d(3, 3, 1)
    run = ReverseLoop(lambda x, level: unet(x), NoiseSchedule().reverse_steps(500, 2),
                      modules=[unet], graphs=2)  # fmt: skip
    a, b, c = (torch.randn(n, 3, 4, 4) for n in (1, 2, 3))
    assert graph_of(run, a) is None and captures == []
    first = graph_of(run, a)
    assert isinstance(first, FakeCapture) and graph_of(run, a.clone()) is first
    assert captures == [(1, 3, 4, 4)]
    with torch.no_grad():
        unet.weight.mul_(2)
    assert graph_of(run, a) is None and graph_of(run, a) is not first
    unet.weight = nn.Parameter(unet.weight.detach().clone())
    assert graph_of(run, a) is None
    del captures[:]
    for x in (a, b, b, c, c, c):
        graph_of(run, x)
    assert captures == [(1, 3, 4, 4), (2, 3, 4, 4)]
    assert graph_of(run, a) is not None and graph_of(run, b) is not None
    for _ in range(graphs.RECENT):
        assert graph_of(run, a) is not None
    assert graph_of(run, c) is not None  # in the place of what was not used for so long
    assert graph_of(run, b) is None and graph_of(run, a) is not None
    assert captures[2:] == [(3, 3, 4, 4)]
    assert len(run.graphed._captured) == 2
    run.forget()
    assert not run.graphed._captured
    assert graph_of(run, a) is None and graph_of(run, a) is not None
    for n in range(2 * graphs.REMEMBERED):  # what is remembered of shapes is bounded
        graph_of(run, torch.randn(1, 3, 4 + n, 4))
    assert len(run.graphed._seen) == graphs.REMEMBERED


def test_forgetting_waits_for_nobody(captures, streams):
    """Python's collector may ask for it in the midst of a call, in its thread and in others."""

    def function(x):
        with ThreadPoolExecutor(1) as other:
            graphed.forget(), other.submit(graphed.forget).result()
        return 2 * x

    graphed = graphs.Graphed(function, [])
    for i in range(3):
        assert graphed(OnCuda(i)) == 2 * i
    assert len(graphed._captured) == len(captures) == 1
    graphed.forget()
    assert not graphed._captured


def test_a_signal_that_scores_in_the_midst_of_a_call(captures, streams):
    """It has its own result, of the function itself, and the call goes on to its own."""
    inside = []

    def function(x):
        if not inside:
            inside.append(x)
            signal.raise_signal(signal.SIGUSR1)
        return 2 * x

    graphed, found = graphs.Graphed(function, []), []
    before = signal.signal(signal.SIGUSR1, lambda *_: found.append(graphed(OnCuda(3))))
    try:
        for _ in range(3):  # eagerly, with a capture, from the graph
            del inside[:]
            assert graphed(OnCuda(2)) == 4
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == [6, 6, 6] and len(captures) == 1
    assert len(streams) == 6  # of the calls alone


def test_many_shapes_do_not_capture_again_and_again(captures):
    unet = nn.Conv2d(3, 3, 1)
    run = ReverseLoop(lambda x, level: unet(x), NoiseSchedule().reverse_steps(500, 2),
                      modules=[unet])  # fmt: skip
    replays = 0
    for i in range(400):
        replays += graph_of(run, torch.randn(1, 3, 4, 4 + i % 8)) is not None
    assert len(captures) == 4 and replays > 180


def test_a_failed_capture_says_so_once_and_runs_eagerly(captures, monkeypatch):
    def fail(self, function, x):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeCapture, "__init__", fail)
    run = ReverseLoop(exact_denoiser("v_prediction"), NoiseSchedule().reverse_steps(500, 2))
    x = gaussian()
    graph_of(run, x)
    with pytest.warns(RuntimeWarning, match="capture failed: operation not permitted"):
        assert graph_of(run, x) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graph_of(run, x) is None


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_what_pytorch_keeps_of_a_failed_capture_is_given_back_once(keeps, ended, monkeypatch):
    """A graph that ended gives its memory back itself, as others do in later versions."""
    calls = []

    class Graph:
        def pool(self):
            if not ended:
                raise RuntimeError("without a preceding successful capture")

    @contextlib.contextmanager
    def graph(recorded, **mode):
        calls.append(("capture", mode.get("pool")))
        yield

    def end(*of):
        calls.append(("end", of))
        raise RuntimeError("not currently recording to mempool_id")  # as where it has ended

    cuda = SimpleNamespace(
        Stream=lambda device: SimpleNamespace(device=device),
        stream=contextlib.nullcontext,
        device=contextlib.nullcontext,
        current_device=lambda: 2,
        graph_pool_handle=lambda: (0, 7),
        graph=graph,
        CUDAGraph=Graph,
    )
    device = torch.device("cpu")
    monkeypatch.setattr(graphs, "KEEPS_FAILED", keeps)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda *of: calls.append(("release", of)), raising=False
    )
    monkeypatch.setattr(graphs, "_side_stream", cuda.Stream)
    with pytest.raises(ZeroDivisionError), graphs.capturing(Graph(), cuda.Stream(device)):
        _ = 1 / 0
    release = [("release", (2, (0, 7)))] if keeps and not ended else []
    assert calls == [("capture", (0, 7)), ("end", (2, (0, 7))), *release, ("capture", None)]


@pytest.mark.gpu
def test_after_a_failed_capture():
    """Random numbers are drawn, and what the capture took is given back."""
    x = torch.ones(1 << 20, device="cuda")
    graphed = graphs.Graphed(lambda x: x + x.repeat(64).sum().item(), [])
    expected = graphed(x)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.warns(RuntimeWarning, match="capture failed"):
        assert torch.equal(graphed(x), expected)
    assert torch.randn(9, device="cuda").isfinite().all()
    gc.collect()
    torch.cuda.empty_cache()
    # Less than the 256 MiB that were repeated: what is kept are small blocks.
    assert torch.cuda.memory_reserved() - before < 64 << 20


@pytest.fixture
def streams(monkeypatch):
    """In place of CUDA's streams, a new one for each call: what is waited for and recorded."""

    class Stream:
        def wait_event(self, event):
            order.append(("wait", event.stream, self))

    class Event:
        stream = None

        def record(self, stream):
            self.stream = stream
            order.append(("record", stream))

    order = []
    monkeypatch.setattr(graphs.torch.cuda, "Event", Event)
    monkeypatch.setattr(graphs.torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(graphs.torch.cuda, "is_current_stream_capturing", lambda: False)
    return order


def test_threads_take_turns_with_a_graph(captures, streams, monkeypatch):
    """A graph has one set of buffers: nobody may write to them before the result is out."""
    inside, most = [], []

    def replay(self, x):
        inside.append(x)
        most.append(len(inside))
        time.sleep(0.002)
        inside.remove(x)
        return self.function(x)

    monkeypatch.setattr(FakeCapture, "__call__", replay)
    graphed = graphs.Graphed(lambda x: 2 * x, [])
    inputs = [OnCuda(i) for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(graphed, inputs)) == [2 * i for i in range(16)]
    assert len(most) >= 14 and max(most) == 1 and len(captures) == 1
    # Each call waits on its stream for the one before, captured or not.
    before = None
    for (_, waited_for, waiting), record in zip(streams[::2], streams[1::2], strict=True):
        assert waited_for is before and record == ("record", waiting)
        before = waiting
    assert len(streams) == 32


class OnCuda(int):
    """What Graphed asks of a tensor on a GPU."""

    is_cuda, shape, dtype, device = True, (1,), torch.float32, "cuda:0"

    def stride(self):
        return (1,)


def test_copies_capture_graphs_of_their_own(captures):
    unet = nn.Conv2d(3, 3, 1)
    run = ReverseLoop(Shrink(unet), NoiseSchedule().reverse_steps(500, 2), modules=[unet])
    x = torch.randn(1, 3, 4, 4)
    graph_of(run, x), graph_of(run, x)
    for twin in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert run.graphed._captured and not twin.graphed._captured
        assert torch.equal(twin(x), run(x))
        graph_of(twin, x)
        with torch.no_grad():
            twin.denoiser.unet.weight.mul_(2)  # seen by the copy's own graphs alone
        assert graph_of(twin, x) is None and graph_of(run, x) is not None


class Shrink:
    def __init__(self, unet):
        self.unet = unet

    def __call__(self, x, level):
        return self.unet(x)


def test_a_graph_without_gain_is_not_used(captures, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(graphs, "CapturedCall", FakeCapture)
    FakeCapture.made = []
    run = ReverseLoop(exact_denoiser("v_prediction"), NoiseSchedule().reverse_steps(500, 2))
    x = gaussian()
    for graph_takes, used in ((5.0, False), (1.0, True)):
        run.forget()
        monkeypatch.setattr(
            graphs, "elapsed",
            lambda call, x, t=graph_takes: t if isinstance(call, FakeCapture) else 2.0,
        )  # fmt: skip
        graph_of(run, x)
        assert (graph_of(run, x) is not None) == used


# ---------------------------------------------------------------------------- on a GPU


def small_unet(dtype=torch.float32):
    torch.manual_seed(0)
    unet = denoisers.create("unet-tiny", 16)
    nn.init.normal_(unet.conv_out.weight, std=0.02)
    return unet.to("cuda", dtype, memory_format=torch.channels_last).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [
    {}, {"eta": 1.0}, {"clip": 2.0, "guidance": 0.2},
    {"dynamic_threshold": (0.9, 2.0), "use_clipped_model_output": True},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_are_the_eager_loop(options, dtype):
    run = ReverseLoop(small_unet(dtype), NoiseSchedule().reverse_steps(700, 4), **options)
    for side in (torch.cuda.Stream(), torch.cuda.current_stream()):
        with torch.cuda.stream(side):
            for n in (2, 5):
                for _ in range(4):
                    x = torch.randn(n, 16, 16, 16, device="cuda")
                    x = x.contiguous(memory_format=torch.channels_last)
                    with torch.inference_mode():
                        assert torch.equal(run(x), run.eager(x))
        torch.cuda.synchronize()
    assert run.graphed._captured


@pytest.mark.gpu
def test_gradients_of_the_eager_loop_are_those_of_the_reference():
    torch.manual_seed(0)
    x, unet = torch.randn(2, 16, 16, 16, device="cuda"), small_unet()
    found = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            run = ReverseLoop(unet, NoiseSchedule().reverse_steps(500, 2))
            leaf = x.clone().requires_grad_()
            with torch.backends.cudnn.flags(allow_tf32=False):
                (gradient,) = torch.autograd.grad(run.eager(leaf).square().sum(), leaf)
        found.append(gradient)
    # With the steps fused, which loses a part of it, the gradient is off by a quarter of its norm.
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-4


@pytest.mark.gpu
def test_a_narrow_network_may_answer_in_the_state_s_dtype():
    x, steps = torch.randn(2, 3, 4, 4), NoiseSchedule().reverse_steps(500, 3)
    with torch.no_grad():
        got = ReverseLoop(Narrow(torch.float32).cuda(), steps).run(x.cuda()).cpu()
        expected = ReverseLoop(Narrow(torch.float32), steps).run(x)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_new_weights_are_seen():
    unet = small_unet()
    run = ReverseLoop(unet, NoiseSchedule().reverse_steps(700, 4))
    x = torch.randn(2, 16, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    before = [run(x) for _ in range(3)][-1]
    with torch.no_grad():
        unet.conv_out.bias.add_(0.1)
    for _ in range(3):
        after = run(x)
        assert not torch.equal(after, before) and torch.equal(after, run.eager(x))


@pytest.mark.gpu
def test_the_loop_does_not_wait_for_the_device():
    run = ReverseLoop(small_unet(), NoiseSchedule().reverse_steps(700, 4), eta=1.0)
    x = torch.randn(2, 16, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        run(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            run.eager(x)
        run(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_steps_are_the_steps_of_the_cpu(cuda, dtype, side, layout):
    """In-kernel noise included: the same Philox numbers, whatever the layout."""
    steps = NoiseSchedule("linear").reverse_steps(700, 3)
    x, y = (torch.randn(2, 8, side, side).to(memory_format=layout) for _ in range(2))
    for limits in ({"clip": 0.8}, {}, {"dynamic_threshold": (0.9, 1.5)}):
        clip = 1.0 if "dynamic_threshold" in limits else limits.get("clip")
        table = ops.diffusion.step_table(steps, "v_prediction", 0.7, clip, 0.2).to(cuda)
        counter = torch.zeros(2, dtype=torch.int32, device=cuda)
        state, expected = x.to(cuda, copy=True), x
        following = torch.empty_like(state, dtype=dtype)
        for i, step in enumerate(steps):
            m = torch.randn(2, 8, side, side).to(dtype).to(memory_format=layout)
            noise = reference.philox_normal((1, 8, side, side), 3, step=i + 1)
            torch.ops.diffad_fast.ddim_loop_step_(
                state, m.to(cuda), y.to(cuda), table, counter, following, 3, 0,
                *limits.get("dynamic_threshold", (-1.0, 1.0)),
            )  # fmt: skip
            expected = reference.ddim_step(expected, m, *step[:2], "v_prediction", 0.7, noise,
                                           guidance=(y, 0.2), **limits)  # fmt: skip
            torch.testing.assert_close(state.cpu(), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(following, state.to(dtype))
        assert counter.tolist() == [0, 0]
