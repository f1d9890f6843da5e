"""q_sample and ddim_step against diffusers and against the equations in NumPy, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_fast import native, ops, reference, use_backend
from diffad_fast.errors import BackendError

PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def random(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def alphas(steps=1000):
    beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    return torch.cumprod(1 - beta, dim=0)


def by_formula(x, m, a, b, prediction="epsilon", eta=0.0, z=0.0, limit=None, recompute=False,
               guidance=None):  # fmt: skip
    """DDIM, eq. 12 of Song et al. 2021, for one sample in NumPy."""
    if prediction == "epsilon":
        e, x0 = m, (x - np.sqrt(1 - a) * m) / np.sqrt(a)
    elif prediction == "sample":
        e, x0 = (x - np.sqrt(a) * m) / np.sqrt(1 - a), m
    else:
        e, x0 = np.sqrt(a) * m + np.sqrt(1 - a) * x, np.sqrt(a) * x - np.sqrt(1 - a) * m
    if guidance is not None:
        y, w = guidance
        e = e - w * np.sqrt(1 - a) * (np.sqrt(a) * y + np.sqrt(1 - a) * e - x)
        x0 = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
    if limit is not None:
        x0 = limit(x0)
    if recompute:
        e = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
    sigma = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b) if eta else 0.0
    return np.sqrt(b) * x0 + np.sqrt(1 - b - sigma**2) * e + sigma * z


def imagen_threshold(ratio, largest):
    def limit(x0):
        s = np.clip(np.quantile(np.abs(x0), ratio), 1, largest)
        return np.clip(x0, -s, s) / s

    return limit


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 7), (3,)])
@pytest.mark.parametrize("table", [torch.float64, torch.float32])
def test_q_sample(backend, shape, table):
    x0, noise, t = random(shape, 0), random(shape, 1), torch.tensor([0, 999, 500])
    a = alphas().to(table)
    got = ops.q_sample(x0, t, noise, a)
    for i in range(3):
        level = a[t[i]].double().numpy()
        expected = np.sqrt(level) * x0[i].numpy() + np.sqrt(1 - level) * noise[i].numpy()
        atol = 1e-14 if table == torch.float64 else 1e-6
        np.testing.assert_allclose(got[i].numpy(), expected, rtol=0, atol=atol)
    shared = ops.q_sample(x0, t, noise[:1], a)
    assert torch.equal(shared, ops.q_sample(x0, t, noise[:1].expand(shape).clone(), a))


def test_q_sample_against_diffusers(backend):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    x0, noise, t = random((4, 3, 6, 6), 0), random((4, 3, 6, 6), 1), torch.tensor([1, 20, 300, 998])
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    expected = scheduler.add_noise(x0, noise, t)
    got = ops.q_sample(x0, t, noise, scheduler.alphas_cumprod)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype, atol", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_is_computed_in_float32(backend, dtype, atol):
    x, m, z = (random((2, 3, 8, 8), s, dtype) for s in range(3))
    a = alphas()
    got = ops.q_sample(x, torch.tensor([3, 990]), m, a)
    wide = ops.q_sample(x.double(), torch.tensor([3, 990]), m.double(), a)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)
    got = ops.ddim_step(x, m, 0.3, 0.5, eta=1.0, noise=z)
    wide = ops.ddim_step(x.double(), m.double(), 0.3, 0.5, eta=1.0, noise=z.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)


LIMITS = {
    "none": ({}, {"clip_sample": False}),
    "clip": ({"clip": 0.8}, {"clip_sample": True, "clip_sample_range": 0.8}),
    "threshold": (
        {"dynamic_threshold": (0.9, 1.5)},
        {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.9,
         "sample_max_value": 1.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_against_diffusers(backend, prediction, limit, spacing):
    """Every step of a schedule, eta 0 and 1, epsilon recomputed or not, final abar 1 or not."""
    diffusers = pytest.importorskip("diffusers")
    ours, theirs = LIMITS[limit]
    for to_one in (True, False):
        scheduler = diffusers.DDIMScheduler(
            prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=to_one, **theirs
        )
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        scheduler.set_timesteps(7)
        for i, t in enumerate(scheduler.timesteps.tolist()):
            x, m, z = (random((2, 3, 4, 5), 3 * i + s) for s in range(3))
            previous = t - 1000 // 7
            a = scheduler.alphas_cumprod[t]
            b = scheduler.alphas_cumprod[previous] if previous >= 0 else None
            b = scheduler.final_alpha_cumprod if b is None else b
            for eta in (0.0, 1.0):
                for recompute in (False, True):
                    expected = scheduler.step(
                        m, t, x, eta=eta, use_clipped_model_output=recompute, variance_noise=z
                    ).prev_sample
                    got = ops.ddim_step(
                        x, m, float(a), float(b), prediction, eta, z,
                        use_clipped_model_output=recompute, **ours,
                    )  # fmt: skip
                    # 1/sqrt(abar) is up to 160, times the size of the numbers here.
                    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("limit", ["none", "clip", "threshold"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_against_formula_with_a_level_per_sample(
    backend, prediction, eta, limit, recompute, guided
):
    x, m, z, y = (random((3, 2, 4, 3), s) * 1.5 for s in range(4))
    a, b = torch.tensor([0.01, 0.5, 0.9]).double(), torch.tensor([0.03, 1.0, 0.95]).double()
    limits = {"none": None, "clip": lambda v: np.clip(v, -0.7, 0.7),
              "threshold": imagen_threshold(0.8, 2.0)}  # fmt: skip
    options = {"none": {}, "clip": {"clip": 0.7}, "threshold": {"dynamic_threshold": (0.8, 2.0)}}
    got = ops.ddim_step(
        x, m, a, b, prediction, eta, z if eta else None, use_clipped_model_output=recompute,
        guidance=(y, 0.6) if guided else None, **options[limit],
    )  # fmt: skip
    for i in range(3):
        expected = by_formula(
            x[i].numpy(), m[i].numpy(), a[i].item(), b[i].item(), prediction, eta, z[i].numpy(),
            limits[limit], recompute, (y[i].numpy(), 0.6) if guided else None,
        )  # fmt: skip
        np.testing.assert_allclose(got[i].numpy(), expected, rtol=0, atol=1e-12)
        alone = ops.ddim_step(
            x[i : i + 1], m[i : i + 1], a[i].item(), b[i], prediction, eta, z[:1] * 0 + z[i],
            use_clipped_model_output=recompute,
            guidance=(y[i : i + 1], 0.6) if guided else None, **options[limit],
        )  # fmt: skip
        torch.testing.assert_close(alone[0], got[i], rtol=0, atol=1e-13)


def test_inversion_and_back(backend):
    """With one prediction for both, the step from s to t undoes the step from t to s."""
    x, e = random((2, 3, 4, 4), 0), random((2, 3, 4, 4), 1)
    up = ops.ddim_step(x, e, 0.9, 0.2)
    np.testing.assert_allclose(
        up.numpy(), by_formula(x.numpy(), e.numpy(), 0.9, 0.2), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(ops.ddim_step(up, e, 0.2, 0.9), x, rtol=0, atol=1e-14)


def test_guidance_worked_by_hand(backend):
    """abar = 0.36, so sqrt(abar) = 0.6 and sqrt(1 - abar) = 0.8; to abar = 1.

    x_t = 1, epsilon = 0.5, y = 2: y_t = 1.2 + 0.4 = 1.6; w = 0.5:
    epsilon' = 0.5 - 0.5 * 0.8 * 0.6 = 0.26; x0 = (1 - 0.8 * 0.26) / 0.6 = 1.32,
    where without guidance it is (1 - 0.4) / 0.6 = 1. It moved towards y.
    """
    x, e, y = (torch.full((1, 1), v, dtype=torch.float64) for v in (1.0, 0.5, 2.0))
    assert ops.ddim_step(x, e, 0.36, 1.0).item() == pytest.approx(1.0, abs=1e-14)
    guided = ops.ddim_step(x, e, 0.36, 1.0, guidance=(y, 0.5))
    assert guided.item() == pytest.approx(1.32, abs=1e-14)
    clipped = ops.ddim_step(x, e, 0.36, 1.0, guidance=(y, 0.5), clip=1.1)
    assert clipped.item() == pytest.approx(1.1, abs=1e-14)


def test_thresholding_worked_by_hand(backend):
    """Five values, ratio 0.75: the quantile of |x0| is the fourth, limited to [1, 2]."""
    x0 = torch.tensor([[0.1, -0.2, 0.3, 0.4, 0.5], [1, -2, 1.2, 1.6, 0], [3, 4, -5, 6, 1]]).double()
    got = ops.ddim_step(x0, x0, 0.5, 1.0, "sample", dynamic_threshold=(0.75, 2.0))
    expected = [
        [0.1, -0.2, 0.3, 0.4, 0.5],  # s = 0.4, raised to 1
        [0.625, -1, 0.75, 1, 0],  # s = 1.6
        [1, 1, -1, 1, 0.5],  # s = 5, lowered to 2
    ]
    torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=0, atol=1e-7)


def test_perfect_predictions_give_the_perfect_sample(backend):
    x0, e, a = random((2, 5), 0), random((2, 5), 1), 0.3
    x_t = a**0.5 * x0 + (1 - a) ** 0.5 * e
    v = a**0.5 * e - (1 - a) ** 0.5 * x0
    for prediction, m in [("epsilon", e), ("sample", x0), ("v_prediction", v)]:
        for eta in (0.0, 1.0):
            got = ops.ddim_step(x_t, m, a, 1.0, prediction, eta, torch.zeros_like(x_t))
            torch.testing.assert_close(got, x0, rtol=0, atol=1e-14)


def test_channels_last_is_kept(backend):
    x, m = (random((2, 3, 4, 5), s).contiguous(memory_format=torch.channels_last) for s in (0, 1))
    for options in ({}, {"dynamic_threshold": (0.9, 2.0)}):
        got = ops.ddim_step(x, m, 0.3, 0.5, **options)
        assert got.is_contiguous(memory_format=torch.channels_last)
        plain = ops.ddim_step(x.contiguous(), m.contiguous(), 0.3, 0.5, **options)
        torch.testing.assert_close(got, plain, rtol=0, atol=1e-14)
    t = torch.zeros(2, dtype=torch.int64)
    assert ops.q_sample(x, t, m, alphas()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradients(backend, prediction):
    inputs = [random((2, 3), s).requires_grad_() for s in range(4)]
    inputs += [torch.tensor([0.3, 0.6]).double().requires_grad_(),
               torch.tensor([0.4, 0.7]).double().requires_grad_()]  # fmt: skip

    def step(x, m, z, y, a, b):
        return ops.ddim_step(x, m, a, b, prediction, 0.5, z, guidance=(y, 0.3))

    assert torch.autograd.gradcheck(step, inputs)
    t = torch.tensor([4, 900])
    assert torch.autograd.gradcheck(lambda x, z: ops.q_sample(x, t, z, alphas()), inputs[:2])


def test_gradients_of_a_schedule_that_is_learnt():
    table = torch.linspace(0.9, 0.2, 6).double().requires_grad_()
    x, z = random((2, 3), 0), random((2, 3), 1)
    t = torch.tensor([4, 1])
    assert torch.autograd.gradcheck(lambda a: ops.q_sample(x, t, z, a), table)
    assert torch.autograd.gradcheck(lambda a: ops.noised_target(x, t, z, a)[:2], table)
    if native.loaded():
        with use_backend("cpu"), pytest.raises(BackendError, match="for alphas_cumprod"):
            ops.q_sample(x, t, z, table)


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"eta": 0.5}, ValueError, "eta = 0.5 needs noise"),
        ({"eta": 1.5}, ValueError, "eta must be in"),
        ({"eta": 1.0, "noise": X, "alpha_t": 0.6}, ValueError, "inversion is deterministic"),
        ({"prediction_type": "v"}, ValueError, "unknown prediction_type 'v'"),
        ({"alpha_t": 0.0}, ValueError, "alpha_t must be above 0"),
        ({"alpha_s": 1.2}, ValueError, "alpha_s must be in"),
        ({"alpha_t": 1.0, "prediction_type": "sample"}, ValueError, "alpha_t must be below 1"),
        ({"alpha_t": 1, "use_clipped_model_output": True}, ValueError, "alpha_t must be below 1"),
        ({"alpha_t": 1.0, "alpha_s": 1.0, "eta": 0.5, "noise": X}, ValueError, "must be below 1"),
        ({"alpha_t": torch.ones(3)}, ValueError, r"alpha_t must have shape \(2,\), got \(3,\)"),
        ({"alpha_t": torch.ones(2, dtype=torch.int64)}, TypeError, "alpha_t must be float32"),
        ({"alpha_s": torch.tensor(0.5, device="meta")}, ValueError, "alpha_s is on meta"),
        ({"model_output": X[:1]}, ValueError, "model_output must have shape"),
        ({"noise": X[:, :2]}, ValueError, "noise must have the shape of x_t"),
        ({"clip": 1.0, "dynamic_threshold": (0.9, 1.0)}, ValueError, "not both"),
        ({"clip": -1.0}, ValueError, "clip must be in"),
        ({"dynamic_threshold": (1.9, 1.0)}, ValueError, "ratio of dynamic_threshold must be in"),
        ({"dynamic_threshold": (0.9, 0.5)}, ValueError, "maximum of dynamic_threshold must be in"),
        ({"guidance": X}, ValueError, r"guidance must be \(y, w\)"),
        ({"guidance": (X[0], 1.0)}, ValueError, "y of guidance must have shape"),
        ({"guidance": (X, None)}, TypeError, "w of guidance must be a number"),
        ({"x_t": X.long()}, TypeError, "x_t must be float32"),
    ],
)
def test_bad_arguments_of_ddim_step(change, error, message):
    arguments = {"x_t": X, "model_output": X, "alpha_t": 0.3, "alpha_s": 0.5}
    with pytest.raises(error, match=message):
        ops.ddim_step(**{**arguments, **change})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"t": torch.zeros(2)}, TypeError, "t must be an int64 tensor, got torch.float32"),
        ({"t": 3}, TypeError, "t must be an int64 tensor, got int"),
        ({"t": torch.zeros(3, dtype=torch.int64)}, ValueError, r"t must have shape \(2,\)"),
        ({"noise": X[:, :1]}, ValueError, "noise must have the shape of x0"),
        ({"alphas_cumprod": alphas()[None]}, ValueError, "alphas_cumprod must have 1 dim"),
        ({"alphas_cumprod": [0.5]}, TypeError, "alphas_cumprod must be a torch.Tensor"),
    ],
)
def test_bad_arguments_of_q_sample(change, error, message):
    arguments = {"x0": X, "t": torch.tensor([0, 1]), "noise": X, "alphas_cumprod": alphas()}
    with pytest.raises(error, match=message):
        ops.q_sample(**{**arguments, **change})


# ------------------------------------------------------------------- the C++ operators

# A small multiple of what the reference itself loses in float32; then the rounding of the result.
ATOL = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
RTOL = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OPTIONS = {
    "plain": {},
    "clip": {"clip": 0.8},
    "clip, epsilon recomputed": {"clip": 0.8, "use_clipped_model_output": True},
    "threshold": {"dynamic_threshold": (0.7, 1.6)},
    "noise": {"eta": 0.7},
    "guidance": {"guidance": 0.4},
    "all": {"eta": 1.0, "guidance": 0.4, "dynamic_threshold": (0.9, 1.5),
            "use_clipped_model_output": True},
}  # fmt: skip


def step_of(functions, x, m, z, y, a, b, prediction="v_prediction", **options):
    """ddim_step with z as the noise where eta asks for it, y as the input to be guided to."""
    options = dict(options)
    if "guidance" in options:
        options["guidance"] = (y, options["guidance"])
    noise = z if options.get("eta") else None
    return functions.ddim_step(x, m, a, b, prediction, noise=noise, **options)


def close_to_float64(got, arguments, **options):
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    expected = step_of(reference, *wide, **options)
    torch.testing.assert_close(got.double(), expected, rtol=RTOL[got.dtype], atol=ATOL[got.dtype])


SHAPES = [(1, 1), (3, 7), (2, 3, 17, 5), (1, 1, 1, 13), (2, 4100)]


def is_the_reference_in_float64(shape, options, device="cpu"):
    """All pairs of dtypes, a level per sample, odd sizes; 4100 elements are three tiles."""
    levels = torch.tensor([0.3, 0.7, 0.5], device=device).double()[: shape[0]]
    for dtype in RTOL:
        for others in RTOL:
            x = random(shape, 0, dtype).to(device)
            m, z, y = (random(shape, s, others).to(device) for s in (1, 2, 3))
            for a, b in ((levels, (levels + 1) / 2), (0.3, 0.6)):
                got = step_of(ops, x, m, z, y, a, b, **options)
                assert got.dtype == dtype and got.shape == shape
                close_to_float64(got, (x, m, z, y, a, b), **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_the_reference_in_float64(cpu_isa, shape, options):
    with use_backend("cpu"):
        is_the_reference_in_float64(shape, options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_is_the_reference_in_float64(cuda, shape, options):
    is_the_reference_in_float64(shape, options, cuda)


@pytest.mark.parametrize("name", OPTIONS)
def test_cuda_takes_numbers_of_eight(cuda, name):
    """Whole packs in a sample: accesses of 16 bytes; and samples that share an operand."""
    for size, shared in ((264, False), (1024, True)):
        x, m, z, y = (random((3, size), s, torch.float32).to(cuda) for s in range(4))
        if shared:
            m, z, y = (t[:1] for t in (m.bfloat16(), z, y))
            m, z, y = (t.expand(3, size) for t in (m, z, y))
        got = step_of(ops, x, m, z, y, 0.3, 0.6, **OPTIONS[name])
        close_to_float64(got, (x, m, z, y, 0.3, 0.6), **OPTIONS[name])


def layouts(x):
    """The same numbers in other strides."""
    n, c, h, w = x.shape
    wide = x.new_full((2 * n, c + 2, h, 2 * w), float("nan"))
    wide[::2, 1:-1, :, ::2] = x
    yield "contiguous", x.contiguous()
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "batch inside", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "sliced", wide[::2, 1:-1, :, ::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_in_any_pair(compiled, dtype):
    x, m, z, y = (random((3, 4, 5, 6), s, torch.float32).to(compiled) for s in range(4))
    x = x.to(dtype)
    options = {"eta": 0.5, "guidance": 0.2, "dynamic_threshold": (0.8, 1.5)}
    t, table = torch.tensor([3, 500, 9], device=compiled), alphas().to(compiled)
    expected = step_of(ops, x, m, z, y, 0.3, 0.6, **options)
    expected_q = ops.q_sample(x, t, m, table)
    for name, x_ in layouts(x):
        for other, m_ in layouts(m):
            got = step_of(ops, x_, m_, dict(layouts(z))[other], y, 0.3, 0.6, **options)
            assert torch.equal(got, expected), (name, other)
            got = ops.q_sample(x_, t, m_, table)
            assert torch.equal(got, expected_q), (name, other)
            assert got.stride() == ops.diffusion.fake_step(x_).stride(), (name, other)
        dense = name in ("contiguous", "channels_last", "transposed")
        assert got.stride() == (x_.stride() if dense else x.stride()), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_noise_of_one_sample_serves_all(compiled, layout):
    x, m = (
        random((3, 4, 5, 6), s, torch.float32).to(compiled, memory_format=layout) for s in range(2)
    )
    z = random((1, 4, 5, 6), 2, torch.float32).to(compiled)
    full = ops.ddim_step(x, m, 0.3, 0.6, eta=1.0, noise=z.expand(x.shape).contiguous())
    for noise in (z, z.expand(x.shape), z.to(memory_format=layout)):
        assert torch.equal(ops.ddim_step(x, m, 0.3, 0.6, eta=1.0, noise=noise), full)
    t, table = torch.tensor([1, 2, 3], device=compiled), alphas().to(compiled)
    full = ops.q_sample(x, t, z.expand(x.shape).contiguous(), table)
    assert torch.equal(ops.q_sample(x, t, z.expand(x.shape), table), full)
    # Expanded operands other than the noise.
    got = ops.ddim_step(x[:1].expand(x.shape), m[:1].expand(x.shape), 0.3, 0.6)
    assert torch.equal(got[2], ops.ddim_step(x[:1], m[:1], 0.3, 0.6)[0])


def test_empty_tensors(compiled):
    for shape in ((0, 3, 4), (2, 0, 4), (0,)):
        x = torch.empty(shape, device=compiled)
        assert ops.ddim_step(x, x, 0.3, 0.6, clip=1.0).shape == shape
        assert ops.ddim_step(x, x, 0.3, 0.6, dynamic_threshold=(0.5, 2.0)).shape == shape
        t = torch.zeros(shape[0], dtype=torch.int64, device=compiled)
        assert ops.q_sample(x, t, x, alphas().to(compiled)).shape == shape


def test_outputs_are_fully_written(cpu_isa, written):
    for size in (1, 7, 8, 2048, 2049, 5000):
        for dtype in RTOL:
            x = random((2, size), 0, dtype)
            assert written(ops.ddim_step(x, x, 0.3, 0.6, clip=1.0))
            assert written(ops.q_sample(x, torch.tensor([0, 9]), x, alphas()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nan_is_not_hidden(compiled, options):
    x = random((2, 9), 0, torch.float32).to(compiled)
    x[1, 3] = float("nan")
    got = step_of(ops, x, x, x, x, 0.3, 0.6, **options)
    assert got[1, 3].isnan() and got[0].isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("size", [1, 2, 5, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_quantile_is_exact(compiled, dtype, size, ratio):
    """Bit for bit that of a sort: the reference's, where s has to be the limit of a huge x0."""
    x = random((4, size), 0, dtype) * torch.tensor([[1e-3], [1.5], [3], [1e4]], dtype=dtype)
    x[2, ::2] = x[2, 0]  # ties
    x = x.to(compiled)
    options = {"prediction_type": "sample", "dynamic_threshold": (ratio, 1e30)}
    got = ops.ddim_step(x, x, 0.5, 1.0, **options)
    expected = reference.ddim_step(x, x, 0.5, 1.0, **options)
    # The division by s is a product with 1/s.
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_negative_zero_is_not_the_largest(compiled, dtype):
    x = torch.full((1, 1000), -0.0, dtype=dtype)
    x[0, :100] = torch.linspace(1, 9, 100)
    x = x.to(compiled)
    options = {"prediction_type": "sample", "dynamic_threshold": (0.95, 100.0)}
    got = ops.ddim_step(x, x, 0.5, 1.0, **options)
    expected = reference.ddim_step(x, x, 0.5, 1.0, **options)
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_infinity_stays_infinite(compiled):
    x, m = random((2, 9), 0, torch.float32).to(compiled), torch.ones(2, 9).to(compiled)
    x[1, 3] = float("inf")
    t, table = torch.tensor([0, 9]).to(compiled), alphas().to(compiled)
    for got in (ops.ddim_step(x, m, 0.3, 0.6), ops.q_sample(x, t, m, table)):
        assert got[1, 3] == float("inf") and got.isfinite().sum() == 17


