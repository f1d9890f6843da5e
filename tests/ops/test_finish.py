"""ddim_finish against its parts, float64 and PyWavelets."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch

from diffad_fast import ops, reference, use_backend
from diffad_fast.diffusion import NoiseSchedule
from diffad_fast.errors import BackendError

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def problem(level=2, channels=1, n=2, rows=3, cols=5, dtype=torch.float32, last=True, seed=0):
    """x_t, model_output, alpha_t, images, mean, deviation, level; and a guide."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    layout = LAYOUTS["channels_last" if last else "contiguous"]
    packed, r = channels * 4**level, 2**level
    x, m, y = (random(n, packed, rows, cols).to(memory_format=layout) for _ in range(3))
    images = random(n, channels, rows * r, cols * r) / 2 + 0.5
    return (x, m, 0.3, images, random(packed) / 3, random(packed).abs() + 0.2, level), y


def doubled(arguments):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]


def check(got, arguments, tolerance, guide=None, **options):
    if guide is not None:
        options["guidance"] = (guide.double(), 0.2)
    expected = reference.ddim_finish(*doubled(arguments), **options)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        scale = 1 + float(b.abs().max()) if b.numel() else 1
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale, msg=name)


def test_the_reference_is_what_pywavelets_says():
    arguments, _ = problem(level=3, channels=2, dtype=torch.float64)
    x, m, alpha, images, mean, deviation, level = arguments
    end = reference.ddim_finish(*arguments, prediction_type="v_prediction", clip=1.1)
    x0 = (alpha**0.5 * x - (1 - alpha) ** 0.5 * m).clamp(-1.1, 1.1)
    torch.testing.assert_close(end.x0, x0, rtol=1e-14, atol=1e-14)
    coefficients = (x0 * deviation[:, None, None] + mean[:, None, None]).numpy()
    letters = "ahvd"
    for n in range(2):
        for c in range(2):
            packet = pywt.WaveletPacket2D(None, "haar", "periodization")
            for band in range(4**level):
                digits = (band // 16, band // 4 % 4, band % 4)
                # PyWavelets names the finest split first, the channel's leading digit the coarsest.
                path = "".join(letters[d] for d in reversed(digits))
                packet[path] = coefficients[n, band * 2 + c]
            image = packet.reconstruct(update=False)
            np.testing.assert_allclose(end.x_hat[n, c].numpy(), image, rtol=0, atol=1e-12)
    difference = (images - end.x_hat).numpy()
    np.testing.assert_allclose(end.pixel.numpy(), np.abs(difference).mean(axis=1), atol=1e-13)
    low, *details = pywt.wavedec2(difference, "haar", "periodization", level)
    bands = [(level, low)]
    bands += [(level - i, band) for i, three in enumerate(details) for band in three]
    total = sum(
        np.kron(np.abs(band).mean(axis=1), np.ones((1, 2**depth, 2**depth)))
        for depth, band in bands
    )
    np.testing.assert_allclose(end.sub_band.numpy(), total, atol=1e-12)


@pytest.mark.native
@pytest.mark.parametrize("level", range(5))
def test_native_is_the_reference_in_float64(cpu_isa, level):
    for channels in (1, 3):
        for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
            for last in (True, False):
                arguments, y = problem(level, channels, dtype=dtype, last=last)
                for kind, options in (
                    ("epsilon", {}),
                    ("v_prediction", {"clip": 0.8}),
                    ("sample", {"clamp": True, "guide": y}),
                ):
                    guide = options.pop("guide", None)
                    given = dict(options) if guide is None else {**options, "guidance": (y, 0.2)}
                    with use_backend("cpu"):
                        got = ops.ddim_finish(*arguments, prediction_type=kind, **given)
                    assert {t.dtype for t in got} == {dtype}
                    layout = LAYOUTS["channels_last" if last else "contiguous"]
                    assert got.x0.is_contiguous(memory_format=layout) and got.x_hat.is_contiguous()
                    check(got, arguments, tolerance, guide, prediction_type=kind, **options)


@pytest.mark.native
def test_native_takes_narrow_outputs_and_any_strides():
    (x, m, *rest), _ = problem(2, 3)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for other in (m.contiguous(), m.transpose(2, 3).contiguous().transpose(2, 3)):
            arguments = (x[:, :, :, ::2], other.to(dtype)[:, :, :, ::2], *rest)
            images = rest[1].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            arguments = (*arguments[:3], images[..., :12], *arguments[4:])
            got = ops.ddim_finish(*arguments, prediction_type="sample", clip=2.0)
            check(got, arguments, 2e-6, prediction_type="sample", clip=2.0)


@pytest.mark.native
def test_native_is_the_step_the_transform_and_the_map_bit_by_bit():
    arguments, _ = problem(3, 1, rows=4, cols=4)
    x, m, alpha, images, mean, deviation, level = arguments
    end = ops.ddim_finish(*arguments, prediction_type="v_prediction", clip=1.5)
    assert torch.equal(end.x0, ops.ddim_step(x, m, alpha, 1.0, "v_prediction", clip=1.5))
    for i, weights in ((0, (1.0, 0.0, 0.0)), (1, (0.0, 0.0, 1.0))):
        map_, _ = ops.anomaly_map(images, end.x_hat, weights=weights, levels=level, sigma=0.0)
        assert torch.equal(end[2 + i], map_)


@pytest.mark.native
def test_samples_and_threads_do_not_change_a_bit(by_threads):
    arguments, _ = problem(2, 3, n=3, rows=40, cols=40)
    whole = by_threads(lambda: ops.ddim_finish(*arguments))
    one = [t[1:2] if isinstance(t, torch.Tensor) and t.ndim == 4 else t for t in arguments]
    for a, b in zip(whole, ops.ddim_finish(*one), strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.native
def test_nan_stays_where_it_is_and_empty_batches_pass(cpu_isa, written):
    (x, *rest), _ = problem(2, 1)
    x[1, 3, 2, 4] = float("nan")
    end = ops.ddim_finish(x, *rest, clip=1.0, clamp=True)
    assert all(written(found.nan_to_num(0.0)) for found in end)
    assert int(end.x0.isnan().sum()) == 1
    block = torch.zeros(2, 12, 20, dtype=torch.bool)
    block[1, 8:12, 16:20] = True
    for found in (end.x_hat[:, 0], end.pixel, end.sub_band):
        assert torch.equal(found.isnan(), block)
    arguments, _ = problem(2, 1, n=0)
    assert [tuple(t.shape) for t in ops.ddim_finish(*arguments)] == [
        (0, 16, 3, 5), (0, 1, 12, 20), (0, 12, 20), (0, 12, 20),
    ]  # fmt: skip


def test_gradients_are_those_of_the_reference():
    arguments, _ = problem(1, 1, dtype=torch.float64)
    x, m, alpha, images, mean, deviation, level = arguments
    leaves = [t.clone().requires_grad_() for t in (x, m, images, mean, deviation)]

    def call(x, m, images, mean, deviation):
        return tuple(ops.ddim_finish(x, m, alpha, images, mean, deviation, level, clip=9.0))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.native
def test_opcheck_and_compile():
    for last in (True, False):
        (x, m, alpha, images, mean, deviation, level), y = problem(2, 3, last=last)
        arguments = (x, m, y, images, mean, deviation, alpha, level, 2, 0.2, 1.0, True)
        torch.library.opcheck(torch.ops.diffad_fast.ddim_finish.default, arguments)

    def call(x, m, images):
        return ops.ddim_finish(x, m, alpha, images, mean, deviation, level, clip=1.0)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, m, images), call(x, m, images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x_t": torch.zeros(2, 16, 3)}, ValueError, "x_t must have 4 dimensions"),
        ({"x_t": torch.zeros(2, 16, 3, 5).half()}, TypeError, "float32 or float64, got .*float16"),
        ({"model_output": torch.zeros(2, 16, 3, 4)}, ValueError, "model_output must have shape"),
        ({"alpha_t": 1.5}, ValueError, r"alpha_t must be in \[0.0, 1.0\], got 1.5"),
        ({"alpha_t": torch.full((2,), 0.5)}, TypeError, "alpha_t must be a number"),
        ({"alpha_t": 0.0}, ValueError, "nothing is left of the signal"),
        ({"images": torch.zeros(2, 1, 12, 16)}, ValueError, r"images must have shape \(2, 1, 12"),
        ({"images": torch.zeros(2, 1, 12, 20).double()}, TypeError, "images is torch.float64"),
        ({"mean": torch.zeros(4)}, ValueError, r"mean must have shape \(16,\), got \(4,\)"),
        ({"deviation": torch.zeros(16).double()}, TypeError, "deviation is torch.float64"),
        ({"level": 5}, ValueError, r"level must be in \[0, 4\], got 5"),
        ({"level": 3}, ValueError, "16 channels, which must divide by 64 for level 3"),
        (
            {"x_t": torch.zeros(2, 0, 3, 4), "model_output": torch.zeros(2, 0, 3, 4)},
            ValueError,
            "x_t has 0 channels",
        ),
        ({"prediction_type": "noise"}, ValueError, "unknown prediction_type 'noise'"),
        ({"clip": -1.0}, ValueError, "clip must be in"),
        ({"guidance": 0.2}, ValueError, r"guidance must be \(y, w\)"),
    ],
)
def test_bad_arguments(change, error, message):
    names = ("x_t", "model_output", "alpha_t", "images", "mean", "deviation", "level")
    given = dict(zip(names, problem()[0], strict=True))
    with pytest.raises(error, match=message):
        ops.ddim_finish(**{**given, **change})