@pytest.mark.native
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_threads_do_not_change_a_bit(by_threads, options):
    x, m, z, y = (random((3, 5, 81, 83), s, torch.float32) for s in range(4))
    t = torch.tensor([1, 2, 3])

    def both():
        step = step_of(ops, x, m, z[:1], y, 0.3, 0.6, **options)
        return step, ops.q_sample(x, t, m, alphas())

    by_threads(both)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradients_of_all_options(backend, prediction, options):
    inputs = [random((2, 3), s).requires_grad_() for s in range(4)]
    inputs += [torch.tensor([0.3, 0.6]).double().requires_grad_(),
               torch.tensor([0.4, 0.7]).double().requires_grad_()]  # fmt: skip
    assert torch.autograd.gradcheck(
        lambda *x: step_of(ops, *x, prediction=prediction, **options), inputs
    )


def test_gradients_with_numbers_and_shared_noise(backend):
    x, m, z = (random((2, 3), s).requires_grad_() for s in range(3))
    z = z[:1].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, z: ops.ddim_step(x, m.detach(), 0.3, 0.5, eta=1.0, noise=z, clip=1.0), (x, z)
    )
    t = torch.tensor([4, 900])
    assert torch.autograd.gradcheck(lambda x, z: ops.q_sample(x, t, z, alphas()), (x, z))
    # The gradient of a sum has stride 0.
    ops.q_sample(x, t, z, alphas()).sum().backward()
    expected = alphas()[t].sqrt()[:, None].expand(2, 3)
    torch.testing.assert_close(x.grad, expected, rtol=1e-14, atol=0)


@pytest.mark.native
def test_opcheck():
    x, m, z, y = (random((2, 3, 4, 5), s, torch.float32) for s in range(4))
    a, b = torch.tensor([0.3, 0.5]), torch.tensor([0.6, 0.8])
    last = x.to(memory_format=torch.channels_last)
    step, q_sample = torch.ops.diffad_fast.ddim_step, torch.ops.diffad_fast.q_sample
    inf = float("inf")
    for arguments in (
        (x.clone().requires_grad_(), m, None, None, None, None, 0.3, 0.6, 0, 0.0, 0.0, inf, -1.0,
         1.0, False),
        (last, m, a, b, z[:1], y, 0.0, 0.0, 2, 0.5, 0.1, 1.0, -1.0, 1.0, True),
        (x.transpose(0, 1), m.transpose(0, 1), None, None, None, None, 0.3, 0.6, 1, 0.0, 0.0, inf,
         0.9, 2.0, False),
    ):  # fmt: skip
        torch.library.opcheck(step.default, arguments)
    t = torch.tensor([1, 2])
    for x_ in (x.clone().requires_grad_(), last, x[:, ::2], x.bfloat16()):
        noise = m[:, : x_.shape[1]]
        torch.library.opcheck(q_sample.default, (x_, t, noise, alphas()))