@pytest.mark.native
def test_the_bare_operator_guards_its_memory():
    (x, m, alpha, images, mean, deviation, level), y = problem()

    def call(x=x, m=m, y=y, images=images, mean=mean, level=level, kind=0):
        torch.ops.diffad_fast.ddim_finish(
            x, m, y, images, mean, deviation, alpha, level, kind, 0.1, 1.0, False
        )

    call()
    for change in (
        {"x": x[0]}, {"x": x.bfloat16()}, {"m": m[:1]}, {"m": m.int()}, {"y": y[:, :1]},
        {"images": images[..., :1]}, {"images": images.double()}, {"mean": mean[:3]},
        {"mean": mean.double()}, {"level": 3}, {"level": 5}, {"level": -1}, {"kind": 3},
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            call(**change)


# ------------------------------------------------------------------------- CUDA


def test_float64_is_refused_by_the_cuda_kernel(monkeypatch):
    operator = ops.dispatch.OPERATORS["ddim_finish"]
    monkeypatch.setitem(operator.implementations, "cuda", lambda *_: None)
    arguments, _ = problem(dtype=torch.float64)
    assert operator.backend("cuda", *arguments) == "reference"
    assert operator.backend("cuda", *problem()[0]) == "cuda"
    with monkeypatch.context() as patch, pytest.raises(BackendError, match="float32"):
        patch.setattr(ops.dispatch._choices[-1], "backend", "cuda")
        operator.backend("cuda", *arguments)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", range(5))
def test_cuda_is_the_reference_in_float64(cuda, level, dtype, last):
    """Tiles beside each other and cut off, several channels, with and without what is optional."""
    for channels, cols in ((1, 300 >> level), (3, 17)):
        arguments, y = problem(level, channels, rows=2, cols=cols, last=last)
        arguments = (arguments[0], arguments[1].to(dtype), *arguments[2:])
        moved = [t.to(cuda) if isinstance(t, torch.Tensor) else t for t in arguments]
        for guide, clip, clamp in ((None, None, False), (y, 1.5, True)):
            options = {"prediction_type": "v_prediction", "clip": clip, "clamp": clamp}
            guidance = None if guide is None else (guide.to(cuda), 0.2)
            got = ops.ddim_finish(*moved, guidance=guidance, **options)
            check(ops.Finish(*(t.cpu() for t in got)), arguments, 2e-6, guide, **options)


@pytest.mark.gpu
def test_a_captured_end_is_the_eager_one():
    step = NoiseSchedule().reverse_steps(300, 1)[0]
    arguments, _ = problem(3, 1, rows=8, cols=8)
    moved = [t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments]
    moved[2] = step.alpha_t
    eager = ops.ddim_finish(*moved)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.ddim_finish(*moved)
    graph.replay()
    for a, b in zip(eager, captured, strict=True):
        assert torch.equal(a, b)