def test_compiles_as_one_graph(backend):
    def loop(x, m, t):
        x = ops.q_sample(x, t, m, alphas().float())
        x = ops.ddim_step(x, m, 0.3, 0.6, "v_prediction", clip=1.0, guidance=(x, 0.1))
        return ops.ddim_step(x, m, torch.full((len(x),), 0.6), 1.0)

    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        x, m = (random((n, 3, 4), s, torch.float32).requires_grad_() for s in range(2))
        t = torch.arange(n)
        torch.testing.assert_close(compiled(x, m, t), loop(x, m, t))
        ours, theirs = (
            torch.autograd.grad(f(x, m, t).square().sum(), (x, m)) for f in (compiled, loop)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.native
@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    name=st.sampled_from(list(OPTIONS)),
    shared=st.booleans(),
)
def test_random_shapes_and_layouts(shape, order, name, shared):
    """Operands in a random order of their axes each."""

    def shuffled(x):
        axes = list(range(x.dim()))
        order.shuffle(axes)
        back = [axes.index(i) for i in range(x.dim())]
        return x.permute(axes).contiguous().permute(back)

    x, m, z, y = (shuffled(random(shape, s, torch.float32)) for s in range(4))
    if shared:
        z = z[:1]
    if shape[0] == 0:
        z = torch.empty(shape)
    got = step_of(ops, x, m, z, y, 0.3, 0.6, **OPTIONS[name])
    if x.numel():
        close_to_float64(got, (x, m, z, y, 0.3, 0.6), **OPTIONS[name])
    assert got.shape == x.shape


@pytest.mark.native
def test_the_bare_operators_guard_their_memory():
    x = torch.zeros(2, 3)
    step, q_sample = torch.ops.diffad_fast.ddim_step, torch.ops.diffad_fast.q_sample

    def call(x=x, m=x, a=None, noise=None, guide=None, prediction=0, eta=0.0):
        step(x, m, a, None, noise, guide, 0.3, 0.6, prediction, eta, 0.0, 1.0, -1.0, 1.0, False)

    for change in (
        {"m": x[:, :2]}, {"m": x[:1]}, {"m": x[0]}, {"a": torch.ones(3)}, {"prediction": 3},
        {"eta": 1.0}, {"eta": 1.0, "noise": x[:, :1]}, {"guide": x[:1]}, {"x": x.int()},
        {"m": x.int()}, {"x": torch.tensor(0.0), "m": torch.tensor(0.0)},
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            call(**change)
    t = torch.tensor([0, 1])
    for x_, t_, z_, table in (
        (x, torch.tensor([0, 1000]), x, alphas()),
        (x, torch.tensor([-1001, 0]), x, alphas()),
        (x, t[:1], x, alphas()),
        (x, t.int(), x, alphas()),
        (x, t, x[:, :1], alphas()),
        (x, t, x, alphas()[None]),
        (x, t, x, t),
    ):
        with pytest.raises(RuntimeError):
            q_sample(x_, t_, z_, table)


def test_dynamic_thresholds_are_exported_for_batches_of_any_length():
    class Step(torch.nn.Module):
        def forward(self, x_t, output):
            with use_backend("reference"):
                return ops.ddim_step(x_t, output, 0.3, 0.5, dynamic_threshold=(0.9, 3.0))

    generator = torch.Generator().manual_seed(0)
    inputs = tuple(3 * torch.randn(5, 2, 4, 4, generator=generator) for _ in range(2))
    batch = torch.export.Dim("batch")
    program = torch.export.export(Step(), inputs, dynamic_shapes=({0: batch}, {0: batch}))
    fewer = tuple(x[:3] for x in inputs)
    torch.testing.assert_close(program.module()(*fewer), Step()(*fewer))
